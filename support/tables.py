"""results.json and results.md, scores.csv, and the figures that the paper prints.   [P:§4.4-4.7]

A row of results.json is what eval.protocol returns for one detector.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.cache import digest
from support.healthy import described
from support.layouts import Dataset, Sample
from support.progress import notify
from support.run import encoded, read_rows, write_file

Printed = tuple[str, tuple[str, ...], dict[str, tuple[float | None, ...]]]


def _printed(file: Path) -> dict[str, Printed]:
    """Name, as "table 1" or "figure 6" -> data set, columns, rows.

    In paper.csv, a line with a name and the columns begins a table, and the lines below it hold its
    rows. In Table 3, * marks methods without ImageNet pre-training. Table 5 holds standard
    deviations of PMSACL - PaDiM. The points of Fig. 6 and 7 are not printed: these are what the
    text says of them, empty where it is silent. 4.7.2 has rotation on Covid-X 5.1% below MedMix.
    4.7.3 has "around 98% to 99%" at |A| = 4, less above 5 and below 3.
    """
    tables: dict[str, Printed] = {}
    for name, row, *cells in csv.reader(file.read_text().splitlines()):
        if name:
            rows: dict[str, tuple[float | None, ...]] = {}
            tables[name] = row, tuple(cells), rows
        else:
            rows[row] = tuple(float(cell) if cell else None for cell in cells)
    return tables


PRINTED = _printed(Path(__file__).with_name("paper.csv"))
PAPERS_SETS = {
    "Hyper-Kvasir": "hyperkvasir",
    "LAG": "lag",
    "Liu et al.": "liu",
    "Covid-X": "covidx",
}
_PRETRAINED = {"pmsacl": "PMSACL", "ccd": "CCD"}  # --method -> the paper's name of it
_ON_THE_ENCODER = ("padim", "igd", "panda", "cutpaste")  # rows that a pre-training changes
PAPERS_NAMES = {  # our row -> the paper's without a pre-training
    "padim": "PaDiM",
    "igd": "IGD",
    "dae": "DAE",
    "ocgan": "OCGAN",
    "fanogan": "f-AnoGAN",
    "adgan": "ADGAN",
    "msssim": "MS-SSIM",
    "panda": "PANDA",
    "cutpaste": "CutPaste",
}
HEADINGS = {  # of a row's measures, except the image AUROC, which the paper calls AUC
    "specificity": "Specificity",
    "sensitivity": "Sensitivity",
    "accuracy": "Accuracy",
    "iou": "IoU",
    "dice": "Dice",
    "pro": "Pro",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json and, if a detector was measured, results.md.

    results: whatever results.json is to hold, rows of detectors among it.
    """

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else str(value)

    content = json.dumps(results, indent=2, allow_nan=False, default=plain)
    if measured(results):
        write_file(folder / "results.md", encoded(results_table(results)))
    write_file(folder / "results.json", f"{content}\n".encode())  # the mark of a finished run


def displayed(name: str) -> str:
    """A row's name as tables and figures show it; `untrained` alone does not name a detector."""
    return {"untrained": "untrained padim"}.get(name, name)


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of each detector among the entries of results.json."""
    rows = {k: v for k, v in results.items() if isinstance(v, dict) and "image_auroc" in v}
    rows.pop("fake_lesions", None)  # no detector
    return rows


def papers_name(dataset: Dataset) -> str:
    """The name that Tables 1-7 have for these images, or "" if they are none of the paper's.

    They are recognised by their folder's name: Hyper-Kvasir, LAG, Liu or Covid-X, in any case and
    with any _ or -. In a folder of another name the layout of the paper's archive, or that of the
    site's images, of which it is a subset, is Hyper-Kvasir's.
    """
    words = re.findall("[a-z]+", dataset.root.name.lower())
    for name, letters in PAPERS_SETS.items():
        if letters in words or (len(letters) > 3 and letters in "".join(words)):
            return name
    archive = dataset.layout.lower().replace("-", "").startswith("hyperkvasir")
    return "Hyper-Kvasir" if archive else ""


def origin(dataset: Dataset, seed: int, paper_protocol: bool) -> dict[str, Any]:
    """What a row was measured on: rows are comparable if this is the same."""
    source = {"layout": dataset.layout, "root": str(dataset.root)}
    source["images"] = digest([sample.path for sample in dataset.test], dataset.root)
    return source | {"seed": seed, "paper_protocol": paper_protocol}


def comparable(results: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of results.json without rows of another origin, which are named."""
    other = [name for name, row in measured(results).items() if row.get("data") != source]
    for name in other:
        notify(f"left out: the row {name}, of other data or another protocol")
    return {name: entry for name, entry in results.items() if name not in other}


