"""The compared detectors as detectors: shapes, files, resuming, refusals, and the main job."""

from __future__ import annotations

import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, generator, mvtec
from torch import nn

import eval as evaluation
from baselines.steps import Detector, Training, convolutions, deconvolutions, frozen, stages
from encoder import BasicBlock, ResNet18, normalise, seeded
from support import job
from support.compared import COMPARED, NAMES, chosen, fit
from support.training import train


class Small(nn.Module):
    """A ResNet of few channels with torchvision's names.

    With 8, oneDNN in torch 2.13 corrupts memory in the gradient of a strided 1 x 1 convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2 = BasicBlock(16, 16, 1), BasicBlock(16, 16, 2)
        self.layer3, self.layer4 = BasicBlock(16, 16, 2), BasicBlock(16, 16, 2)
        self.fc = nn.Linear(16, 10)


def images(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth uint8 images (N, 3, S, S) of one family."""
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.2 + 0.5 * torch.rand(n, 3, 4, 4, generator=gen)
    return (255 * nn.functional.interpolate(coarse, size=size, mode="bilinear")).byte().numpy()


def small(name: str, *, device: torch.device = DEVICE, **settings) -> Detector:
    kind = COMPARED[name]
    settings = {"image_size": 32, "batch_size": 4, "epochs": 2, "width": 2} | settings
    if name == "fanogan":
        settings = {"encoder_epochs": 1, "critic_steps": 2} | settings
    return kind(Small().to(device) if kind.pretrained else device, **settings)


def run(training, stop: float = math.inf):
    """Take the steps that are left, or those before step `stop`."""
    while training.step_done < min(training.total, stop):
        training.update(training.losses())
    return training


def tensors(detector: Detector) -> list[torch.Tensor]:
    return [*detector.networks.state_dict().values(), *detector.fitted.values()]


def same(a: Detector, b: Detector) -> bool:
    assert tensors(a) and len(tensors(a)) == len(tensors(b))
    return all(torch.equal(u, v) for u, v in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("name", COMPARED)
def test_maps_and_scores_have_one_shape_at_every_size(name, size):
    detector = small(name, image_size=size, epochs=1, batch_size=2)
    x = images(2, size)
    maps, scores = detector.fit(images(2, size, seed=1)).score(x)
    assert maps.shape == (2, size, size) and scores.shape == (2,)
    assert maps.dtype == scores.dtype == torch.float32
    assert maps.isfinite().all() and scores.isfinite().all()
    assert scores.std() > 0
    alone = torch.cat([detector.score(x[i : i + 1])[1] for i in range(2)])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-5)  # no image sees another
    as_floats = detector.score(torch.from_numpy(x) / 255)[1]
    torch.testing.assert_close(as_floats, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPARED)
def test_training_lowers_the_loss_and_leaves_what_it_starts_from(name):
    slow = {"lr": 0.01, "batch_size": 8, "epochs": 20, "width": 16}
    detector = small(name, **(slow if name == "cutpaste" else {"epochs": 8}))
    before = copy.deepcopy(detector.networks.state_dict())
    training = next(iter(detector.trainings(images(8))))
    first = training.losses()
    run(training)
    after = detector.networks.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    at_rest = {"fanogan": {"encoder"}, "cutpaste": {"patch", "patch head"}}.get(name, set())
    assert moved == set(detector.networks) - at_rest
    key = {"adgan": "x", "panda": "compact", "cutpaste": "class", "fanogan": "penalty"}
    last = training.terms(*repeat(training, 0))
    assert last[key.get(name, "rec")] < first[key.get(name, "rec")]


def repeat(training: Training, step: int):
    """The images and draws of a step that was taken before."""
    seen = []
    again = copy.copy(training)
    again.step_done = step
    again.terms = lambda *arguments: seen.append(arguments) or {}
    again.losses()
    return seen[0]


@pytest.mark.parametrize("count", [2, 4, 7])
def test_cutpaste_takes_the_papers_steps_whatever_the_number_of_images(count):
    training = next(iter(small("cutpaste", epochs=0, batch_size=2).trainings(images(count))))
    assert 256 * 256 <= training.total < 256 * 256 + training.steps


