"""IGD against loops in float64 from the printed formulas: eq. 10-12, heat maps, training."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import detectors
from autoencoder import AutoEncoder, Z, critic, widths
from encoder import POOLED, ResNet18
from igd import (
    IGD,
    Training,
    anomaly_likelihood,
    anomaly_score,
    critic_loss,
    fold,
    gaussian,
    interpolate,
    reconstruction_error,
    unfold,
)
from ssim import ms_ssim, residual_map, setting


class Small(nn.Module):
    """A backbone of few weights, for tests about training and not about ResNet-18."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 5, 4)
        self.bn1 = nn.BatchNorm2d(8)
        self.wide = nn.Linear(8, POOLED)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.bn1(self.conv1(x)).relu().mean(dim=(2, 3)))


def images(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth uint8 images (N, 3, S, S) of one family."""
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.2 + 0.5 * torch.rand(n, 3, 4, 4, generator=gen)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (255 * smooth).to(torch.uint8).numpy()


def small(local: bool = False, **settings) -> IGD:
    settings = {"image_size": 32, "width": 2, "batch_size": 4, "epochs": 2} | settings
    settings = {"local_epochs": settings["epochs"]} | settings
    networks = [Small(i).to(DEVICE) for i in range(1 + local)]
    return IGD(*networks, **settings)  # type: ignore[arg-type]


def weights(detector: IGD) -> list[torch.Tensor]:
    return [w for m in detector.models.values() for w in m.state_dict().values()]


def same(a: IGD, b: IGD) -> bool:
    return all(torch.equal(u, v) for u, v in zip(weights(a), weights(b), strict=True))


# --- the equations -------------------------------------------------------------------------------


def test_eq_10_mixes_reconstruction_and_likelihood():
    rec, h = torch.rand(2, 9, dtype=torch.float64)
    want = [0.3 * float(r) + 0.7 * float(p) for r, p in zip(rec, h, strict=True)]
    np.testing.assert_allclose(anomaly_score(rec, h, xi=0.3), want)


def test_eq_10_as_printed_ranks_a_far_sample_as_normal():
    """R7: h grows with the distance, so (1 - h) in the score would reward it."""
    mu, sigma2 = torch.zeros(Z), torch.tensor(4.0)
    near, far = torch.full((1, Z), 0.01), torch.full((1, Z), 3.0)
    h = anomaly_likelihood(torch.cat([near, far]), mu, sigma2)
    rec = torch.tensor([0.1, 0.1])
    printed = 0.1 * rec + 0.9 * (1 - h)
    ours = anomaly_score(rec, h, xi=0.1)
    assert printed[1] < printed[0] and ours[1] > ours[0]


@pytest.mark.parametrize("nu", [0.0, 0.4, 1.0])
def test_eq_11_agrees_with_a_loop(nu):
    x, y = torch.rand(2, 3, 3, 4, 4, dtype=torch.float64)
    m_global, m_local = torch.rand(2, 3, dtype=torch.float64)
    want = []
    for b in range(3):
        mae = (
            sum(abs(float(u - v)) for u, v in zip(x[b].flatten(), y[b].flatten(), strict=True)) / 48
        )
        m = nu * float(m_global[b]) + (1 - nu) * float(m_local[b])
        want.append(0.15 * mae + 0.85 * (1 - m))
    got = reconstruction_error(x, y, m_global, m_local, nu=nu)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    away = reconstruction_error(x, x + 1, 1.0, 1.0, nu=nu)  # |.|: errors of one sign do not cancel
    assert torch.allclose(away, reconstruction_error(x + 1, x, 1.0, 1.0, nu=nu))


def test_eq_12_and_its_gaussian_agree_with_loops():
    z = torch.randn(7, 5, dtype=torch.float64)
    mean = [sum(float(row[k]) for row in z) / 7 for k in range(5)]
    square = [sum((float(v) - m) ** 2 for v, m in zip(row, mean, strict=True)) for row in z]
    sigma2 = 0.6 * sum(square) / 7
    mu, got = gaussian(z.split(3), 0.6)
    np.testing.assert_allclose(mu, mean, rtol=1e-6)
    assert float(got) == pytest.approx(sigma2, rel=1e-6)
    h = anomaly_likelihood(z, mu.double(), got.double())
    np.testing.assert_allclose(h, [1 - math.exp(-s / sigma2) for s in square], rtol=1e-6)


@given(st.integers(1, 40), st.sampled_from([0.0, 1.0, 1e3]), st.integers(0, 2**31 - 1))
def test_the_gaussian_of_batches_is_that_of_all(n, offset, seed):
    z = offset + torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    mu, sigma2 = gaussian(z.split(7), 1.0)
    want = (z.double() - z.double().mean(dim=0)).square().sum() / n
    torch.testing.assert_close(mu.double(), z.double().mean(dim=0), rtol=1e-6, atol=1e-6)
    assert float(sigma2) == pytest.approx(max(float(want), 1e-6), rel=1e-5)


def test_h_stays_a_likelihood_when_all_z_are_equal():
    z = torch.ones(4, 3)
    h = anomaly_likelihood(torch.cat([z, z + 1]), *gaussian([z], 1.0))
    assert torch.equal(h, torch.tensor([0.0] * 4 + [1.0] * 4))


def test_interpolation_and_critic_agree_with_loops():
    """A (B,) against (B, 1) would broadcast to B x B and train the critic on all pairs."""
    z, alpha = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64) / 2
    mixed = interpolate(z, alpha)
    for i in range(5):
        for k in range(3):
            want = float(alpha[i]) * float(z[i, k]) + (1 - float(alpha[i])) * float(z[4 - i, k])
            assert float(mixed[i, k]) == pytest.approx(want)
    d_mixed, d_blend = torch.rand(2, 5, dtype=torch.float64)
    want = sum((float(d) - float(a)) ** 2 for d, a in zip(d_mixed, alpha, strict=True)) / 5
    want += sum(float(d) ** 2 for d in d_blend) / 5
    assert float(critic_loss(d_mixed, alpha, d_blend)) == pytest.approx(want)


# --- networks, patches, heat maps ----------------------------------------------------------------


@pytest.mark.parametrize(("size", "blocks"), [(32, 3), (64, 4), (128, 5), (256, 6), (96, 4)])
def test_decoder_and_critic_follow_the_image_size(size, blocks):
    side, channels = widths(size, 4)
    assert len(channels) == blocks + 1 and side << blocks == size and max(channels) <= 32
    gen = torch.Generator().manual_seed(0)
    model = AutoEncoder(Small(), size, 1, gen)  # type: ignore[arg-type]
    y = model.decode(torch.randn(2, Z, generator=gen))
    assert y.shape == (2, 3, size, size) and 0 <= y.min() and y.max() <= 1
    d = critic(size, 1, gen)(y)
    assert d.shape == (2,) and d.isfinite().all()


@given(st.sampled_from([8, 16, 32]), st.integers(0, 4), st.integers(1, 3))
def test_folding_patches_back_gives_the_image(stride, more, b):
    size = 32 + stride * more
    x = torch.rand(b, 1, size, size, generator=torch.Generator().manual_seed(size))
    patches = unfold(x, stride)
    assert patches.shape == (b * (more + 1) ** 2, 1, 32, 32)
    torch.testing.assert_close(fold(patches.view(b, -1, 32, 32), size, stride), x[:, 0])


def test_folded_values_are_the_mean_of_the_patches_over_each_pixel():
    values = torch.rand(1, 9, 1, 1)
    got = fold(values, 64, 16)[0]
    for i, j in ((0, 0), (0, 20), (17, 40), (33, 33), (63, 63), (16, 15)):
        over = [
            float(values[0, 3 * r + c])
            for r in range(3)
            for c in range(3)
            if 16 * r <= i < 16 * r + 32 and 16 * c <= j < 16 * c + 32
        ]
        assert float(got[i, j]) == pytest.approx(sum(over) / len(over))


@pytest.mark.parametrize("heat_map", ["patch", "residual"])
@pytest.mark.parametrize("local", [True, False])
def test_scores_and_heat_maps_agree_with_a_loop_over_patches(local, heat_map):
    """Image score: mean of the global score and the worst patch; map: mean of both models'."""
    detector = small(local, image_size=64, heat_map=heat_map)
    x = torch.from_numpy(images(2, 64)).float().to(DEVICE) / 255
    gen = torch.Generator().manual_seed(0)
    for model in detector.models.values():
        model.mu.copy_(0.1 * torch.randn(Z, generator=gen))
        model.sigma2.fill_(3.0)
    maps, scores = detector.score(x)
    for b in range(2):
        parts, worst = [], []
        for name, model in detector.models.items():
            with torch.no_grad():
                z = model.encode(x[b : b + 1])
                y = model.decode(z) if name == "global" else None
            total, count, patch_scores = torch.zeros(64, 64), torch.zeros(64, 64), []
            for i in range(0, 33, 16):
                for j in range(0, 33, 16):
                    p = x[b : b + 1, :, i : i + 32, j : j + 32]
                    with torch.no_grad():
                        z_p = z if y is not None else model.encode(p)
                        q = y[:, :, i : i + 32, j : j + 32] if y is not None else model.decode(z_p)
                    h = 1 - math.exp(-float((z_p - model.mu).square().sum()) / 3)
                    m = float(ms_ssim(p, q, **setting(32)))
                    rec = 0.15 * float((p - q).abs().mean()) + 0.85 * (1 - m)
                    patch_scores.append(0.9 * rec + 0.1 * h)
                    value: Any = patch_scores[-1]
                    if heat_map == "residual":
                        value = residual_map(p, q, **setting(32), rho=0.15)[0].cpu()
                    total[i : i + 32, j : j + 32] += value
                    count[i : i + 32, j : j + 32] += 1
            parts.append(total / count)
            if y is not None:
                m = float(ms_ssim(x[b : b + 1], y, **setting(64)))
                rec = 0.15 * float((x[b : b + 1] - y).abs().mean()) + 0.85 * (1 - m)
                worst.append(0.1 * rec + 0.9 * h)
                if heat_map == "residual":
                    parts[-1] = residual_map(x[b : b + 1], y, **setting(64), rho=0.15)[0].cpu()
            else:
                worst.append(max(patch_scores))
        assert float(scores[b]) == pytest.approx(sum(worst) / len(worst), rel=1e-5)
        torch.testing.assert_close(maps[b].cpu(), sum(parts) / len(parts), rtol=1e-5, atol=1e-6)


# --- training ------------------------------------------------------------------------------------


def test_training_learns_the_normal_images_and_fine_tunes_a_copy():
    network, train = Small().to(DEVICE), images(16)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    settings = {"width": 4, "batch_size": 8, "epochs": 12, "lr": 3e-3, "warmup": 0.5}
    detector = IGD(network, image_size=32, **settings).fit(train)  # type: ignore[arg-type]
    log = detector.log["global"]
    assert [row["epoch"] for row in log] == list(range(1, 13))
    assert log[-1]["rec"] < 0.9 * log[0]["rec"]
    assert log[0]["lr"] > log[-1]["lr"] > 0
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    model = detector.models["global"]
    assert not torch.equal(model.backbone.conv1.weight, network.conv1.weight)
    # the encoder's batch norm learned before eq. 12 joined, the decoder's all the time
    assert model.backbone.bn1.num_batches_tracked == 12 and not model.training
    assert model.decoder[-4].num_batches_tracked == 24
    Training(detector, "global", train, None).estimate()
    with torch.no_grad():
        z = model.encode(torch.from_numpy(train).float().to(DEVICE) / 255)
    mu, sigma2 = gaussian([z], detector.kappa)
    torch.testing.assert_close(model.mu, mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.sigma2, sigma2.clamp(min=1.0), rtol=1e-4, atol=1e-5)
    assert detector.reconstruct(train[:2]).shape == (2, 3, 32, 32)


def test_the_encoder_has_a_learning_rate_of_its_own():
    start = small().models["global"]
    model = small(encoder_lr=1e-12, lr=1e-2).fit(images(8)).models["global"]
    torch.testing.assert_close(model.backbone.conv1.weight, start.backbone.conv1.weight)
    for part, untrained in ((model.linear, start.linear), (model.decoder[0], start.decoder[0])):
        assert (part.weight - untrained.weight).abs().median() > 1e-3


def test_a_small_sigma_does_not_saturate_the_gaussian():
    """Without a least sigma^2 the collapsing z would leave h at 1, and its gradient at 0."""
    z = 1e-3 * torch.randn(4, Z, generator=torch.Generator().manual_seed(0))
    drifted = (z + 0.02).requires_grad_()
    sigma2 = {}
    for least in (0.0, 1.0):
        training = Training(small(sigma2_least=least), "global", images(4), None)
        training.model.encode = lambda x: z[: len(x)]  # type: ignore[method-assign]
        training.estimate()
        sigma2[least] = training.model.sigma2
        drifted.grad = None
        anomaly_likelihood(drifted, training.model.mu, sigma2[least]).sum().backward()
        assert drifted.grad is not None
        assert (drifted.grad.abs().max() < 1e-6) == (least == 0)
    assert sigma2[0.0] < 1e-3 and sigma2[1.0] == 1


def test_estimates_come_every_interval_from_where_eq_12_joins_on(monkeypatch):
    when = []

    def estimate(training):
        when.append(training.step_done)
        training.model.sigma2.fill_(1.0)

    monkeypatch.setattr(Training, "estimate", estimate)
    small(epochs=5, interval=2).fit(images(8))
    assert when == [0, 4, 8]
    when.clear()
    small(epochs=5, interval=2, warmup=0.6).fit(images(8))  # from where eq. 12 joins the loss on
    assert when == [0, 6]
    when.clear()
    small(epochs=5, interval=2, warmup=1.0).fit(images(8))  # and at the end if it never did
    assert when == [0, 10]


def test_eq_12_joins_the_loss_when_its_warm_up_is_over(monkeypatch):
    def fitted(warmup: float) -> IGD:
        return small(epochs=4, warmup=warmup, sigma2_least=100.0).fit(images(8))

    shares = 1.0, 0.5, 0.0
    never, half, always = map(fitted, shares)
    assert all(row["h"] > 0 for row in never.log["global"])  # watched all the same
    monkeypatch.setattr("igd.anomaly_likelihood", lambda z, mu, sigma2: 0 * z.sum(dim=1))
    never_without, half_without, always_without = map(fitted, shares)
    assert same(never, never_without)
    assert not same(half, half_without) and not same(always, always_without)


@pytest.mark.parametrize("name", ["global", "local"])
def test_every_image_or_patch_is_seen_once_an_epoch(name):
    train = images(3, 64)
    training = Training(small(True, image_size=64, patches=9, batch_size=3), name, train, None)
    assert training.steps == (1 if name == "global" else 3)
    seen = [training.take(part) for part in training.order(0).reshape(training.steps, -1)]
    want = torch.from_numpy(train).float() / 255
    want = want if name == "global" else unfold(want, 16)
    rows = [sorted(map(tuple, t.flatten(1).tolist())) for t in (torch.cat(seen).cpu(), want)]
    assert rows[0] == rows[1]
    assert not np.array_equal(training.order(0), training.order(1)) or name == "global"


class Stop(Exception):
    """What kills a run in these tests."""


def stopping(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    step = Training.step

    def stops(self, epoch, position):
        if self.name == name and self.step_done == at:
            raise Stop
        return step(self, epoch, position)

    monkeypatch.setattr(Training, "step", stops)


RESUMED: dict[str, Any] = {
    "image_size": 64,
    "batch_size": 2,
    "patches": 18,
    "interval": 1,
    "local": True,
}


@pytest.fixture(scope="module")
def unbroken() -> IGD:
    """Two epochs of two steps, of both models."""
    return small(**RESUMED).fit(images(4, 64))


@pytest.mark.parametrize(("name", "at"), [("global", 1), ("global", 2), ("local", 0), ("local", 3)])
def test_a_stopped_fit_goes_on_bit_for_bit(tmp_path, monkeypatch, unbroken, name, at):
    """In the middle of an epoch, where an estimate is due, between the models, in the second."""
    train, path = images(4, 64), tmp_path / "igd.pt"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(patch, name, at)
        small(**RESUMED).fit(train, checkpoint=path, save_every=0)
    again = small(**RESUMED).fit(train, checkpoint=path, save_every=0)
    assert same(unbroken, again)
    keys = ("epoch", "rec", "h", "critic", "judge")
    for model in ("global", "local"):
        rows = [[[row[k] for k in keys] for row in d.log[model]] for d in (unbroken, again)]
        assert rows[0] == rows[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["igd.pt", "igd_local.pt"]
    if (name, at) == ("local", 3):
        monkeypatch.delattr(Training, "step")  # nothing is left to do
        assert same(unbroken, small(**RESUMED).fit(train, checkpoint=path))


def test_the_same_seed_gives_the_same_detector():
    train = images(6)
    first, second, third = (small(seed=seed, epochs=1).fit(train) for seed in (1, 1, 2))
    assert same(first, second) and not same(first, third)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    train, path = images(8), tmp_path / "igd.pt"
    terms = IGD.loss_terms

    def diverges(self, name, judge, x, alpha):
        losses, *rest = terms(self, name, judge, x, alpha)
        called.append(name)
        return (losses | {"h": losses["h"] * (math.nan if len(called) == 3 else 1)}, *rest)

    called: list[str] = []
    monkeypatch.setattr(IGD, "loss_terms", diverges)
    with pytest.raises(
        FloatingPointError, match=r"epoch 2, step 1 .*h nan.*kept in .*igd\.pt"
    ) as e:
        small().fit(train, checkpoint=path, save_every=0)
    assert "\n" not in str(e.value)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    called.clear()
    with pytest.raises(FloatingPointError, match="No state was saved yet"):
        small().fit(train)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path, monkeypatch):
    path, saved = tmp_path / "igd.pt", Training.save

    def spoil(self, path):
        if self.step_done == 2:
            with torch.no_grad():
                self.model.linear.bias[0] = math.inf
        saved(self, path)

    monkeypatch.setattr(Training, "save", spoil)
    with pytest.raises(FloatingPointError, match="weight is not finite after step 2"):
        small().fit(images(8), checkpoint=path, save_every=0)
    assert torch.load(path, weights_only=True)["step"] == 1


def test_checkpoints_are_as_rare_as_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Training, "save", lambda self, path: saved.append(self.step_done))
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    small(epochs=4).fit(images(8), checkpoint=tmp_path / "igd.pt", save_every=100.0)
    assert saved[-1] == 8 and 1 < len(saved) < 6


# --- files and mistakes --------------------------------------------------------------------------


def test_a_saved_detector_scores_bit_for_bit_the_same(tmp_path):
    networks = [ResNet18(torch.Generator().manual_seed(i)).to(DEVICE) for i in range(2)]
    detector = IGD(*networks, image_size=64, width=2, xi_local=0.7)
    with pytest.raises(ValueError, match="fitted"):
        detector.score(images(1, 64))
    for i, model in enumerate(detector.models.values()):
        model.mu.fill_(0.01)
        model.sigma2.fill_(2.0 + i)
    detector.save(tmp_path / "igd.pt")
    test = images(2, 64, seed=1)
    loaded = detectors.load(str(tmp_path / "igd.pt"), DEVICE)
    assert isinstance(loaded, IGD) and loaded.settings() == detector.settings()
    for a, b in zip(loaded.score(test), detector.score(test), strict=True):
        assert torch.equal(a, b)
    del detector.models["local"]
    detector.save(tmp_path / "global.pt")
    assert list(IGD.load(tmp_path / "global.pt", DEVICE).models) == ["global"]
    with pytest.raises(ValueError, match="kind 'igd', not 'padim'"):
        detectors.PaDiM.load(tmp_path / "igd.pt")


def test_user_mistakes_are_named(tmp_path):
    for wrong in (
        {"image_size": 16},
        {"image_size": 40},
        {"heat_map": "colour"},
        {"rho": 1.5},
        {"kappa": 0.0},
        {"lr": math.nan},
        {"warmup": 1.5},
        {"sigma2_least": -1.0},
        {"epochs": 0},
        {"batch_size": 1},
    ):
        with pytest.raises(ValueError, match="got"):
            small(**wrong)
    with pytest.raises(ValueError, match="image_size >= 64, got 32"):
        small(True)
    with pytest.raises(ValueError, match="N=1"):
        small().fit(images(1))
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\)"):
        small().fit(images(4, 64))
    small(epochs=1).fit(images(4), checkpoint=tmp_path / "igd.pt")
    with pytest.raises(ValueError, match="another lr, images"):
        small(epochs=1, lr=1.0).fit(images(5), checkpoint=tmp_path / "igd.pt")
