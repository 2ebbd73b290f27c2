"""What every test shares: the Triton interpreter without a GPU, determinism, hypothesis profile.

It runs before any module of the project is imported, because Triton reads TRITON_INTERPRET and
OpenMP reads OMP_WAIT_POLICY once, at import. N is the number of rows of whatever is tested.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads ruin a shared machine
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from PIL import Image  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

try:
    from triton import __version__ as triton_version

    # The interpreter of Triton 3.6 cannot loop to a bound that is an argument under NumPy 2.4.
    old = triton_version.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    RUNS_TRITON = HAS_GPU or not old
except ImportError:
    RUNS_TRITON = False
BACKENDS = ["torch"] + (["triton"] if RUNS_TRITON else [])  # those a test can run here
needs_triton = pytest.mark.skipif(not RUNS_TRITON, reason="needs Triton, on a GPU or interpreted")

ROOT = Path(__file__).resolve().parent.parent

torch.backends.cudnn.allow_tf32 = False  # or convolutions differ from one another by 1e-3
# Also fills torch.empty with NaN, so that an element nobody wrote cannot look right.
torch.use_deterministic_algorithms(True, warn_only=True)

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

import pmsacl  # noqa: E402
from measures import dice  # noqa: E402
from support import job, phantom  # noqa: E402

SHIPPED_WATCHED_VIEWS = pmsacl.WATCHED_VIEWS
pmsacl.WATCHED_VIEWS = 16  # watching the pretext task takes half of a small run's time

TINY = "--epochs 2 --batch-size 4 --classes 2 --image-size 32 --preset quick --init random".split()

U32 = 2.0**-24  # half a unit in the last place of 1.0 in float32: one rounding
SIGMAS = 5  # a frequency may be off by so many standard deviations: one in two million


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device, with the reason."""
    for item in items:  # NumPy < 2.4 only warns of it
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"))
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none is visible")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A small data set, with masks. Nobody writes into it."""
    root = tmp_path_factory.mktemp("data") / "phantom"
    phantom.draw(root, train=16, good=6, abnormal=6, size=32)
    return root


@pytest.fixture(scope="session")
def finished(phantoms, tmp_path_factory) -> Path:
    """The folder of a run of the main job on them, with TINY. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert job.main(["--data", str(phantoms), "--out", str(folder), *TINY]) == 0
    return folder


def assert_within(got: torch.Tensor, want: torch.Tensor, budget: torch.Tensor | float) -> float:
    """|got - want| <= budget element by element; returns the largest fraction of the budget used.

    got:     the result under test, any dtype.
    want:    the same in float64, same shape.
    budget:  absolute, broadcastable to want; counted from roundings, not tuned.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert bool(torch.isfinite(got).all()), "the result holds NaN or infinity"
    error = (got.detach().double() - want.detach().double()).abs()
    allowed = torch.as_tensor(budget, dtype=torch.float64, device=error.device).detach()
    allowed = allowed.expand_as(error)
    used = torch.where(error == 0, torch.zeros_like(error), error / allowed)
    worst = float(used.max()) if used.numel() else 0.0
    assert worst <= 1.0, f"{worst:.2f} of the rounding budget used; worst error {error.max():.3e}"
    return worst


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=generator(seed))


def assert_frequency(hits: torch.Tensor, p: float) -> None:
    """The mean of booleans is p within SIGMAS standard deviations."""
    allowed = SIGMAS * math.sqrt(p * (1 - p) / hits.numel())
    assert abs(hits.double().mean().item() - p) <= allowed


def assert_uniform(draws: torch.Tensor, low: float, high: float) -> None:
    """Within [low, high]; mean and share of the lower quarter are those of the uniform."""
    assert low <= draws.min() and draws.max() <= high
    allowed = SIGMAS * (high - low) / math.sqrt(12 * draws.numel())
    assert abs(draws.double().mean().item() - (low + high) / 2) <= allowed
    assert_frequency(draws < low + (high - low) / 4, 0.25)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 40), **save) -> Path:
    """A smooth colour image, different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = numpy.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=numpy.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    return path


def lesion(path: Path, size: tuple[int, int] = (40, 40), value: int = 255) -> Path:
    """A mask whose left half is set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = numpy.zeros(size[::-1], numpy.uint8)
    mask[:, : size[0] // 2] = value
    Image.fromarray(mask).save(path)
    return path


def mvtec(root: Path, n: int = 3) -> Path:
    for i in range(n):
        picture(root / f"train/good/{i}.png", i)
        picture(root / f"test/good/{i}.png", 10 + i)
        picture(root / f"test/polyp/{i}.jpg", 20 + i)
        lesion(root / f"ground_truth/polyp/{i}_mask.png")
    return root


def flood_fill(mask, neighbours=8):
    """Connected regions as sets of pixels, in the order of their first pixel."""
    left = {(int(y), int(x)) for y, x in numpy.argwhere(mask)}
    regions = []
    for seed in sorted(left):
        if seed not in left:
            continue
        left.discard(seed)
        region, todo = {seed}, [seed]
        while todo:
            y, x = todo.pop()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    q = (y + dy, x + dx)
                    if q in left and (neighbours == 8 or dy * dx == 0):
                        left.discard(q)
                        region.add(q)
                        todo.append(q)
        regions.append(region)
    return regions


def mean_dice(maps, masks, index, t):
    return float(dice(maps[index] >= t, masks[index]).mean())