def results_table(results: Mapping[str, Any]) -> str:
    """results.md: the columns of Tables 1 and 6, then thresholds and notes.

    The paper's row stands below ours if the data set is one of its own.
    """
    rows = measured(results)
    first = next(iter(rows.values()))
    source = first.get("data", {"layout": "unknown layout", "root": "-"})
    count, images = first["images"], Dataset(source["layout"], Path(source["root"]), (), ())
    of_images, of_pixels = (_counterparts(results, papers_name(images), k) for k in ("AUC", "IoU"))
    text = [
        "# Results\n",
        f"{source['root']} ({source['layout']}). Thresholds from {count['validation_normal']} "
        f"normal and {count['validation_abnormal']} abnormal test images; measured on "
        f"{count['test_normal']} normal and {count['test_abnormal']} abnormal ones. "
        f"Start weights: {results.get('init', 'unknown')}.\n",
        _table(rows, ("image_auroc", "specificity", "sensitivity", "accuracy"), *of_images),
        *_worth(rows, results.get("fake_lesions")),
    ]
    segmented = {name: row for name, row in rows.items() if "iou" in row}
    if segmented:
        keys, added = ("iou", "dice", "pro", "aupro", "pixel_auroc"), ("Pro, all", "pixel AUROC")
        text += [
            _table(segmented, keys, *of_pixels, added),
            "IoU, Dice and Pro: abnormal images, mean (± standard deviation) over groups as in "
            "Table 6. Last two columns: all measured images, normal ones too.\n",
        ]
        if without := [name for name in rows if name not in segmented]:
            text.append(f"Without heat maps, so not in this table: {', '.join(without)}.\n")
    for name, row in rows.items():
        text.append(
            f"- {displayed(name)}: an image is abnormal at a score of {row['threshold']:.6g} or "
            "more."
        )
        if name in segmented:
            best = row["best_possible"]
            text[-1] += (
                f" A pixel: at {row['pixel_threshold']:.6g} or more; the best possible threshold, "
                f"{best['threshold']:.6g}, gives IoU {best['iou']:.3f} and Dice {best['dice']:.3f}."
            )
    text += [f"- {described(name, of)}" for name, of in results.get("healthy", {}).items()]
    text += [f"- {' '.join(note.split())}" for note in results.get("data_notes", ())]
    text += dict.fromkeys(f"- {note}" for row in rows.values() for note in row["notes"])
    return "\n".join(text) + "\n"


def _worth(rows: Mapping[str, Any], fakes: Mapping[str, Any] | None) -> list[str]:
    """What the AUROCs are worth: intervals, differences, the trivial baseline, fake lesions."""
    kinds = sorted({kind for row in rows.values() for kind in row.get("kinds", ())})
    lines = [["", "AUC", "95% interval", "over untrained", "mean of map", *kinds]]
    for name, row in rows.items():
        low, high = row["image_auroc_interval"]
        cells = [displayed(name), f"{row['image_auroc']:.3f}", f"{low:.3f} to {high:.3f}", "", ""]
        if over := row.get("over_untrained"):
            low, high = over["interval"]
            cells[3] = f"{over['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        if "image_auroc_mean_of_map" in row:
            cells[4] = f"{row['image_auroc_mean_of_map']:.3f}"
        of_kinds = row.get("kinds", {})
        lines.append(cells + [f"{of_kinds[k]:.3f}" if k in of_kinds else "" for k in kinds])
    notes = ["Bootstrap over test images, paired for the differences."]
    if "trivial" in rows:
        notes.append(f"trivial: {rows['trivial']['baseline']}, the best of five without a network.")
    if "f_beta" in rows:
        notes.append("f_beta: 1 - P(n = 0), R22.")
    if fakes:
        notes.append(fakes_described(fakes))
    return [markdown_table(lines), " ".join(notes) + "\n"]


def fakes_described(fakes: Mapping[str, Any]) -> str:
    """How well fake lesions are found, with the encoder and with the untrained one."""
    before = fakes["untrained"]
    auroc, aupro = (f"{fakes[k]:.3f} ({before[k]:.3f})" for k in ("image_auroc", "aupro"))
    return f"Fake lesions in healthy images (untrained): image AUROC {auroc}, AUPRO {aupro}."


