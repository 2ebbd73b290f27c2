"""report.html of a run: what was run, the measures, each detector's images, the training.

The page's frame is in page.py, its images are in cards.py, its charts in charts.py. N test images.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from PIL import Image

from measures import confusion
from support import charts
from support.cards import Gallery, cards_html, img, jpeg, measured_images
from support.healthy import described
from support.layouts import Dataset
from support.options import Config, make_config, option
from support.page import SCORES, Section, glossary, page, recounted, slider, table
from support.run import read_json, read_rows, real, write_file
from support.tables import HEADINGS, displayed, fakes_described, measured

ROWS = 500  # of a log that a chart shows; of more, as many at even steps
NAMES = {
    "padim": "PaDiM on the network of this run",
    "igd": "IGD on the network of this run",
    "untrained": "PaDiM on random weights: what the pre-training has to beat",
    "trivial": "a detector of a few lines: what any method has to beat",
    "f_beta": "the pre-training's own head: 1 - P(n = 0), with MedMix how sure it is of a lesion",
}
MEASURES = {  # of a row -> column; shown with KEY_sd and KEY_interval, where it has these
    "image_auroc": "AUROC",
    "image_auroc_mean_of_map": "AUROC of the map's mean",
    **HEADINGS,
}
LOGS = {
    "log.csv": "pre-training",
    "log_local.csv": "pre-training on patches",
    "log_igd_global.csv": "IGD's global model",
    "log_igd_local.csv": "IGD's local model",
}

COLUMNS = {  # of the logs -> what they hold; others keep their name
    "ctr": "l_ctr, eq. 3",
    "pmsacl": "l_PMSACL, eq. 4",
    "aug": "l_aug, eq. 8",
    "pos": "l_pos, eq. 9",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "spread": "spread of the features",
    "distance": "distance of the class means",
    "accuracy": "accuracy of f_beta, held-back images",
    "fake_auroc": "AUROC, fake lesions",
    "fake_aupro": "AUPRO, fake lesions",
}


# --- a run's page --------------------------------------------------------------------------------


def write_report(
    folder: Path,
    dataset: Dataset,
    results: Mapping[str, Any],
    scores: Mapping[str, Array] | None = None,
    validation: Array | None = None,
    shown: Mapping[str, Gallery] | None = None,
    to: Path | None = None,
) -> None:
    """Write report.html of a run into its folder, from what evaluating it has at hand.

    results:    what results.json holds.
    scores:     (N,) of the test images, by the name of the row; None for a run without any.
    validation: (N,) true for the images that set the thresholds.
    shown:      what `cards.gallery` returns, by the name of the row.
    to:         the folder that the page goes into, if not the run's.
    """
    config, shown = read_json(folder / "config.json"), shown or {}
    rows, data = measured(results), {}
    own = real(config.get("data") or folder / "phantom") == dataset.root
    sections = [_what(dataset, results, config, own), _measures(rows, results)]
    scores = {n: s for n, s in (scores or {}).items() if "threshold" in rows.get(n, {})}
    if scores and validation is not None:
        labels, kinds = dataset.labels, np.array([sample.kind for sample in dataset.test])
        sections.append(_kinds(rows, scores, labels, kinds, validation))
        for name in [n for n in shown if n != "untrained"] or list(scores)[:1]:
            keep = measured_images(rows[name], validation)
            data[name] = recounted(scores[name][keep], labels[keep], rows[name]["threshold"])
            sections.append(_detector(name, rows, scores, labels, keep, shown.get(name)))
    training = "".join(_training(folder / file, title) for file, title in LOGS.items())
    sections.append(Section("Training", training + _views(folder, config)))
    sections += [_settings(config), glossary()]
    title = f"{real(folder).name}: report of a run"
    write_file((to or folder) / "report.html", page(title, sections, data))


def _what(
    dataset: Dataset, results: Mapping[str, Any], config: Mapping[str, Any], own: bool
) -> Section:
    """What was run, on what, and how long it took.

    own: the data set is the one that the run was trained on.
    """
    train, normal, abnormal, masks = dataset.counts
    trained = f"{train} healthy images"
    if not own:
        trained = "other images: " + (config.get("data") or "phantoms that the program drew")
    method, preset, epochs = map(config.get, ("method", "preset", "epochs"))
    method = f"{method}, preset {preset}, epochs: {epochs}"
    if config.get("encoder"):
        method = f"no pre-training: the encoder of {config['encoder']}"
    tested = f"{normal} normal and {abnormal} abnormal images, {masks} masks"
    facts = {
        "Images": f"{dataset.root} ({dataset.layout})",
        "Training": trained,
        "Test": tested if dataset.test else "none",
        "Notes": "; ".join(results.get("data_notes", ())),
        "Method": f"{method}, images of {config.get('image_size')} px",
        "Machine": f"{config.get('device')}, Python {config.get('python')}, torch "
        f"{config.get('torch')}, commit {str(config.get('commit'))[:12]}",
        "Start weights": str(results.get("init", "unknown")),
        "Seconds": ", ".join(f"{k} {v:.0f}" for k, v in results.get("seconds", {}).items()),
    }
    rows = [(escape(key), escape(value)) for key, value in facts.items() if value]
    text = table("The run", (), rows)
    if own and not config.get("data"):
        text += (
            "<p>The images are phantoms that the program drew: they show that it works and say "
            "nothing about the method.</p>"
        )
    return Section("What was run", text)


def _measures(rows: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    """Every measure of every row, notes on them, and what the healthy images alone tell."""
    fakes, healthy = results.get("fake_lesions"), results.get("healthy", {})
    more = f"<p>{fakes_described(fakes)}</p>" if fakes else ""
    more += _list(described(name, row) for name, row in healthy.items())
    if not rows:
        text = (
            "<p>This run had healthy images only, so nothing was measured. Other images are scored "
            "by <code>python eval.py RUN --score FOLDER</code>.</p>"
        )
        return Section("Measures", text + more)
    keys = [key for key in MEASURES if any(key in row for row in rows.values())]
    lines = [[_title(n, r), *(_value(r, key) for key in keys)] for n, r in rows.items()]
    first = next(iter(rows.values()))
    count = first.get("images", {})
    caption = (
        f"Measured on {count.get('test_normal')} normal and {count.get('test_abnormal')} abnormal "
        f"images; {count.get('validation_normal')} and {count.get('validation_abnormal')} set the "
        "thresholds."
    )
    if any(f"{key}_interval" in row for row in rows.values() for key in keys):
        caption += " In brackets: intervals of 95%."
    parts = [table(caption, ["", *(MEASURES[key] for key in keys)], lines)]
    for name, row in rows.items():
        if over := row.get("over_untrained"):
            low, high = over["interval"]
            parts.append(
                f"<p>{escape(name)}'s AUROC differs by {over['difference']:+.3f} from that of the "
                f"untrained network, interval {low:+.3f} to {high:+.3f}.</p>"
            )
    notes = dict.fromkeys(note for row in rows.values() for note in row.get("notes", []))
    return Section("Measures", "".join([*parts, more, _list(notes)]))


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _title(name: str, row: Mapping[str, Any]) -> str:
    """The row's name and what it stands for."""
    what = NAMES.get(name, "") + (f" ({row['baseline']})" if "baseline" in row else "")
    note = f'<br><span class="note">{escape(what)}</span>' if what else ""
    return escape(displayed(name)) + note


