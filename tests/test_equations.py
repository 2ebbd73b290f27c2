"""docs/equations.md: its blocks are what the code, the README and the deviations say today."""

from __future__ import annotations

import re

import pytest

from support.equations import BLOCK, PAGE, ROOT, updated

TEXT = (ROOT / PAGE).read_text()


def test_the_page_is_up_to_date():
    assert updated(TEXT, ROOT) == TEXT, "run make equations"


def test_the_thirteen_equations_stand_in_the_papers_order():
    marks = [match[1] for match in BLOCK.finditer(TEXT)]
    numbers = re.findall(r"equation (\d+)", " ".join(marks))
    assert numbers == [str(k) for k in range(1, 14)]
    assert re.findall(r"\\tag\{(\d+)\}", TEXT) == numbers
    titles = [int(n) for n in re.findall(r"^### Equation (\d+): ", TEXT, re.MULTILINE)]
    assert titles == list(range(1, 14))
    assert TEXT.index("## 3.1 ") < TEXT.index("## 3.2 ") < TEXT.index("## 3.3 ")


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
