"""The tags in the code, the README's equation map and the rows of docs/deviations.md agree."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from support.equations import LINE, ROOT, TAG

FOLDERS = ("", "kernels", "baselines", "support", "bench")
SOURCES = {path: path.read_text() for d in FOLDERS for path in sorted((ROOT / d).glob("*.py"))}
README = (ROOT / "README.md").read_text()
DEVIATIONS = (ROOT / "docs" / "deviations.md").read_text()
MAP = LINE.findall(README)


def tagged() -> set[str]:
    """Numbers of the paper's equations that the code claims to compute."""
    tags = [tag for text in SOURCES.values() for tag in TAG.findall(text)]
    return {number for tag in tags for number in re.findall(r"P[:!]\((\d+)\)", tag)}


def cited() -> set[str]:
    """Rows of docs/deviations.md that the code cites."""
    tags = [tag for text in SOURCES.values() for tag in TAG.findall(text)]
    return {row for tag in tags for row in re.findall(r"R\d+", tag)}


def test_the_map_has_a_line_for_each_tagged_equation_and_no_other():
    numbers = [number for _, number, *_ in MAP]
    assert numbers == [str(k) for k in range(1, 14)]  # the paper's equations, in its order
    assert set(numbers) == tagged()


@pytest.mark.parametrize(
    ("tag", "formula", "function", "file", "test", "test_file"),
    [(tag, *more) for tag, _, *more in MAP],
    ids=[m[3] for m in MAP],
)
def test_a_line_leads_to_a_tagged_function_and_to_a_test(
    tag, formula, function, file, test, test_file
):
    module, name = function.rsplit(".", 1)
    owner = getattr(importlib.import_module(module), name)
    assert owner.__module__ == module and file == module.replace(".", "/") + ".py"
    source = inspect.getsource(owner)
    assert any(tag in found for found in TAG.findall(source)), function
    tests = (ROOT / test_file).read_text()
    assert len(re.findall(rf"^def {test}\(", tests, re.MULTILINE)) == 1, f"no {test}"
    assert formula.count("{") == formula.count("}")


def test_each_row_of_the_deviations_is_cited_and_each_cited_row_stands():
    rows = re.findall(r"^\| (R\d+) \|", DEVIATIONS, re.MULTILINE)
    assert rows == [f"R{k}" for k in range(1, len(rows) + 1)]
    assert set(rows) == cited()


def test_a_row_is_cited_by_no_other_tag():
    for path, text in SOURCES.items():
        rows = re.findall(r"\[[^\]\n]*\bR\d+\b[^\]\n]*\]", text)
        assert all(re.fullmatch(r"\[P[:!][^\]]+\]", tag) for tag in rows), (path, rows)


def test_rows_that_the_docs_name_stand():
    rows = set(re.findall(r"^\| (R\d+) \|", DEVIATIONS, re.MULTILINE))
    for file in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        assert set(re.findall(r"\bR\d+\b", file.read_text())) <= rows, file


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("losses.class_centres", "encoder views"),
        ("losses.multi_centring_loss", "z n c"),
        ("losses.contrastive_loss", "z n pair c * tau alpha positive_scale"),
        ("losses.augmentation_loss", "logits n"),
        ("losses.position_loss", "logits p"),
        ("losses.patch_pairs", "x generator"),
        ("weak.weak", "x generator"),
        ("medmix.medmix", "x n generator"),
        ("baselines.strong.rotation", "x n generator"),
        ("baselines.strong.permutation", "x n generator"),
        ("baselines.strong.cutout", "x n generator"),
        ("baselines.strong.gaussian_noise", "x n generator"),
        ("baselines.strong.cutmix", "x n generator"),
        ("encoder.ResNet18", ""),
        ("detectors.PaDiM.fit", "self images"),
        ("detectors.PaDiM.score", "self images"),
        ("detectors.PaDiM.save", "self path"),
        ("igd.IGD.fit", "self images"),
        ("igd.IGD.score", "self images"),
        ("igd.IGD.save", "self path"),
        ("eval.load", "path"),
        ("ssim.ms_ssim", "x y * weights window data_range"),
        ("measures.auroc", "scores labels"),
        ("measures.aupro", "maps masks fpr_limit"),
        ("measures.iou", "pred mask"),
        ("measures.dice", "pred mask"),
        ("measures.youden_threshold", "scores labels"),
        ("measures.confusion", "scores labels threshold"),
        ("kernels.contrastive.contrastive", "z n pair c * tau alpha positive_scale backend rows"),
        ("kernels.mahalanobis.mahalanobis", "x mean whitening * backend"),
    ],
)
def test_public_functions_take_what_they_always_took(function, parameters):
    module, *names = function.rsplit(".", 2 if function.split(".")[-2][0].isupper() else 1)
    owner = importlib.import_module(module)
    for name in names:
        owner = getattr(owner, name)
    assert owner.__module__ == module  # its own, not handed on
    positional, _, named = parameters.partition("*")
    taken = inspect.signature(owner).parameters.values()
    first = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert first[: len(positional.split())] == positional.split()
    assert set(named.split()) <= {p.name for p in taken if p.kind is p.KEYWORD_ONLY}
    optional = [p.name for p in taken if p.default is p.empty and p.name not in positional.split()]
    assert not set(optional) - set(named.split()), f"{optional} must have a default"