@pytest.mark.parametrize("name", COMPARED)
def test_save_and_load_bit_for_bit(name, tmp_path):
    detector = small(name, epochs=1).fit(images(4))
    detector.save(tmp_path / "d.pt")
    state = torch.load(tmp_path / "d.pt", weights_only=True)
    again = type(detector).of(state, Small().to(DEVICE) if detector.pretrained else DEVICE)
    assert same(detector, again) and again.settings() == detector.settings()
    for got, want in zip(
        again.score(images(3, seed=1)), detector.score(images(3, seed=1)), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", COMPARED)
def test_a_stopped_training_ends_with_the_same_weights(name, tmp_path):
    x = images(9)
    whole, stopped, resumed = (small(name) for _ in range(3))
    for training in whole.trainings(x):
        train(training, tmp_path / "whole.pt", tmp_path / "whole.csv")
        (tmp_path / "whole.pt").unlink()
    trainings = stopped.trainings(x)
    first = run(next(trainings), 3)
    torch.save(first.state_dict(), tmp_path / "c.pt")
    for i, training in enumerate(resumed.trainings(x)):
        if i == 0:
            training.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
            assert training.step_done == 3 and training.rate == first.rate
        run(training)
    assert same(whole, resumed) and not same(whole, small(name, seed=1).fit(x))


@pytest.mark.parametrize("name", ["fanogan", "cutpaste"])
def test_a_second_training_that_stopped_goes_on_too(name, tmp_path):
    x = images(9)
    whole, stopped, resumed = (small(name) for _ in range(3))
    for training in whole.trainings(x):
        run(training)
    for training in stopped.trainings(x):
        first = training.name == name
        run(training, math.inf if first else 1)
        torch.save(training.state_dict(), tmp_path / f"{training.name}.pt")
        if not first:
            break
    for training in resumed.trainings(x):
        state = torch.load(tmp_path / f"{training.name}.pt", weights_only=True)
        training.load_state_dict(state)
        assert training.step_done == (training.total if training.name == name else 1)
        run(training)
    assert same(whole, resumed)


@pytest.mark.parametrize("name", COMPARED)
def test_half_of_the_bits_give_nearly_the_same_losses_and_scores(name, monkeypatch):
    """As on a GPU, with the autocast of a CPU."""
    trainings = []
    for half in (False, True):
        if half:
            module = sys.modules[COMPARED[name].__module__]
            monkeypatch.setattr(module, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
        detector = small(name, epochs=1)
        training = next(iter(detector.trainings(images(4))))
        trainings.append((training.losses(), training, detector))
    (one, *_), (other, training, detector) = trainings
    assert one.keys() == other.keys()
    for term in one:
        assert other[term].dtype == torch.float32
        torch.testing.assert_close(other[term], one[term], rtol=0.05, atol=0.02)
    assert any(not torch.equal(one[term], other[term]) for term in one)
    training.update(other)
    assert all(v.dtype != torch.bfloat16 for v in detector.networks.state_dict().values())
    maps, scores = detector.fit(images(4)).score(images(2, seed=1))
    assert maps.dtype == scores.dtype == torch.float32 and maps.isfinite().all()
    if hasattr(detector, "reconstruct"):
        with torch.no_grad():
            shown = detector.reconstruct(torch.from_numpy(images(2)) / 255)
        assert shown.dtype == torch.float32  # NumPy, for the figure, has no bfloat16


@pytest.mark.parametrize("name", COMPARED)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_kept(name, tmp_path, monkeypatch):
    detector = small(name)
    training = next(iter(detector.trainings(images(8))))
    terms = training.terms
    training.terms = lambda x, draws, step: terms(x * (math.nan if step == 2 else 1), draws, step)
    with pytest.raises(FloatingPointError, match=f"lower --detector-lr .{training.start_rate:g}."):
        train(training, tmp_path / "c.pt", tmp_path / "log.csv", save_every=0.0)
    kept = torch.load(tmp_path / "c.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(v.isfinite().all() for v in kept["networks"].values())
    infinite = {"loss": torch.tensor(math.inf)}
    monkeypatch.setattr(type(training), "losses", lambda self: infinite)
    with pytest.raises(FloatingPointError, match="step 0"):
        small(name).fit(images(8))


def test_a_checkpoint_of_other_settings_is_refused():
    training = next(iter(small("dae").trainings(images(8))))
    other = next(iter(small("dae", lr=0.5, denoise=0.1).trainings(images(9))))
    with pytest.raises(ValueError, match="another lr, denoise, images"):
        other.load_state_dict(training.state_dict())


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"image_size": 48}, "multiple of 32"), ({"lr": 0.0}, "lr=0.0"), ({"epochs": 0}, "epochs=0"),
     ({"lr": math.nan}, "lr=nan"), ({"latent": -1}, "latent=-1")],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        small("ocgan", **settings)


