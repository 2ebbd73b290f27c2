"""The exercises: the students' version is the solution with blanks, and the tests tell answers."""

from __future__ import annotations

import json
import re

import pytest

from support.exercises import BLANK, SOLUTION, STUDENTS, students_version

TEXT = SOLUTION.read_text()
BLANKS = students_version(TEXT)
NUMBER = len(BLANK.findall(TEXT))
EXERCISES = [f"equation {k}" for k in (2, 3, 6, 7, 5, 4, 8, 9)]
EXERCISES += ["PaDiM's Gaussians", "equation 13", "MedMix's paste"]


def ended(source: str) -> dict[str, str]:
    """How each exercise of a notebook's source ends."""
    names: dict = {}
    exec(compile(source, "exercises", "exec"), names)
    return names["results"]


def lines_of(text: str) -> list[str]:
    """Without the marks of a comment, of a heading and of a cell."""
    lines = (line.lstrip("# ") for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("%%")]


def test_the_students_notebook_is_made_from_the_solution():
    cells = json.loads(STUDENTS.with_suffix(".ipynb").read_text())["cells"]
    *_, source = BLANKS.split("# ---\n")  # what follows the header
    shown = "\n".join("".join(cell["source"]) for cell in cells)
    assert lines_of(shown) == lines_of(source), "run make notebooks"


def test_the_solution_passes_and_every_blank_is_a_failing_test_of_the_students():
    solved, blank = ended(TEXT), ended(BLANKS)
    assert list(solved) == list(blank) == EXERCISES and NUMBER == len(EXERCISES) == 11
    assert set(solved.values()) == {"right"}
    assert set(blank.values()) == {"open"}


WRONG = [  # exercise, the answer's line, what a student may write instead
    ("equation 2", "with torch.no_grad():", "with torch.enable_grad():"),
    ("equation 2", "z[n == k].mean(dim=0) for", "z.mean(dim=0) for"),
    ("equation 2", "z[n == k].mean(dim=0) for", "z[n == k].sum(dim=0) / len(z) for"),
    ("equation 3", ".sum(dim=1).mean()", ".mean()"),
    ("equation 3", ".sum(dim=1).mean()", ".sum()"),
    ("equation 3", ".sum(dim=1).mean()", ".sum(dim=1).sqrt().mean()"),
    ("equation 3", "(z - c[n]).square()", "(z - c.mean(dim=0)).square()"),
    ("equation 6", ".clamp_min(eps)", ""),
    ("equation 6", "u = z - c[n]\n", "u = z\n"),
    ("equation 6", "dim=1, keepdim=True)", "keepdim=True)"),
    ("equation 7", "1 / (alpha * tau), 1 / tau", "1 / tau, 1 / (alpha * tau)"),
    ("equation 7", "1 / (alpha * tau), 1 / tau", "alpha / tau, 1 / tau"),
    ("equation 5", ".fill_diagonal_(-math.inf)", ""),
    ("equation 5", ".fill_diagonal_(-math.inf)", ".fill_diagonal_(0)"),
    ("equation 5", "s.logsumexp(dim=1) - s[", "s.exp().sum(dim=1).log() - s["),
    ("equation 5", "- s[torch.arange(len(f)), pair]", "- s[torch.arange(len(f)), pair] / 2"),
    ("equation 5", "kappa * (f @ f.T)", "f @ f.T"),
    ("equation 4", "n, tau, alpha)).mean()", "n, tau, alpha)).sum()"),
    ("equation 4", "f = centred_features(z, n, c)", "f = centred_features(z, n, 0 * c)"),
    ("equation 4", "f = centred_features(z, n, c)", "f = centred_features(z, n, c).detach()"),
    ("equation 8", "-logits.log_softmax(dim=1)", "-logits.softmax(dim=1).log()"),
    ("equation 8", "-logits.log_softmax(dim=1)", "logits.log_softmax(dim=1)"),
    ("equation 8", "-logits.log_softmax(dim=1)", "-logits.log_softmax(dim=0)"),
    ("equation 9", "f_gamma(z_1 - z_2), p)", "f_gamma(z_2 - z_1), p)"),
    ("equation 9", "f_gamma(z_1 - z_2), p)", "f_gamma(z_1 - z_2).detach(), p)"),
    ("PaDiM's Gaussians", "(len(x) - 1)", "len(x)"),
    ("PaDiM's Gaussians", "sigma + eps * torch.eye", "sigma + 0 * torch.eye"),
    ("PaDiM's Gaussians", "mu = x.mean(dim=0)\n", "mu = x.mean(dim=(0, 1)).expand_as(x[0])\n"),
    ("equation 13", "torch.linalg.inv(sigma), r).sqrt()", "torch.linalg.inv(sigma), r)"),
    ("equation 13", "torch.linalg.inv(sigma), r)", "sigma, r)"),
    ("equation 13", "r = x - mu\n", "r = x\n"),
    ("MedMix's paste", "out = image.clone()", "out = image"),
    ("MedMix's paste", "window += share * (patch - window)", "window += share * patch"),
    ("MedMix's paste", "window += share * (patch - window)", "window[:] = patch"),
    ("MedMix's paste", "top : top + h, left : left + w]", "left : left + h, top : top + w]"),
]


@pytest.mark.parametrize(("exercise", "line", "instead"), WRONG)
def test_a_wrong_answer_is_told_from_the_right_one(exercise, line, instead, capsys):
    answers = [m for m in BLANK.finditer(TEXT) if line in m[0]]
    places = [
        m for m in answers if f'check(results, "{exercise}"' in TEXT[m.end() :].split("%%")[0]
    ]
    assert len(places) == 1
    start, end = places[0].span()
    results = ended(TEXT[:start] + TEXT[start:end].replace(line, instead) + TEXT[end:])
    assert results[exercise].startswith("wrong: ")
    builds = {"equation 4"} if exercise in ("equation 5", "equation 6", "equation 7") else set()
    assert {k for k, end in results.items() if end != "right"} - builds == {exercise}


def test_each_exercise_has_a_wrong_answer():
    assert {exercise for exercise, *_ in WRONG} == set(EXERCISES)


@pytest.mark.parametrize("text", ["    # BLANK: x\n    y\n", "    # END\n"])
def test_a_blank_has_two_ends(text):
    with pytest.raises(ValueError, match="without both"):
        students_version(text)


def test_a_hint_stands_in_the_answers_place():
    text = students_version("def f():\n    # BLANK: add\n    return 1 + 1\n    # END\n")
    assert text == "def f():\n    # Hint: add\n    raise NotImplementedError\n"
    left = re.findall(r"^ +# (?:BLANK|END)", BLANKS, re.MULTILINE)
    assert not left and BLANKS.count("# Hint: ") == NUMBER
