"""healthy.py: which images are held out, and what is measured on them and stored."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import example, given
from hypothesis import strategies as st

import eval as evaluation
from baselines.dae import DAE
from detectors import PaDiM
from encoder import ResNet18
from support import healthy, job, phantom

TINY = "--epochs 1 --batch-size 4 --classes 2 --image-size 32 --preset quick --init random".split()


@given(st.integers(0, 400), st.sampled_from([0.0, 0.05, 0.1, 0.5]))
@example(19, 0.1)
@example(20, 0.1)
def test_a_tenth_or_ten_are_kept_out_and_the_others_train(n, share):
    files = [f"{i}.png" for i in range(n)]
    fit, kept = healthy.split(files, share)
    assert sorted([*fit, *kept]) == sorted(files) and fit == [f for f in files if f not in kept]
    if share == 0 or n < 20:
        assert kept == []
    else:
        assert len(kept) == max(10, round(share * n))
        assert (kept[0], kept[-1]) == (files[0], files[-1])
        gaps = np.diff([int(f[:-4]) for f in kept])
        assert gaps.max() - gaps.min() <= 1  # evenly spread


class Ramp:
    """Scores 0, 1, 2, ...; maps of two values."""

    def score(self, images):
        s = torch.as_tensor(images[:, 0, 0, 0].astype(np.float32))
        maps = torch.zeros(len(s), 8, 8)
        maps[:, 0, 0] = s
        return maps, s


def test_threshold_percentiles_and_scale():
    images = np.zeros((21, 3, 8, 8), np.uint8)
    images[:, 0, 0, 0] = np.random.default_rng(0).permutation(21)
    of_ramp = healthy.measure(Ramp(), images, "ramp")
    assert of_ramp.scores.tolist() == list(range(21)) and of_ramp.threshold == 19
    assert of_ramp.percentile([-1, 0, 0.5, 10, 99]) == pytest.approx(
        [0, 0, 100 / 21, 1000 / 21, 100]
    )
    assert of_ramp.scale == (0.0, 38.0)  # the middle is 19
    assert healthy.measure(Ramp(), images[:0], "ramp") is None
    for level in (0.0, 1e12):
        flat = torch.full((len(images), 8, 8), level), torch.zeros(len(images))
        fixed = SimpleNamespace(score=lambda x, flat=flat: tuple(v[: len(x)] for v in flat))
        low, high = healthy.measure(fixed, images, "flat").scale
        assert low < high  # or its file would count as damaged
    state = healthy.to_state(of_ramp)
    on_gpu = mock.Mock(cpu=lambda: state["scores"], numpy=mock.Mock(side_effect=TypeError))
    again = healthy.of_state(state | {"scores": on_gpu})
    assert (again.scores == of_ramp.scores).all() and again.scale == of_ramp.scale


def test_a_saved_detector_is_read_with_its_healthy_scores_onto_the_device(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), np.uint8)
    padim = PaDiM(ResNet18(), channels=8).fit(images[:12])
    job.with_healthy(padim, SimpleNamespace(healthy=images[12:]), "padim", tmp_path / "padim.pt")
    again = evaluation.load(tmp_path / "padim.pt", DEVICE)
    assert again.device.type == DEVICE.type
    assert (again.healthy.scores == padim.healthy.scores).all() and len(again.healthy.scores) == 12


BROKEN = [
    3, [], {}, {"scores": torch.arange(3.0)}, {"scores": "x", "threshold": 1.0, "scale": None},
    {"scores": torch.tensor([2.0, 1.0]), "threshold": 1.0, "scale": None},
    {"scores": torch.zeros(0), "threshold": 1.0, "scale": None},
    {"scores": torch.zeros(2, 2), "threshold": 1.0, "scale": None},
    {"scores": torch.zeros(2), "threshold": None, "scale": None},
    {"scores": torch.zeros(2), "threshold": float("nan"), "scale": None},
    {"scores": torch.zeros(2), "threshold": 1.0, "scale": [1.0]},
    {"scores": torch.zeros(2), "threshold": 1.0, "scale": [1.0, 1.0]},
    {"scores": torch.tensor([0.0, float("inf")]), "threshold": 1.0, "scale": [0.0, 1.0]},
]  # fmt: skip


def test_damaged_scores_in_a_detectors_file_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 3, 32, 32), np.uint8)
    DAE("cpu", image_size=32, width=2, epochs=1).fit(images).save(tmp_path / "d.pt")
    whole = torch.load(tmp_path / "d.pt", weights_only=True)
    assert evaluation.load(tmp_path / "d.pt").healthy is None
    for state in BROKEN:
        torch.save(whole | {"healthy": state}, tmp_path / "d.pt")
        with pytest.raises(ValueError, match="d.pt: .*(damaged|not finite)"):
            evaluation.load(tmp_path / "d.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on healthy images alone, and the same without keeping any out."""
    root = tmp_path_factory.mktemp("healthy")
    phantom.draw(root / "data", train=24, good=2, abnormal=2, size=32)
    images = root / "data/train/good"
    for name, more in (("kept", []), ("all", ["--healthy-share", "0", "--method", "random"])):
        arguments = ["--data", str(images), "--out", str(root / name), *TINY, *more]
        assert job.main([*arguments, "--detector", "padim,dae", "--detector-epochs", "1"]) == 0
    return root