def test_wrong_images_starts_and_orders_are_refused(tmp_path):
    for name in ("dae", "panda"):
        detector = small(name)
        with pytest.raises(ValueError, match="fitted or loaded"):
            detector.score(images(1))
        with pytest.raises(ValueError, match="fitted before"):
            detector.save(tmp_path / "x.pt")
        with pytest.raises(ValueError, match="N >= 2"):
            detector.fit(images(1))
        with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\), got \(2, 3, 64, 64\)"):
            detector.fit(images(2, 64))
    with pytest.raises(ValueError, match="panda cannot start from str"):
        COMPARED["panda"]("cpu")
    with pytest.raises(ValueError, match="dae cannot start from Small"):
        COMPARED["dae"](Small())


def test_start_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    a, state = small("ocgan"), torch.get_rng_state()
    torch.manual_seed(6)
    assert same(a, small("ocgan")) and not same(a, small("ocgan", seed=1))
    torch.manual_seed(5)
    small("ocgan")
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's draws are left alone


@pytest.mark.parametrize("size", [32, 64, 96, 256])
def test_the_convolutions_and_their_mirror_fit_every_size(size):
    z = convolutions(size, 2, 5)(torch.rand(2, 3, size, size, generator=generator()))
    x = deconvolutions(5, size, 2)(z)
    assert z.shape == (2, 5) and x.shape == (2, 3, size, size) and 0 <= x.min() <= x.max() <= 1


def test_stages_are_those_of_our_resnet():
    resnet, x = ResNet18(seeded(0)).eval(), torch.rand(2, 3, 64, 64, generator=generator())
    for got, want in zip(stages(resnet, x), resnet.stages(normalise(x)), strict=True):
        torch.testing.assert_close(got, want)


def test_frozen_weights_get_no_gradient_but_what_is_before_them_does():
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    with frozen(second):
        y = second(first(torch.ones(1, 2)))
    y.sum().backward()
    assert second.weight.grad is None and first.weight.grad is not None
    assert second.weight.requires_grad


# --- the main job --------------------------------------------------------------------------------


def test_detector_takes_a_list_of_names():
    assert chosen("both") == ("padim", "igd") and chosen("dae,padim") == ("dae", "padim")
    assert set(NAMES) == {"padim", "igd", *COMPARED} and len(COMPARED) == 7
    assert all(name == kind.kind == kind.__name__.lower() for name, kind in COMPARED.items())


