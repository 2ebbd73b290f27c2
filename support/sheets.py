"""A table of rows as Markdown, CSV and a chart: our means, next to the paper's figures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.figures import dot_chart, png
from support.options import option
from support.rows import MASKED, OF_ONE_SET, ROWS, Row, reference
from support.run import encoded, write_file
from support.tables import HEADINGS, PAPERS_NAMES, PRINTED, markdown_table

MEASURES = {  # of a finished run -> heading
    "image_auroc": "AUC",
    "interval": "95% interval",  # interval_low and interval_high
    "gain": "AUC over",  # that of `reference`, seed by seed, so on the same test images
    **HEADINGS,
    "fake_lesions": "AUC of fake lesions",  # in healthy images
    "pretext": "f_beta's accuracy",
    "spread": "spread of z",
    "minutes": "minutes a run",  # of the last process only, if the run was resumed
}
ENDS = ("interval_low", "interval_high")
_DETECTION = ("image_auroc", "interval", "specificity", "sensitivity", "accuracy", "minutes")
_LOCALISATION = ("iou", "dice", "pro", "aupro", "pixel_auroc", "minutes")
_OTHERS = tuple(name for name in MEASURES if name not in ("iou", "dice", "pro"))


def measures_of(name: str) -> tuple[str, ...]:
    """The measures that a table shows."""
    if name in MASKED:
        return _LOCALISATION
    return _DETECTION if name in OF_ONE_SET else _OTHERS


def shown(name: str, rows: Sequence[Row]) -> list[Row]:
    """Without rows that have nothing to show: trivial baselines in a table of localisation."""
    first = measures_of(name)[0]
    return [row for row in rows if row.configs or row.paper or row.value(first)]


def headings(name: str, rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Columns: each measure that a run has (False), each followed by the paper's (True)."""
    columns: list[tuple[str, bool]] = []
    paper = dict.fromkeys(heading for row in rows for heading in row.paper)
    of_table = measures_of(name)
    for measure in of_table:
        heading, key = MEASURES[measure], ENDS[0] if measure == "interval" else measure
        if measure == of_table[0] or any(row.value(key) for row in rows):
            columns.append((measure, False))
        columns += [(p, True) for p in paper if p == heading or p.startswith(heading + " ")]
    return columns


def markdown(name: str, title: str, rows: Sequence[Row]) -> str:
    """The table: our mean ± standard deviation, next to the paper's figure."""
    columns, digits = headings(name, rows), 4 if name == "table 5" else 3
    heads = [f"paper: {name}" if paper else MEASURES[name] for name, paper in columns]
    heads = [f"{h} {reference(rows)}" if h == MEASURES["gain"] else h for h in heads]
    lines = [["", "seeds", *heads]]
    for row in rows:
        cells = [_cell(row, column, paper, digits) for column, paper in columns]
        lines.append([row.name, str(len(row.results) or "0" * bool(row.configs)), *cells])
    notes = [f"- {r.name}: `{r.options or 'no options of its own'}`" for r in rows if r.configs]
    notes += [f"- {row.name}: {row.options}" for row in rows if row.options and not row.configs]
    notes += [f"- {row.name} failed: {row.failure}" for row in rows if row.failure]
    head, text = f"# {title}\n\n{markdown_table(lines)}", "\n".join(notes)
    legend = "Mean ± standard deviation over the seeds."
    if ("interval", False) in columns:
        legend += " 95% interval: bootstrap over the test images, its ends averaged over the seeds."
    return f"{head}\n{legend}\n\n{text}\n"


