"""The tags in the code, the README's equation map and its table of readings agree; names stand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {path: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]}
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| `\[P:\((\d+)\)\]` \| .* \| `([\w.]+)` \| `(\w+)` \|$", re.MULTILINE)
MAP = ROW.findall(README)


def tagged() -> set[str]:
    """Numbers of the paper's equations that the code claims to compute."""
    tags = [tag for text in SOURCES.values() for tag in re.findall(r"\[(P[:!][^\]]*)\]", text)]
    return {number for tag in tags for number in re.findall(r"P[:!]\((\d+)\)", tag)}


def test_the_map_has_a_row_for_each_tagged_equation_and_no_other():
    assert tagged() == {number for number, _, _ in MAP} and len(MAP) >= 10


@pytest.mark.parametrize(("number", "function", "test"), MAP)
def test_a_row_names_a_tagged_function_and_a_test(number, function, test):
    module, name = function.rsplit(".", 1)
    owner = importlib.import_module(module)
    documented = getattr(owner, name)
    text = (owner.__doc__ or "") + (documented.__doc__ or "") + SOURCES[Path(str(owner.__file__))]
    assert re.search(rf"P[:!]\({number}\)", text), f"{function} is not tagged ({number})"
    assert re.search(rf"^def {test}\(", TESTS, re.MULTILINE), f"no test named {test}"


def test_each_reading_that_the_code_cites_has_its_row_and_each_row_is_cited():
    rows = set(re.findall(r"^\| (R\d+) \|", README, re.MULTILINE))
    cited = {r for text in SOURCES.values() for tag in re.findall(r"\[(P[:!][^\]]*)\]", text)
             for r in re.findall(r"R\d+", tag)}  # fmt: skip
    assert rows == cited


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "pmsacl": "class_centres multi_centring_loss contrastive_loss augmentation_loss "
        "position_loss",
        "medmix": "weak medmix rotation permutation cutout gaussian_noise cutmix",
        "encoder": "ResNet18",
        "detectors": "PaDiM IGD ms_ssim",
        "eval": "auroc aupro iou dice youden_threshold confusion",
        "kernels.contrastive": "contrastive",
        "kernels.mahalanobis": "mahalanobis",
    }.items(),
)
def test_the_names_that_others_rely_on_stand(module, names):
    owner = importlib.import_module(module)
    assert all(callable(getattr(owner, name)) for name in names.split())
