"""docs/equations.md: its blocks are what the code, the README and the deviations say today."""

from __future__ import annotations

import re

import pytest

from support.equations import BLOCK, PAGE, ROOT, code, tied_rows, updated

TEXT = (ROOT / PAGE).read_text()
BLOCKS = {match[1]: match[0] for match in BLOCK.finditer(TEXT)}


def test_the_page_is_up_to_date():
    assert updated(TEXT, ROOT) == TEXT, "run make equations"


def test_the_thirteen_equations_stand_in_the_papers_order():
    numbers = re.findall(r"equation (\d+)", " ".join(BLOCKS))
    assert numbers == [str(k) for k in range(1, 14)]
    assert re.findall(r"\\tag\{(\d+)\}", TEXT) == numbers
    titles = [int(n) for n in re.findall(r"^### Equation (\d+): ", TEXT, re.MULTILINE)]
    assert titles == list(range(1, 14))
    assert TEXT.index("## 3.1 ") < TEXT.index("## 3.2 ") < TEXT.index("## 3.3 ")


@pytest.mark.parametrize("mark", [mark for mark in BLOCKS if mark.startswith("equation")])
def test_a_block_has_formula_function_test_and_the_rows_of_the_tags(mark):
    block, number = BLOCKS[mark], int(re.findall(r"\d+", mark)[0])
    formula = re.search(r"^```math\n(.+)\n\\tag", block, re.MULTILINE)[1]
    lines = (ROOT / "README.md").read_text().splitlines()
    line = next(line for line in lines if re.match(rf"- `\[P[:!]\({number}\)", line))
    assert f"$`{formula}`$" in line  # the README's
    function, test = re.findall(r"\[`([\w.]+)`\]\(", line)
    assert f"[`{function}`](../" in block and f"\ndef {function.split('.')[-1]}(" in block
    assert re.search(rf"\[`{test}`\]\(\.\./tests/\w+\.py\)", block)
    rows = re.findall(r"^\| (R\d+) \|", block, re.MULTILINE)
    assert rows == sorted(set(rows), key=lambda row: int(row[1:]))
    assert set(tied_rows(ROOT).get(number, [])) <= set(rows)


def test_text_between_the_blocks_is_left_as_it_is():
    page = "Before.\n<!-- begin: losses.position_loss -->\nold\n<!-- end -->\nAfter.\n"
    new = updated(page, ROOT)
    assert new.startswith("Before.\n<!-- begin: losses.position_loss -->\n")
    assert new.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in new and "def position_loss(" in new
    assert updated(new, ROOT) == new


@pytest.mark.parametrize("mark", ["equation 14", "losses.no_such", "R99", "no_such.module"])
def test_what_is_not_there_is_an_error_that_names_it(mark):
    with pytest.raises(ValueError, match=mark.removeprefix("equation ")):
        updated(f"<!-- begin: {mark} -->\n<!-- end -->", ROOT)


def test_the_code_of_a_method_stands_at_the_margin_with_its_decorators():
    text = code("detectors.PaDiM.score", ROOT)
    assert text.startswith("[`detectors.PaDiM.score`](../detectors.py):")
    assert "```python\n@torch.no_grad()\ndef score(" in text
