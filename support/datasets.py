"""Counts a folder against the paper's data sets:  python -m support.datasets DIR   [P:§4.1]

Nothing is decoded or written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from support import layouts
from support.progress import as_program, complain, show
from support.run import Parser, given_path

COLUMNS = ("training", "test, normal", "test, abnormal", "masks")
PAPER = {  # of section 4.1, in this order
    "Hyper-Kvasir": (1600, 500, 1000, 1000),
    "LAG": (2343, 800, 1711, 1711),
    "Liu et al.": (13250, 677, 290, 0),
    "Covid-X": (13794, 200, 200, 0),
}


def compared(dataset: layouts.Dataset) -> str:
    """The folder's counts, those of the paper's sets, and which of these is the nearest."""
    here = dataset.counts
    rows = {"here": here, **PAPER}
    lines = [f"{dataset.root}: {dataset.layout}", f"{'':14}" + "".join(f"{c:>16}" for c in COLUMNS)]
    lines += [f"{name:14}" + "".join(f"{n:16,}" for n in row) for name, row in rows.items()]
    apart = {name: [h - n for h, n in zip(here, row, strict=True)] for name, row in PAPER.items()}
    nearest = min(apart, key=lambda name: sum(map(abs, apart[name])))
    differing = [f"{c} {d:+,}" for c, d in zip(COLUMNS, apart[nearest], strict=True) if d]
    if differing:
        lines.append(f"nearest: {nearest}, apart from {'; '.join(differing)}")
    else:
        lines.append(f"these are {nearest}'s numbers")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for a folder that is no data set, in one line."""
    parser = Parser(prog="support.datasets", description="Compares a folder with the paper's sets.")
    parser.add_argument("data", type=given_path, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        show(compared(layouts.discover(arguments.data)))
    except (ValueError, OSError) as error:
        return complain("support.datasets", error)
    return 0


if __name__ == "__main__":
    sys.exit(as_program(main))
