"""The rows of the paper's tables and figures, and of a sweep: each is options of pmsacl.py.

Not here: the runs of a row (experiments.py), and how a table is written (support/sheets.py).
"""

from __future__ import annotations

import contextlib
import io
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.strong import STRONG
from support.compared import chosen
from support.options import Config, check_encoder, make_config, parse
from support.run import open_regular
from support.tables import PAPERS_NAMES, PRINTED

# Tables 1-4 and 6, 7. Two rows of a pre-training are one run with both detectors. What has no
# pre-training starts from --init.
_DETECTORS = {
    "PaDiM": "--method none --detector padim",
    "CCD - PaDiM": "--method ccd --detector both",
    "PMSACL - PaDiM": "--detector both",
    "IGD": "--method none --detector igd",
    "CCD - IGD": "--method ccd --detector both",
    "PMSACL - IGD": "--detector both",
}
_COMPARED = {
    name: f"--method none --detector {detector}"
    for detector, name in PAPERS_NAMES.items()
    if detector not in ("padim", "igd")
} | _DETECTORS

# Rows: the paper's name -> options. Table 8 starts from CCD with the terms in its caption, eq. 9's
# too, and keeps that one, so that a row differs from the one above only by its name. Its third
# row keeps eq. 6's centring, part of l_PMSACL: without it and kappa, l_PMSACL is CCD's own loss.
ROWS: dict[str, dict[str, str]] = {
    **{f"table {number}": _COMPARED for number in (1, 2, 3, 4)},
    "table 5": {"PMSACL": ""},
    **{f"table {number}": _DETECTORS for number in (6, 7)},
    "table 8": {
        "CCD": "--method ccd",
        "+ MedMix": "--method ccd --strong medmix",
        "+ l_PMSACL": "--terms pmsacl,aug,pos --alpha 1",
        "+ l_ctr": "--terms ctr,pmsacl,aug,pos --alpha 1",
        "+ kappa(n, m)": "--terms ctr,pmsacl,aug,pos",
    },
    "table 9": {
        "random weights": "--method random --init random",
        "ImageNet": "--method imagenet --init imagenet",
        "SimCLR": "--method simclr --classes 1",
        "Rot-Net": "--method rotnet --strong rotation",
        "CSI": "--method csi --strong rotation",
        "DROC": "--method droc --strong rotation",
        "SupCon": "--method supcon",
        "CCD": "--method ccd --strong permutation",
        "PMSACL": "",
    },
    "table 10": {
        "Random Centre": "--centres random",
        "Equidistant Centre": "--centres equidistant",
        "Re-estimate Centre": "--centres re-estimated",
        "Centres from untrained encoder": "",
    },
    "figure 6": {name: f"--strong {name}" for name in STRONG},
    "figure 7": {f"|A| = {k}": f"--classes {k}" for k in range(1, 9)},
}
OF_ONE_SET = {f"table {number}" for number in (1, 2, 3, 4, 6, 7)}  # whose figures are of its images
OF_NO_ROW = ("-h", "--help", "--dry-run")
MASKED = ("table 6", "table 7")
DETECTOR = {"table 10": "igd", "figure 6": "igd"}  # of the paper, where it is not PaDiM
OF_SET = {"Liu et al.": {"image_size": 64}}  # where the paper has not 256 pixels     [P:§4.2]


@dataclass(frozen=True)
class Row:
    """One line of a table: its settings, and the results of the runs with them."""

    name: str
    options: str
    configs: tuple[Config, ...]  # one for each seed
    detector: str  # whose measures are shown: a row of results.json
    paper: Mapping[str, float | None]  # heading -> figure
    results: tuple[Mapping[str, float], ...] = ()  # one for each finished run
    failure: str = ""

    def value(self, measure: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over the seeds; None without a run, no deviation of one."""
        values = [result[measure] for result in self.results if measure in result]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def rows_of(
    name: str, options: Mapping[str, str], common: dict[str, Any], seeds: int, data_set: str = ""
) -> list[Row]:
    """Rows with their settings complete, so that a mistake shows before anything runs.

    name:     "table 9", "figure 7", or a sweep's.
    options:  row -> its options, which win over the common ones.
    common:   options of all rows, as `parse` returns them.
    data_set: the paper's name of the images, as tables.papers_name has it.
    raises:   ValueError naming the row.
    """
    source, columns, printed = PRINTED.get(name, ("", (), {}))
    if name in OF_ONE_SET and source != data_set:
        columns, printed = (), {}
    rows = []
    for row, text in options.items():
        usual = "igd" if row.endswith("IGD") else DETECTOR.get(name, "padim")
        merged: dict[str, Any] = {"detector": usual, "healthy_share": 0.0}  # all of D trains
        merged |= OF_SET.get(data_set, {}) | common | parse(shlex.split(text))[0]
        try:
            check_encoder(merged)
            configs = tuple(make_config(merged | {"seed": seed}) for seed in range(seeds))
        except ValueError as error:
            raise ValueError(f"{name}, row {row}: {error}") from None
        figures = printed.get(row) or printed.get(f"{row}*") or [None] * len(columns)
        names = chosen(merged["detector"])
        shown = usual if usual in names else names[0]
        rows.append(Row(row, text, configs, shown, dict(zip(columns, figures, strict=True))))
    for row, figures in printed.items():  # Table 5 has the paper's data sets
        if row.removesuffix("*") not in options:
            rows.append(Row(f"paper: {row}", "", (), "", dict(zip(columns, figures, strict=True))))
    return rows


def reference(rows: Sequence[Row]) -> str:
    """The row that the others are compared with: a sweep's `base`, or else the first."""
    return next((row.name for row in rows if row.name == "base"), rows[0].name)


def read_sweep(file: Path) -> dict[str, str]:
    """Settings, one on each line: a name, then options of pmsacl.py; # begins a comment.

    The table compares every setting with the one named `base`, or else the first, seed by seed.
    raises: ValueError naming the line.
    """
    settings: dict[str, str] = {}
    try:
        with open_regular(file) as opened:
            lines = opened.read().decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file") from None
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        if not words:
            continue
        name, options = words[0], words[1:]
        if name in settings or name.startswith("-"):
            what = "is there twice" if name in settings else "is an option: a name comes first"
            raise ValueError(f"{file}, line {number}: {name} {what}")
        if any(word in OF_NO_ROW for word in options):
            raise ValueError(f"{file}, line {number}: none of {', '.join(OF_NO_ROW)} here")
        with contextlib.redirect_stderr(io.StringIO()) as messages:
            try:
                of_row, resume = parse(options)
            except SystemExit:
                reason = messages.getvalue().strip().removeprefix("pmsacl.py: ")
                raise ValueError(f"{file}, line {number}: {reason}") from None
        if resume is not None or of_row.keys() & {"out", "seed", "data"}:
            raise ValueError(f"{file}, line {number}: no --resume, --out, --seed or --data here")
        settings[name] = shlex.join(options)
    if not settings:
        raise ValueError(f"{file}: no settings; a line holds a name and options of pmsacl.py")
    return settings


def with_more(options: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The rows with further options of single ones, which win; names of other tables are left."""
    return {row: f"{text} {more.get(row, '')}".strip() for row, text in options.items()}