def _counterparts(
    results: Mapping[str, Any], data_set: str, first: str
) -> tuple[int, dict[str, str]]:
    """The paper's table of these images whose first column this is, and our row -> its row.

    For images that the paper has not, the number is that of a table with the same columns.
    """
    numbers = [k for k in (1, 2, 3, 4, 6, 7) if PRINTED[f"table {k}"][1][0] == first]
    number = next((k for k in numbers if PRINTED[f"table {k}"][0] == data_set), None)
    if number is None:
        return numbers[0], {}
    config = results.get("config", {})
    method = None if config.get("encoder") else config.get("method")
    names = dict(PAPERS_NAMES)
    if method != "none":
        names = {row: name for row, name in names.items() if row not in _ON_THE_ENCODER}
    if method in _PRETRAINED:
        for row in ("padim", "igd"):
            names[row] = f"{_PRETRAINED[method]} - {PAPERS_NAMES[row]}"
    printed = PRINTED[f"table {number}"][2]
    with_star = {row: name if name in printed else f"{name}*" for row, name in names.items()}
    return number, {row: name for row, name in with_star.items() if name in printed}


def _table(
    rows: Mapping[str, Any],
    keys: Sequence[str],
    number: int,
    counterparts: Mapping[str, str],
    added: Sequence[str] = (),
) -> str:
    """Our rows under the header of one of the paper's tables.

    keys:         of a row, one for each column.
    number:       of the paper's table.
    counterparts: our row -> the paper's row to show below it.
    added:        columns that the paper's table lacks.
    """
    _, columns, theirs = PRINTED[f"table {number}"]
    lines = [["", *columns, *added]]
    for name, row in rows.items():
        sd = ("" if row.get(f"{k}_sd") is None else f" ± {row[f'{k}_sd']:.3f}" for k in keys)
        measures = (f"{row[k]:.3f}{d}" for k, d in zip(keys, sd, strict=True))
        lines.append([displayed(name), *measures])
        if counterpart := counterparts.get(name):
            printed = [f"{value:.3f}" for value in theirs[counterpart]]
            lines.append([f"paper, Table {number}: {counterpart}", *printed, *("" for _ in added)])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells; the first is its header."""
    header, *rest = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    ruled = [header, ["---"] * len(header), *rest]
    return "".join("| " + " | ".join(line) + " |\n" for line in ruled)


def quoted(text: str) -> str:
    """A cell of a CSV file, whatever the text holds."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text


def _kept_columns(
    file: Path, samples: Sequence[Sample], names: Collection[str]
) -> dict[str, list[str]]:
    """Columns of the scores.csv of the same images, of rows that have not been scored again."""
    old = read_rows(file) if file.is_file() else []
    same = [row.get("path") for row in old] == [str(s.path) for s in samples]
    if not (old and same) or any(None in {*row, *row.values()} for row in old):  # or damaged
        return {}
    columns = [column for column in old[0] if column.rpartition("_")[0] in names]
    return {column: [row[column] for row in old] for column in columns}


def write_scores(
    folder: Path,
    samples: Sequence[Sample],
    scores: Mapping[str, np.ndarray],
    rows: Mapping[str, Any],
    validation: np.ndarray,
    detectors: Mapping[str, Any],
) -> None:
    """scores.csv: path, kind, label, split, then score and predicted label of each detector.

    detectors: by name; one with healthy images that trained nothing gets a third column.
    """
    columns: dict[str, list[Any]] = {
        "path": [quoted(str(sample.path)) for sample in samples],
        "kind": [quoted(sample.kind) for sample in samples],
        "label": [sample.label for sample in samples],
        "split": ["validation" if chosen else "test" for chosen in validation],
    }
    for name, s in scores.items():
        columns[f"{name}_score"] = s.tolist()
        columns[f"{name}_predicted"] = (s >= rows[name]["threshold"]).astype(int).tolist()
        if (known := getattr(detectors.get(name), "healthy", None)) is not None:
            columns[f"{name}_percentile"] = known.percentile(s).round(2).tolist()
    file = folder / "scores.csv"
    columns |= _kept_columns(file, samples, measured(rows).keys() - scores.keys())
    lines = [[*columns], *zip(*columns.values(), strict=True)]
    write_file(file, encoded("".join(",".join(map(str, line)) + "\n" for line in lines)))
