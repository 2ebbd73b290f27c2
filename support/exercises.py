"""notebooks/exercises.py, the students' version, made from notebooks/exercises_solution.py.

    python -m support.exercises

`make notebooks` runs this, and makes exercises.ipynb of it, which is kept; the source is not.

In the solution, lines of this form hold what a student is to write:

    # BLANK: a hint
    return the(answer)
    # END

The students' version has the hint and `raise NotImplementedError` in their place. `check` and
`close` are what the tests in both are made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SOLUTION, STUDENTS = FOLDER / "exercises_solution.py", FOLDER / "exercises.py"
BLANK = re.compile(
    r"^(?P<indent> *)# BLANK: (?P<hint>.+)\n(?:.*\n)+?(?P=indent)# END\n", re.MULTILINE
)


def students_version(solution: str) -> str:
    """The solution with a hint and an error in place of each answer.

    raises: ValueError if a BLANK has no END, or an END no BLANK.
    """
    text = BLANK.sub(r"\g<indent># Hint: \g<hint>\n\g<indent>raise NotImplementedError\n", solution)
    if left := re.findall(r"^ *# (?:BLANK:.*|END)$", text, re.MULTILINE):
        raise ValueError(f"a blank without both of its ends: {left[0].strip()}")
    return text


def check(results: dict[str, str], exercise: str, test: Callable[[], None]) -> None:
    """Run a test, say how it ended, and keep it: right, open, or wrong with the reason."""
    try:
        test()
        results[exercise] = "right"
    except NotImplementedError:
        results[exercise] = "open"
    except Exception as error:  # a student's code may do anything
        results[exercise] = f"wrong: {type(error).__name__} {error}".strip()
    print(f"{exercise}: {results[exercise]}")


def close(got: Tensor, want: Tensor, hint: str) -> None:
    """raises: AssertionError, with the hint, unless both are equal in shape and within rounding."""
    assert torch.is_tensor(got), f"a tensor is wanted, got {type(got).__name__}"
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    assert torch.allclose(got.to(want), want, rtol=1e-5, atol=1e-7), hint


if __name__ == "__main__":
    STUDENTS.write_text(students_version(SOLUTION.read_text()))
