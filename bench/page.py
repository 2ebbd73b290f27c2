"""Tables that programs write into docs/speed.md, each between two marks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SPEED = Path(__file__).parent.parent / "docs" / "speed.md"


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
