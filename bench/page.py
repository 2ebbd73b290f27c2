"""What was measured on what, and the tables in docs/speed.md, each between two marks of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from support.versions import versions

SPEED = Path(__file__).parent.parent / "docs" / "speed.md"


def add_commit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commit", default="", help="of the code, where there is no git")


def provenance(commit: str) -> dict[str, str]:
    """Processor and its threads now, versions and commit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = versions(device) | ({"commit": commit} if commit else {})
    return {
        "processor": f"{about['processor']}, {about['threads']} threads",
        "torch": about["torch"],
        "triton": about["triton"],
        "commit": about["commit"][:7],
    }


def write_block(name: str, lines: Sequence[str]) -> None:
    """Put the lines between <!-- NAME --> and <!-- /NAME -->, in place of what is there."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = SPEED.read_text(encoding="utf-8").partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ValueError(f"{SPEED}: there is no {first.strip()} and {last} to write between")
    text = "\n".join(lines)
    SPEED.write_text(f"{before}{first}\n{text}\n\n{last}{after}", encoding="utf-8")
    print(f"written to {SPEED}")