def test_the_main_job_fits_evaluates_and_resumes_them(tmp_path):
    root, folder = mvtec(tmp_path / "images", n=4), tmp_path / "run"
    arguments = (
        "--method random --init random --image-size 32 --batch-size 2 --preset quick".split()
    )
    arguments += "--detector dae,panda --detector-epochs 1 --denoise 0.1".split()
    arguments = ["--data", str(root), "--out", str(folder), *arguments]
    assert job.main(arguments) == 0
    results = json.loads((folder / "results.json").read_text())
    assert {"dae", "panda", "untrained"} <= set(results) and results["seconds"]["panda"] > 0
    for name in ("checkpoint_dae.pt", "log_dae.csv", "log_panda.csv",
                 "figures/reconstruction_dae.png", "figures/localisation_panda.png"):  # fmt: skip
        assert (folder / name).exists(), name
    first, second = folder / "detector.pt", folder / "detector_panda.pt"
    dae, panda = evaluation.load(first), evaluation.load(second)
    assert (dae.epochs, dae.denoise, dae.width) == (1, 0.1, COMPARED["dae"].quick["width"])
    assert panda.kind == "panda" and isinstance(panda.networks["resnet"], ResNet18)
    encoder = torch.load(folder / "encoder.pt", weights_only=True)  # that PANDA begins with
    assert torch.equal(panda.networks["resnet"].conv1.weight, encoder["conv1.weight"])
    _, _, loaded = evaluation.load_run(folder, "cpu")
    assert list(loaded) == ["dae", "panda"]
    first.unlink()
    assert job.main([*arguments, "--resume"]) == 0
    assert same(dae, evaluation.load(first))
    assert json.loads((folder / "results.json").read_text())["dae"] == results["dae"]
    checkpoint = torch.load(folder / "checkpoint_dae.pt", weights_only=True)
    checkpoint["settings"]["lr"] = 1.0
    torch.save(checkpoint, folder / "checkpoint_dae.pt")
    assert job.main([*arguments, "--resume"]) == 2  # one clear line


def test_a_reconstruction_is_headed_by_the_class_of_its_image(tmp_path, monkeypatch):
    seen, labels = [], np.array([True, False, False, True])
    monkeypatch.setattr(job, "reconstruction_figure", lambda *given: seen.append(given))
    monkeypatch.setattr(job, "write_all", lambda *_: None)
    detector = SimpleNamespace(device=torch.device("cpu"), reconstruct=lambda x: 1 - x)
    dataset = SimpleNamespace(labels=labels)
    shown = SimpleNamespace(train=images(2), test=images(4), dataset=dataset)
    job.draw_reconstructions("dae", detector, shown, tmp_path)
    assert seen[0][2:] == (["abnormal", "normal", "normal", "abnormal"], "dae")


def test_the_epochs_of_a_run_hold_for_both_trainings_of_fanogan_and_its_rate_for_one(tmp_path):
    given = {"preset": "quick", "image_size": 32, "seed": 3, "device": "cpu", "detector_lr": 0.002}
    detector = fit("fanogan", nn.Identity(), images(4), given | {"detector_epochs": 1}, tmp_path)
    assert (detector.epochs, detector.encoder_epochs) == (1, 1) and detector.ready
    assert (detector.seed, detector.image_size) == (3, 32)  # of the run
    assert (detector.lr, detector.encoder_lr) == (0.002, COMPARED["fanogan"].quick["encoder_lr"])


def test_a_run_takes_the_encoders_of_another(phantoms, finished, tmp_path, capsys):
    other = tmp_path / "other"
    common = ["--data", str(phantoms), "--preset", "quick", "--image-size", "32"]
    assert job.main([*common, "--out", str(other), "--encoder", str(finished)]) == 0
    said = capsys.readouterr().err
    assert f"no pre-training: encoder of {finished}" in said and "quick" not in said
    one, two = (json.loads((f / "results.json").read_text()) for f in (finished, other))
    assert one["padim"] == two["padim"] != two["untrained"]
    assert two["init"] == f"the encoder of {finished.name}"
    assert not (other / "checkpoint.pt").exists()
    assert f"no pre-training: the encoder of {finished}" in (other / "report.html").read_text()
    third = [*common, "--out", str(tmp_path / "third"), "--encoder", str(other)]
    third += ["--detector", "igd", "--local", "yes", "--image-size", "64"]
    assert job.main(third) == 2
    assert "there is no encoder_local.pt" in capsys.readouterr().err
    assert job.main([*third, "--method", "simclr", "--epochs", "3", "--jitter", "0.5"]) == 2
    assert "replaces the pre-training: leave out --method, --epochs" in capsys.readouterr().err
    (other / "encoder.pt").write_bytes(b"nothing")
    assert job.main(third) == 2
    assert "encoder.pt: no state dict of a resnet18" in capsys.readouterr().err