def _value(row: Mapping[str, Any], key: str) -> str:
    """A number, with its interval or its deviation over groups; a dash if the row has none."""
    if row.get(key) is None:
        return "-"
    interval, sd = row.get(f"{key}_interval"), row.get(f"{key}_sd")
    more = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{row[key]:.3f}" + more + (f" ± {sd:.3f}" if sd is not None else "")


def _kinds(
    rows: Mapping[str, Any],
    scores: Mapping[str, Array],
    labels: Array,
    kinds: Array,
    validation: Array,
) -> Section:
    """For each kind of abnormal image: how many, and for each detector AUROC and how many found."""
    lines = []
    for kind in sorted(set(kinds[labels])):
        line: list[str] = []
        for name, s in scores.items():
            keep = measured_images(rows[name], validation)
            members = keep & labels & (kinds == kind)
            line = line or [escape(str(kind)), str(int(members.sum()))]
            of_kinds = rows[name].get("kinds", {kind: rows[name]["image_auroc"]})  # or one kind
            value = of_kinds.get(kind) if members.any() else None
            found = int((s[members] >= rows[name]["threshold"]).sum())
            line.append("-" if value is None else f"{value:.3f}, {found} found")
        lines.append(line)
    caption = "AUROC of each kind of abnormal image against all normal ones, and how many are found"
    header = ("kind", "images", *map(escape, scores))
    return Section("Kinds", table(caption, header, lines))


# --- a detector's section ------------------------------------------------------------------------


