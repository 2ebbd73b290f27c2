"""docs/equations.md: the text is written by hand, the blocks between its marks are written here.

    python -m support.equations

A mark says what its block holds, separated by commas, in this order on the page:

    <!-- begin: equation 5, losses._rows_of_eq_5, R1 -->
    <!-- end -->

An equation brings what the README's map knows of it (formula, function, test) and the rows of
docs/deviations.md that the tags in the code tie to it; a dotted name adds the code of another
function, a row number another row. tests/test_equations.py fails where the page lags behind.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/equations.md")
FOLDERS = ("", "kernels", "baselines", "support")  # where a tag may tie a row to an equation
BLOCK = re.compile(r"^<!-- begin: (.+) -->\n(?:.*\n)*?<!-- end -->$", re.MULTILINE)
LINE = re.compile(
    r"^- `\[(?P<tag>P[:!]\((?P<number>\d+)\)[^]]*)\]` \$`(?P<formula>.+)`\$"
    r" → \[`(?P<function>[\w.]+)`\]\((?P<file>\S+)\)"
    r" → \[`(?P<test>\w+)`\]\((?P<test_file>\S+)\)$",
    re.MULTILINE,
)
ROW = re.compile(r"^\| (R\d+) \|.*$", re.MULTILINE)
TAG = re.compile(r"\[(P[:!][^\]]*)\]")


def updated(page: str, root: Path) -> str:
    """The page with every block written anew from what stands under `root`.

    raises: ValueError naming an equation, a function or a row that is not there.
    """
    readme = (root / "README.md").read_text()
    equations = {int(m["number"]): m for m in LINE.finditer(readme)}
    deviations = (root / "docs" / "deviations.md").read_text()
    rows = {m[1]: m[0] for m in ROW.finditer(deviations)}
    tied = tied_rows(root)

    def block(mark: re.Match[str]) -> str:
        wanted = mark[1].split(", ")
        parts, names, cited = [], [], []
        for word in wanted:
            if word.startswith("equation "):
                number = int(word.removeprefix("equation "))
                if number not in equations:
                    raise ValueError(f"equation {number} is not in the README's map")
                line = equations[number]
                parts.append(f"```math\n{line['formula']}\n\\tag{{{number}}}\n```")
                parts.append(f"Tested by [`{line['test']}`](../{line['test_file']}).")
                names.append(line["function"])
                cited += tied.get(number, [])
            elif re.fullmatch(r"R\d+", word):
                cited.append(word)
            else:
                names.append(word)
        parts[1:1] = [code(name, root) for name in names]
        if unknown := [row for row in cited if row not in rows]:
            raise ValueError(f"no such row in docs/deviations.md: {', '.join(unknown)}")
        if cited:
            ordered = sorted(set(cited), key=lambda row: int(row[1:]))
            table = ["| | the paper | here, and why |", "| --- | --- | --- |"]
            parts.append("\n".join(table + [rows[row] for row in ordered]))
        return "\n\n".join([f"<!-- begin: {mark[1]} -->", *parts, "<!-- end -->"])

    return BLOCK.sub(block, page)


def tied_rows(root: Path) -> dict[int, list[str]]:
    """Which rows of the deviations the tags in the code tie to each equation."""
    tied: dict[int, list[str]] = {}
    for file in (file for d in FOLDERS for file in sorted((root / d).glob("*.py"))):
        for tag in TAG.findall(file.read_text()):
            for number in re.findall(r"P[:!]\((\d+)\)", tag):
                tied.setdefault(int(number), []).extend(re.findall(r"R\d+", tag))
    return tied


def code(name: str, root: Path) -> str:
    """The source of a function or method, in a fence below a link to its file.

    name:   module.function, package.module.function or module.Class.method.
    raises: ValueError if there is no such name.
    """
    parts = name.split(".")
    for k in range(len(parts) - 1, 0, -1):
        file = root.joinpath(*parts[:k]).with_suffix(".py")
        if file.is_file():
            text = _source(file.read_text(), parts[k:])
            if text:
                path = file.relative_to(root).as_posix()
                return f"[`{name}`](../{path}):\n\n```python\n{text}\n```"
    raise ValueError(f"no function {name}")


def _source(text: str, path: list[str]) -> str:
    """The lines of a definition, decorators with it; empty if it is not there."""
    nodes, first, last = ast.parse(text).body, 1, 0
    for name in path:
        kinds = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found = next((n for n in kinds if n.name == name), None)
        if found is None:
            return ""
        first = min([found.lineno, *(d.lineno for d in found.decorator_list)])
        nodes, last = found.body, found.end_lineno or 0
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : last]))


if __name__ == "__main__":
    (ROOT / PAGE).write_text(updated((ROOT / PAGE).read_text(), ROOT))
