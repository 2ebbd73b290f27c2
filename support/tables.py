"""results.json and results.md, scores.csv, and the paper's Tables 1-10 as data.   [P:§4.4-4.6]

A row of results.json is what eval.protocol returns for one detector.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.layouts import Dataset, Sample
from support.run import encoded, write_file

_DETECTION = ("AUC", "Specificity", "Sensitivity", "Accuracy")
_LOCALISATION = ("IoU", "Dice", "Pro")
# The paper's Tables 1-10 as printed: number -> data set, columns, rows. In Table 3, * marks
# methods without ImageNet pre-training. Table 5 holds standard deviations of PMSACL - PaDiM.
# fmt: off
PAPER: dict[int, tuple[str, tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    1: ("Hyper-Kvasir", _DETECTION, {
        "DAE": (0.705, 0.522, 0.756, 0.693), "OCGAN": (0.813, 0.691, 0.811, 0.795),
        "f-AnoGAN": (0.907, 0.846, 0.915, 0.883), "ADGAN": (0.913, 0.879, 0.946, 0.893),
        "MS-SSIM": (0.917, 0.857, 0.925, 0.912), "PANDA": (0.937, 0.805, 0.919, 0.917),
        "CutPaste": (0.949, 0.847, 0.957, 0.932), "PaDiM": (0.943, 0.846, 0.929, 0.898),
        "CCD - PaDiM": (0.978, 0.923, 0.961, 0.967), "PMSACL - PaDiM": (0.996, 0.966, 0.981, 0.983),
        "IGD": (0.939, 0.858, 0.913, 0.906), "CCD - IGD": (0.972, 0.934, 0.947, 0.956),
        "PMSACL - IGD": (0.995, 0.947, 0.965, 0.972),
    }),
    2: ("LAG", _DETECTION, {
        "MS-SSIM": (0.823, 0.257, 0.937, 0.774), "f-AnoGAN": (0.778, 0.565, 0.899, 0.763),
        "PANDA": (0.789, 0.624, 0.869, 0.767), "CutPaste": (0.745, 0.372, 0.788, 0.685),
        "PaDiM": (0.688, 0.314, 0.809, 0.673), "CCD - PaDiM": (0.728, 0.429, 0.779, 0.694),
        "PMSACL - PaDiM": (0.761, 0.466, 0.877, 0.753), "IGD": (0.796, 0.396, 0.958, 0.805),
        "CCD - IGD": (0.874, 0.572, 0.944, 0.875), "PMSACL - IGD": (0.908, 0.531, 0.979, 0.884),
    }),
    3: ("Liu et al.", _DETECTION, {
        "DAE*": (0.629, 0.733, 0.554, 0.597), "OCGAN*": (0.592, 0.716, 0.534, 0.624),
        "ADGAN*": (0.730, 0.852, 0.496, 0.713), "f-AnoGAN": (0.735, 0.865, 0.579, 0.694),
        "PANDA": (0.719, 0.846, 0.551, 0.671), "CutPaste": (0.779, 0.895, 0.772, 0.738),
        "PaDiM": (0.741, 0.851, 0.738, 0.751), "CCD - PaDiM": (0.789, 0.946, 0.792, 0.767),
        "PMSACL - PaDiM": (0.814, 0.973, 0.725, 0.803), "IGD": (0.787, 0.914, 0.596, 0.743),
        "CCD - IGD": (0.837, 0.985, 0.774, 0.815), "PMSACL - IGD": (0.851, 0.986, 0.792, 0.829),
    }),
    4: ("Covid-X", _DETECTION, {
        "MS-SSIM": (0.634, 0.572, 0.406, 0.577), "f-AnoGAN": (0.669, 0.718, 0.365, 0.532),
        "PANDA": (0.629, 0.762, 0.447, 0.591), "CutPaste": (0.658, 0.701, 0.494, 0.648),
        "PaDiM": (0.614, 0.753, 0.318, 0.559), "CCD - PaDiM": (0.632, 0.673, 0.569, 0.616),
        "PMSACL - PaDiM": (0.658, 0.749, 0.467, 0.615), "IGD": (0.699, 0.885, 0.490, 0.688),
        "CCD - IGD": (0.746, 0.851, 0.595, 0.722), "PMSACL - IGD": (0.872, 0.863, 0.775, 0.813),
    }),
    5: ("standard deviations", _DETECTION, {
        "Hyper-Kvasir": (0.0084, 0.0079, 0.0127, 0.0036), "LAG": (0.0163, 0.0085, 0.0105, 0.0121),
        "Covid-X": (0.0107, 0.0149, 0.0092, 0.0171),
    }),
    6: ("Hyper-Kvasir", _LOCALISATION, {
        "PaDiM": (0.341, 0.475, 0.803), "CCD - PaDiM": (0.378, 0.497, 0.881),
        "PMSACL - PaDiM": (0.406, 0.554, 0.854), "IGD": (0.303, 0.417, 0.794),
        "CCD - IGD": (0.372, 0.502, 0.865), "PMSACL - IGD": (0.384, 0.521, 0.876),
    }),
    7: ("LAG", _LOCALISATION, {
        "PaDiM": (0.427, 0.579, 0.596), "CCD - PaDiM": (0.462, 0.612, 0.634),
        "PMSACL - PaDiM": (0.475, 0.643, 0.628), "IGD": (0.409, 0.539, 0.603),
        "CCD - IGD": (0.509, 0.645, 0.677), "PMSACL - IGD": (0.516, 0.667, 0.693),
    }),
    8: ("PaDiM on Hyper-Kvasir and LAG", ("AUC Hyper-Kvasir", "AUC LAG"), {
        "CCD": (0.978, 0.728), "+ MedMix": (0.985, 0.739), "+ l_PMSACL": (0.990, 0.745),
        "+ l_ctr": (0.993, 0.753), "+ kappa(n, m)": (0.996, 0.761),
    }),
    9: ("PaDiM on Hyper-Kvasir", _DETECTION, {
        "ImageNet": (0.943, 0.846, 0.929, 0.898), "SimCLR": (0.945, 0.794, 0.942, 0.914),
        "Rot-Net": (0.938, 0.856, 0.905, 0.905), "CSI": (0.946, 0.952, 0.914, 0.933),
        "DROC": (0.931, 0.954, 0.881, 0.914), "SupCon": (0.946, 0.912, 0.953, 0.928),
        "CCD": (0.978, 0.923, 0.961, 0.967), "PMSACL": (0.996, 0.966, 0.981, 0.983),
    }),
    10: ("IGD", ("AUC Hyper-Kvasir", "AUC Liu et al.", "AUC LAG", "AUC Covid-X"), {
        "Random Centre": (0.902, 0.792, 0.803, 0.795),
        "Equidistant Centre": (0.912, 0.772, 0.825, 0.814),
        "Re-estimate Centre": (0.985, 0.864, 0.878, 0.876),
        "Centres from untrained encoder": (0.995, 0.851, 0.908, 0.872),
    }),
}
# What the text says of Fig. 6 and 7, whose points are not printed; None where it is silent. 4.7.2
# has rotation on Covid-X 5.1% below MedMix. 4.7.3 has "around 98% to 99%" at |A| = 4, less above 5
# and below 3.
PAPER_FIGURES: dict[int, tuple[str, tuple[str, ...], dict[str, tuple[float | None, ...]]]] = {
    6: ("IGD on Hyper-Kvasir and Covid-X", ("AUC Hyper-Kvasir", "AUC Covid-X"), {
        "medmix": (0.995, 0.872), "permutation": (0.969, None), "rotation": (None, 0.821),
    }),
    7: ("PaDiM on Hyper-Kvasir, 0.98 to 0.99 at |A| = 4", (), {}),
}
# fmt: on
Printed = tuple[str, tuple[str, ...], Mapping[str, Sequence[float | None]]]
PRINTED: dict[str, Printed] = {f"table {n}": table for n, table in PAPER.items()}
PRINTED |= {f"figure {n}": figure for n, figure in PAPER_FIGURES.items()}
_COUNTERPARTS = {"padim": "PMSACL - PaDiM", "igd": "PMSACL - IGD"}  # our row -> the paper's


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json and, if a detector was measured, results.md.

    results: whatever results.json is to hold, rows of detectors among it.
    """
    content = json.dumps(
        results,
        indent=2,
        allow_nan=False,
        default=lambda v: v.item() if isinstance(v, np.generic) else str(v),
    )
    write_file(folder / "results.json", f"{content}\n".encode())
    if measured(results):
        write_file(folder / "results.md", encoded(results_table(results)))


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of each detector among the entries of results.json."""
    return {k: v for k, v in results.items() if isinstance(v, dict) and "image_auroc" in v}


def origin(dataset: Dataset, seed: int, paper_protocol: bool) -> dict[str, Any]:
    """What a row was measured on: rows are comparable if this is the same."""
    source = {"layout": dataset.layout, "root": str(dataset.root)}
    return source | {"seed": seed, "paper_protocol": paper_protocol}


def results_table(results: Mapping[str, Any]) -> str:
    """results.md: the columns of Tables 1 and 6, then thresholds and notes.

    The paper's row stands below ours only if Dataset.layout says that the data set is
    Hyper-Kvasir: the paper's archive, or the site's images, of which the archive is a subset.
    """
    rows = measured(results)
    first = next(iter(rows.values()))
    source = first.get("data", {"layout": "unknown layout", "root": "-"})
    count, layout = first["images"], source["layout"].replace("-", "").lower()
    counterparts = _COUNTERPARTS if layout.startswith("hyperkvasir") else {}
    text = [
        "# Results\n",
        f"{source['root']} ({source['layout']}). Thresholds from {count['validation_normal']} "
        f"normal and {count['validation_abnormal']} abnormal test images; measured on "
        f"{count['test_normal']} normal and {count['test_abnormal']} abnormal ones. "
        f"Start weights: {results.get('init', 'unknown')}.\n",
        _table(1, rows, ("image_auroc", "specificity", "sensitivity", "accuracy"), counterparts),
    ]
    segmented = {name: row for name, row in rows.items() if "iou" in row}
    if segmented:
        keys, added = ("iou", "dice", "pro", "aupro", "pixel_auroc"), ("Pro, all", "pixel AUROC")
        text += [
            _table(6, segmented, keys, counterparts, added),
            "IoU, Dice and Pro: abnormal images, mean (± standard deviation) over groups as in "
            "Table 6. Last two columns: all measured images, normal ones too.\n",
        ]
    for name, row in rows.items():
        text.append(f"- {name}: an image is abnormal at a score of {row['threshold']:.6g} or more.")
        if name in segmented:
            best = row["best_possible"]
            text[-1] += (
                f" A pixel: at {row['pixel_threshold']:.6g} or more; the best possible threshold, "
                f"{best['threshold']:.6g}, gives IoU {best['iou']:.3f} and Dice {best['dice']:.3f}."
            )
    text += [f"- {' '.join(note.split())}" for note in results.get("data_notes", ())]
    text += dict.fromkeys(f"- {note}" for row in rows.values() for note in row["notes"])
    return "\n".join(text) + "\n"


def _table(
    number: int,
    rows: Mapping[str, Any],
    keys: Sequence[str],
    counterparts: Mapping[str, str],
    added: Sequence[str] = (),
) -> str:
    """Our rows under the header of one of the paper's tables.

    number:       of the paper's table.
    keys:         of a row, one for each column.
    counterparts: our row -> the paper's row to show below it.
    added:        columns that the paper's table lacks.
    """
    header = ["", *PAPER[number][1], *added]
    lines = [header]
    for name, row in rows.items():
        sd = ("" if row.get(f"{k}_sd") is None else f" ± {row[f'{k}_sd']:.3f}" for k in keys)
        lines.append([name, *(f"{row[k]:.3f}{d}" for k, d in zip(keys, sd, strict=True))])
        if counterpart := counterparts.get(name):
            printed = [f"{value:.3f}" for value in PAPER[number][2][counterpart]]
            lines.append([f"paper, Table {number}: {counterpart}", *printed, *("" for _ in added)])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells; the first is its header."""
    header, *rest = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    ruled = [header, ["---"] * len(header), *rest]
    return "".join("| " + " | ".join(line) + " |\n" for line in ruled)


def write_scores(
    folder: Path,
    samples: Sequence[Sample],
    scores: Mapping[str, NDArray[Any]],
    rows: Mapping[str, Any],
    validation: NDArray[Any],
) -> None:
    """scores.csv: path, kind, label, split, then score and predicted label of each detector."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{what}" for name in scores for what in ("score", "predicted")]
    writer.writerow(["path", "kind", "label", "split", *columns])
    for i, sample in enumerate(samples):
        cells: list[Any] = [sample.path, sample.kind, sample.label]
        cells.append("validation" if validation[i] else "test")
        for name, s in scores.items():
            cells += [float(s[i]), int(s[i] >= rows[name]["threshold"])]
        writer.writerow(cells)
    write_file(folder / "scores.csv", encoded(text.getvalue()))