def _detector(
    name: str,
    rows: Mapping[str, Any],
    scores: Mapping[str, Array],
    labels: Array,
    keep: Array,
    shown: Gallery | None,
) -> Section:
    """ROC curve, histogram, threshold and images of a detector.   keep: (N,) measured images."""
    row, s, y = rows[name], scores[name][keep], labels[keep]
    at = confusion(s, y, row["threshold"])
    point = 1 - at["specificity"], at["sensitivity"]
    curves = {name: charts.roc(s, y)}
    for other in [o for o in ("untrained", "trivial", "f_beta") if o in scores and o != name]:
        curves[other] = charts.roc(scores[other][keep], y)
    of = f"{name}: AUROC {row['image_auroc']:.3f}, sensitivity {point[1]:.3f} and specificity "
    roc = charts.roc_chart(curves, point, f"{of}{at['specificity']:.3f} at its threshold")
    text = f"{name}: median {charts.number(float(np.median(s[~y])))} of the normal images, "
    text += f"{charts.number(float(np.median(s[y])))} of the abnormal ones"
    groups = {f"normal ({(~y).sum()})": s[~y], f"abnormal ({y.sum()})": s[y]}
    bars = charts.histogram(groups, row["threshold"], text)
    found, alarms = int((s[y] >= row["threshold"]).sum()), int((s[~y] >= row["threshold"]).sum())
    recount = (
        f"At a threshold of {row['threshold']:.9g}: sensitivity {found} of {y.sum()} "
        f"({point[1]:.3f}), specificity {(~y).sum() - alarms} of {(~y).sum()} "
        f"({at['specificity']:.3f})."
    )
    content = (
        f'<div class="charts">{roc}{bars}</div>{slider(name, row["threshold"], s)}'
        f'<p class="recount" role="status">{recount}</p>'
    )
    if max(y.sum(), (~y).sum()) > SCORES:
        content += f'<p class="note">Moving it recounts {SCORES} scores of a class.</p>'
    words = "Misses and false alarms, then the most and the least abnormal images of each class. "
    words += "Prediction in yellow, lesion's mask in cyan. " * ("pixel_threshold" in row)
    content += cards_html(shown, row["threshold"], words) if shown else ""
    return Section(f"Detector: {name}", content, detector=name)


# --- training, settings, glossary ----------------------------------------------------------------


def _training(log: Path, title: str) -> str:
    """A chart for each column of a log."""
    rows = read_rows(log) if log.is_file() else []
    if not rows:
        return ""
    rows = [rows[i] for i in charts.spread_out(len(rows), ROWS)]
    axis, *columns = rows[0].keys()
    x = [float(row[axis]) for row in rows]
    drawn = []
    for column in columns:
        y = [float(row[column]) if row[column] else float("nan") for row in rows]
        if np.isfinite(y).any():
            name = COLUMNS.get(column, column)
            chart = charts.curve_chart(name, x, y, axis)
            drawn.append(f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>")
    return f'<h3>{escape(title)}</h3><div class="charts">{"".join(drawn)}</div>'


def _views(folder: Path, config: Mapping[str, Any]) -> str:
    """The figure of the classes that the pre-training distinguishes."""
    strong = config.get("strong", "medmix")
    file = folder / "figures" / f"{strong}.png"
    if not file.is_file():
        return ""
    shown = f"Classes 0, 1, ... of {strong}"
    if strong == "medmix":
        shown = "Healthy images with 0, 1, ... fake lesions"
    what = f"{shown}, which the pre-training learns to tell apart"
    with Image.open(file) as image:
        picture = img(jpeg(image), what, image.size)
    return f"<figure>{picture}<figcaption>{what}.</figcaption></figure>"


def _settings(config: Mapping[str, Any]) -> Section:
    """The command that runs it again, and every setting."""
    rows = [(f"<code>{escape(k)}</code>", escape(str(v))) for k, v in config.items()]
    text = f"<p>To run it again:</p><pre>{escape(command(config))}</pre>"
    settings = table("What config.json holds", (), rows)
    text += f"<details><summary>All settings</summary>{settings}</details>"
    return Section("Settings", text)


def command(config: Mapping[str, Any]) -> str:
    """The command line whose run has this config, in a folder of its own.

    raises: ValueError if the config has impossible values.
    """
    known = {k: v for k, v in config.items() if k in Config.__dataclass_fields__ and k != "out"}
    given = {k: known[k] for k in ("data", "preset", "method", "device") if k in known}
    usual = dataclasses.asdict(make_config(given | {"out": ""}))
    words = ["python", "pmsacl.py"]
    for name, value in known.items():
        default = {"data": "", "preset": "paper" if known.get("data") else "quick"}
        default |= {"method": Config.method, "device": value}
        if value != default.get(name, usual[name]):
            words.append(option(name))
            words += [] if value is True else [str(value)]
    return shlex.join(words)