def _cell(row: Row, name: str, paper: bool, digits: int) -> str:
    """Our mean ± standard deviation of a measure, or the paper's figure under a heading."""
    if paper:
        figure = row.paper.get(name)
        return "" if figure is None else f"{figure:.{digits}f}"
    if name == "interval":
        ends = [row.value(end) for end in ENDS]
        return " to ".join(f"{end[0]:.3f}" for end in ends if end)
    value = row.value(name)
    if value is None:
        return "not run" if row.configs and not row.results else ""
    mean, sd = value
    return f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def as_csv(name: str, rows: Sequence[Row]) -> str:
    """A line for each row: name, options, seeds, our means and deviations, the paper's figures."""
    columns = [c for c in headings(name, rows) if c != ("interval", False)]
    heads = [[f"paper {n}"] if paper else [f"{n}_mean", f"{n}_sd"] for n, paper in columns]
    lines: list[list[Any]] = [["row", "options", "seeds", *sum(heads, [])]]
    for row in rows:
        cells: list[Any] = [row.name, row.options, len(row.results)]
        for column, paper in columns:
            cells += [row.paper.get(column)] if paper else row.value(column) or (None, None)
        lines.append(cells)
    return _csv(lines)


def runs_csv(rows: Sequence[Row]) -> str:
    """A line for each finished run: its row, seed and measures, whether the table shows them."""
    own = [m for m in (*MEASURES, *ENDS) if m != "gain"]  # which depends on another run
    names = [m for m in own if any(m in r for row in rows for r in row.results)]
    lines: list[list[Any]] = [["row", "seed", *names]]
    for row in rows:
        lines += [[row.name, int(r["seed"]), *map(r.get, names)] for r in row.results]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def title_of(name: str, rows: Sequence[Row], images: str) -> str:
    """What the table shows, of which images, and where the paper's figures come from."""
    detectors = [d for d in ("padim", "igd") if any(row.detector == d for row in rows)]
    of = " and ".join(PAPERS_NAMES[d] for d in detectors)
    title = f"{name.capitalize()}: {of} on {images}"
    if name in OF_ONE_SET:
        what = "localisation" if name in MASKED else "detection"
        title = f"{name.capitalize()}: anomaly {what} on {images}"
    source = PRINTED[name][0] if name in PRINTED else ""
    if name in OF_ONE_SET and not any(row.paper for row in rows):
        return f"{title}; the paper's is on {source}"
    return f"{title}; paper: {source}" if source else title


def write(
    name: str, rows: Sequence[Row], common: Mapping[str, Any], images: str, out: Path | None
) -> str:
    """A table's Markdown text; with `out`, NAME-DATASET-HASH.md, .csv, .png and -runs.csv there.

    common: options of all rows.   images: the data set's name.
    """
    rows = shown(name, rows)
    shared = {k: v for k, v in common.items() if k not in ("data", "device")}
    words = (option(k) if v is True else f"{option(k)} {v}" for k, v in shared.items())
    options = " ".join(words) or "defaults"
    title = title_of(name, rows, images)
    text = markdown(name, f"{title}\n\nOptions of all rows: `{options}`", rows)
    if out is None:
        return text
    usual = ROWS.get(name, {})
    changed = [row.options for row in rows if row.options != usual.get(row.name, row.options)]
    settings = [options, str(common.get("data", "")), *changed]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
    stem = f"{name.replace(' ', '')}-{images}-{digest}"
    write_file(out / f"{stem}.md", encoded(text))
    write_file(out / f"{stem}.csv", encoded(as_csv(name, rows)))
    write_file(out / f"{stem}-runs.csv", encoded(runs_csv(rows)))
    first = measures_of(name)[0]
    ours = [row for row in rows if row.configs or row.results]
    dots = {r.name: [result[first] for result in r.results if first in result] for r in ours}
    columns = [c for c, paper in headings(name, rows) if paper and c.startswith(MEASURES[first])]
    printed = {f"paper: {c}": {r.name: r.paper.get(c) for r in rows} for c in columns}
    printed = {} if name == "table 5" else printed  # deviations, not values
    axis = "image AUROC" if first == "image_auroc" else MEASURES[first]
    note = f"Options of all rows: {options}"
    picture = dot_chart(dots, printed, title=title, axis=axis, note=note)
    write_file(out / f"{stem}.png", png(picture))
    return text