def test_what_is_kept_out_is_stored_with_each_detector(runs, capsys):
    results = json.loads((runs / "kept/results.json").read_text())
    assert {"padim", "dae", "f_beta"} == results["healthy"].keys()
    assert "padim" not in results  # without test images nothing is measured
    for file, name in (("detector", "padim"), ("detector_dae", "dae")):
        loaded = evaluation.load(runs / f"kept/{file}.pt")
        assert len(loaded.healthy.scores) == 10 == results["healthy"][name]["images"]
        assert results["healthy"][name]["threshold"] == loaded.healthy.threshold
        assert evaluation.load(runs / f"all/{file}.pt").healthy is None
    assert json.loads((runs / "all/results.json").read_text())["healthy"] == {}
    fit, kept = healthy.split(sorted((runs / "data/train/good").iterdir()), 0.1)
    assert evaluation.main([str(runs / "kept"), "--score", *map(str, kept), "--json"]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    own = evaluation.load(runs / "kept/detector.pt").healthy.scores
    got = sorted(item["detectors"]["padim"]["score"] for item in scored)
    assert np.allclose(got, own, rtol=1e-4)  # they trained nothing: the scores that are stored
    verdicts = [item["detectors"]["padim"]["verdict"] for item in scored]
    assert verdicts.count("abnormal") == 1


def test_the_summary_measures_the_test_images_alone():
    labels = np.array([0, 0, 0, 1, 1, 1], bool)
    test = np.array([1, 1, 0, 1, 1, 0], bool)
    detector = Ramp()
    detector.healthy = healthy.Healthy(np.arange(3.0), 2.0, None)
    scores = {"ramp": np.array([1.0, 3.0, 9.0, 2.0, 4.0, 0.0])}
    row = healthy.summary({"ramp": detector}, scores, labels, test)["ramp"]
    assert (row["specificity"], row["sensitivity"], row["accuracy"]) == (0.5, 1.0, 0.75)


def test_the_scale_begins_at_the_median_of_a_grid_and_its_middle_sees_every_pixel():
    maps = np.random.default_rng(0).random((30, 48, 48), np.float32)

    class Fixed:
        def score(self, images):
            which = images[:, 0, 0, 0]
            return torch.from_numpy(maps[which]), torch.from_numpy(which).float()

    images = np.arange(30, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    low, high = healthy.measure(Fixed(), images, "fixed").scale
    assert low == pytest.approx(np.median(maps[:, ::3, ::3]))  # GRID x GRID of them
    middle = np.quantile(maps.max(axis=(1, 2)), 0.95)
    assert high == pytest.approx(low + 2 * (middle - low))


def test_the_threshold_lies_between_two_scores():
    images = np.zeros((30, 3, 8, 8), np.uint8)
    images[:, 0, 0, 0] = np.arange(30)
    assert healthy.measure(Ramp(), images, "ramp").threshold == pytest.approx(0.95 * 29)


def test_what_the_healthy_threshold_gives_is_named_rightly():
    row = {"images": 4, "threshold": 0.5, "sensitivity": 0.25, "specificity": 0.75}
    assert healthy.described("padim", row).endswith("sensitivity 0.250 and specificity 0.750.")
