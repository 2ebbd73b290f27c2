"""IGD against loops in float64 from the printed formulas: eq. 10-12, heat maps, training."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, generator
from hypothesis import given
from hypothesis import strategies as st
from test_compared import images, run
from torch import Tensor, nn

import eval as evaluation
from autoencoder import AutoEncoder, Block, Z, critic, critic_loss, gaussian, interpolate, widths
from baselines import fanogan
from encoder import POOLED, ResNet18, normalise, seeded
from igd import IGD, Training, anomaly_likelihood, anomaly_score, fold, reconstruction_error, unfold
from ssim import ms_ssim, residual_map, setting


class Small(nn.Module):
    """A backbone of few weights, for tests about training and not about ResNet-18."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 5, 4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.wide = nn.Linear(8, POOLED)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.bn1(self.conv1(x)).relu().mean(dim=(2, 3)))


def small(local: bool = False, *, device: torch.device = DEVICE, **settings) -> IGD:
    settings = {"image_size": 32, "width": 2, "batch_size": 4, "epochs": 2} | settings
    settings = {"local_epochs": settings["epochs"]} | settings
    networks = [Small(i).to(device) for i in range(1 + local)]
    return IGD(*networks, **settings)  # type: ignore[arg-type]


def weights(detector: IGD) -> list[torch.Tensor]:
    return [w for m in detector.models.values() for w in m.state_dict().values()]


def same(a: IGD, b: IGD) -> bool:
    return all(torch.equal(u, v) for u, v in zip(weights(a), weights(b), strict=True))


# --- the equations -------------------------------------------------------------------------------


def test_eq_10_mixes_reconstruction_and_likelihood():
    rec, h = torch.rand(2, 9, dtype=torch.float64, generator=generator())
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
    x, y = torch.rand(2, 3, 3, 4, 4, dtype=torch.float64, generator=generator(0))
    m_global, m_local = torch.rand(2, 3, dtype=torch.float64, generator=generator(1))
    want = []
    for b in range(3):
        mae = (
            sum(abs(float(u - v)) for u, v in zip(x[b].flatten(), y[b].flatten(), strict=True)) / 48
        )
        m = nu * float(m_global[b]) + (1 - nu) * float(m_local[b])
        want.append(0.15 * mae + 0.85 * (1 - m))
    got = reconstruction_error(x, y, m_global, m_local, nu=nu)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    away = reconstruction_error(x, x + 1, m_global, m_local, nu=nu)
    back = reconstruction_error(x + 1, x, m_global, m_local, nu=nu)
    assert torch.allclose(away, back)  # |.|: errors of one sign do not cancel


def test_eq_12_and_its_gaussian_agree_with_loops():
    z = torch.randn(7, 5, dtype=torch.float64, generator=generator())
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
    z = torch.randn(5, 3, dtype=torch.float64, generator=generator(0))
    alpha = torch.rand(5, dtype=torch.float64, generator=generator(1)) / 2
    mixed = interpolate(z, alpha)
    for i in range(5):
        for k in range(3):
            want = float(alpha[i]) * float(z[i, k]) + (1 - float(alpha[i])) * float(z[4 - i, k])
            assert float(mixed[i, k]) == pytest.approx(want)
    d_mixed, d_blend = torch.rand(2, 5, dtype=torch.float64, generator=generator(2))
    want = sum((float(d) - float(a)) ** 2 for d, a in zip(d_mixed, alpha, strict=True)) / 5
    want += sum(float(d) ** 2 for d in d_blend) / 5
    assert float(critic_loss(d_mixed, alpha, d_blend)) == pytest.approx(want)
    assert float(critic_loss(d_mixed[:, None], alpha, d_blend)) == pytest.approx(want)


# --- networks, patches, heat maps ----------------------------------------------------------------


@pytest.mark.parametrize(("size", "blocks"), [(32, 3), (64, 4), (128, 5), (256, 6), (72, 3)])
def test_decoder_and_critic_follow_the_image_size(size, blocks):
    side, channels = widths(size, 4)
    assert len(channels) == blocks + 1 and side << blocks == size
    assert channels == [min(4 * 2**k, 32) for k in range(blocks + 1)]
    gen = torch.Generator().manual_seed(0)
    model = AutoEncoder(Small(), size, 1, gen)  # type: ignore[arg-type]
    y = model.decode(torch.randn(2, Z, generator=gen))
    assert y.shape == (2, 3, size, size) and 0 <= y.min() and y.max() <= 1
    d = critic(size, 1, gen)(y)
    assert d.shape == (2,) and d.isfinite().all()


def test_f_theta_sees_normalised_images_as_in_the_pre_training():
    model = AutoEncoder(Small(), 32, 1, generator()).eval()  # type: ignore[arg-type]
    x = torch.rand(2, 3, 32, 32, generator=generator(1))
    torch.testing.assert_close(model.encode(x), model.linear(model.backbone.pooled(normalise(x))))


@given(st.sampled_from([8, 16, 32]), st.integers(0, 4), st.integers(1, 3))
def test_folding_patches_back_gives_the_image(stride, more, b):
    size = 32 + stride * more
    x = torch.rand(b, 1, size, size, generator=torch.Generator().manual_seed(size))
    patches = unfold(x, stride)
    assert patches.shape == (b * (more + 1) ** 2, 1, 32, 32)
    torch.testing.assert_close(fold(patches.view(b, -1, 32, 32), size, stride), x[:, 0])


def test_folded_values_are_the_mean_of_the_patches_over_each_pixel():
    values = torch.rand(1, 9, 1, 1, generator=generator())
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
    detector = small(local, image_size=64, heat_map=heat_map, rho=0.3)
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
                    rec = 0.3 * float((p - q).abs().mean()) + 0.7 * (1 - m)
                    patch_scores.append(0.9 * rec + 0.1 * h)
                    value: Any = patch_scores[-1]
                    if heat_map == "residual":
                        value = residual_map(p, q, **setting(32), rho=0.3)[0].cpu()
                    total[i : i + 32, j : j + 32] += value
                    count[i : i + 32, j : j + 32] += 1
            parts.append(total / count)
            if y is not None:
                m = float(ms_ssim(x[b : b + 1], y, **setting(64)))
                rec = 0.3 * float((x[b : b + 1] - y).abs().mean()) + 0.7 * (1 - m)
                worst.append(0.1 * rec + 0.9 * h)
                if heat_map == "residual":
                    parts[-1] = residual_map(x[b : b + 1], y, **setting(64), rho=0.3)[0].cpu()
            else:
                worst.append(max(patch_scores))
        assert float(scores[b]) == pytest.approx(sum(worst) / len(worst), rel=1e-5)
        torch.testing.assert_close(maps[b].cpu(), sum(parts) / len(parts), rtol=1e-5, atol=1e-6)


# --- training: the steps against the page, in float64 --------------------------------------------


def page_terms(
    training: Training, model: AutoEncoder, network: nn.Module, x: Tensor, alpha: Tensor
) -> dict[str, Tensor]:
    """The terms of a step, image by image, from the printed formulas and the table of DESIGN."""
    igd, b = training.igd, len(x)
    z = model.encode(x)
    mixed = [alpha[i] * z[i] + (1 - alpha[i]) * z[b - 1 - i] for i in range(b)]
    decoded = model.decode(torch.cat([z, torch.stack(mixed)]))
    x_tilde, mixture = decoded[:b], decoded[b:]
    rec = h = fool = told = x.new_zeros(())
    blend = igd.gamma * x + (1 - igd.gamma) * x_tilde.detach()
    d_mixture, d_told, d_blend = network(mixture), network(mixture.detach()), network(blend)
    for i in range(b):
        m = ms_ssim(x[i : i + 1], x_tilde[i : i + 1], **setting(x.shape[-1]))[0]
        rec = rec + 0.15 * (x[i] - x_tilde[i]).abs().mean() + 0.85 * (1 - m)
        distance = sum((z[i, k] - model.mu[k]) ** 2 for k in range(Z))
        h = h + 1 - torch.exp(-distance / model.sigma2)
        fool = fool + igd.critic_weight * d_mixture[i] ** 2
        told = told + (d_told[i] - alpha[i]) ** 2 + d_blend[i] ** 2
    return {"rec": rec / b, "h": h / b, "critic": fool / b, "critic_loss": told / b}


def page_batch(training: Training, data: np.ndarray) -> Tensor:
    """The images or patches of the next step: of its epoch's order, those after the ones before."""
    epoch, position = divmod(training.step_done, training.steps)
    whole = torch.from_numpy(data).double() / 255
    whole = whole if training.which == "global" else unfold(whole, 16)
    order = np.random.default_rng((training.igd.seed, 23, epoch)).permutation(len(whole))
    chosen = order[position * training.images : (position + 1) * training.images]
    return whole[np.sort(chosen)]


SETTINGS: dict[str, Any] = {"epochs": 4, "warmup": 0.5, "interval": 1, "lr": 2e-4, "kappa": 0.6}
SETTINGS |= {"encoder_lr": 5e-5, "critic_weight": 0.4, "gamma": 0.3, "sigma2_least": 1e-3}
SETTINGS |= {"seed": 3}
CASES = {
    "global": (SETTINGS, images(8)),
    "local": (
        SETTINGS | {"local": True, "image_size": 64, "patches": 9, "local_epochs": 2},
        images(2, 64),
    ),
}


@pytest.fixture(params=list(CASES))
def case(request, monkeypatch) -> tuple[Training, np.ndarray]:
    """A training of either model in float64, in which no ReLU depends on rounding; on the CPU."""
    settings, data = CASES[request.param]
    trainings = small(device=torch.device("cpu"), **settings).trainings(data)
    training = next(t for t in trainings if t.which == request.param)
    training.model.double(), training.critic.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return training, data


def test_the_losses_and_their_gradients_are_those_of_the_page(case):
    """Each network gets the gradient of its own terms; eq. 12 joins when its warm-up is over."""
    training, data = case
    training.igd.sigma2_least = 3.0  # or h would be 1 in the warm-up, without a gradient to miss
    while training.step_done < training.total:
        joined = training.step_done >= training.warmup * training.steps
        model, network = copy.deepcopy(training.model), copy.deepcopy(training.critic)
        terms = training.losses()
        model.mu.copy_(training.model.mu)
        model.sigma2.copy_(training.model.sigma2)
        model.train().backbone.train(not joined)
        x = page_batch(training, data)
        draws = seeded(training.igd.seed, 22, training.step_done)
        alpha = torch.rand(len(x), generator=draws) / 2  # float32, as drawn
        want = page_terms(training, model, network, x, alpha)
        assert list(terms) == list(want) and 0.01 < want["h"] < 0.99
        for name, term in terms.items():
            wanted = want[name].item()
            assert term.dtype == torch.float64
            assert term.item() == pytest.approx(wanted, rel=1e-9), name
        loss = want["rec"] + want["critic"] + (want["h"] if joined else 0)
        pairs = [(training.model, model, loss), (training.critic, network, want["critic_loss"])]
        gradients = [torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
                     for _, net, value in pairs]  # fmt: skip
        training.update(terms)
        for (ours, _, _), of_page in zip(pairs, gradients, strict=True):
            for (name, p), g in zip(ours.named_parameters(), of_page, strict=True):
                assert p.grad is not None and g is not None and g.abs().max() > 0, name
                atol = 1e-7 * float(g.abs().max())
                torch.testing.assert_close(p.grad, g, rtol=0, atol=atol, msg=name)
    assert not training.model.training


def test_a_step_is_adam_with_a_polynomial_decay_and_a_rate_for_the_encoder(case):
    """w -= lr_t m / (sqrt(v) + 1e-8), lr_t = lr (1 - t / T)^0.9, with the bias corrections."""
    training, _ = case
    igd, model = training.igd, training.model
    groups = (
        (model.backbone, igd.encoder_lr, 1e-6),
        (model.linear, igd.lr, 1e-6),
        (model.decoder, igd.lr, 1e-6),
        (training.critic, igd.lr, 0.0),
    )
    squares: dict[nn.Parameter, Tensor] = {}
    while training.step_done < training.total:
        t, terms = training.step_done, training.losses()
        before = {p: p.detach().clone() for net, _, _ in groups for p in net.parameters()}
        decay = (1 - t / training.total) ** 0.9
        assert training.start_rate == igd.lr and training.rate == pytest.approx(igd.lr * decay)
        training.update(terms)
        for network, lr, weight_decay in groups:
            for p in network.parameters():
                assert p.grad is not None
                g = p.grad + weight_decay * before[p]
                squares[p] = 0.9 * squares.get(p, torch.zeros_like(g)) + 0.1 * g * g
                v = squares[p] / (1 - 0.9 ** (t + 1))
                step = lr * decay * g / (v.sqrt() + 1e-8)  # the first moment is g: beta is 0
                torch.testing.assert_close(p.detach(), before[p] - step, rtol=0, atol=1e-9 * lr)


def test_an_encoder_without_a_learning_rate_stays_as_it_was_and_the_rest_learns():
    igd = small(epochs=2, encoder_lr=0.0, warmup=0.5)
    model = igd.models["global"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    igd.fit(images(8))
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("backbone.")} == same - {"sigma2"}
    assert all(p.grad is None for p in model.backbone.parameters())  # nor is time spent on them


def test_mu_and_sigma_are_those_of_all_training_images_whenever_they_are_due(case):
    """At the start, when eq. 12 joins and every `interval` epochs from there on."""
    training, data = case
    whole = torch.from_numpy(data).double() / 255
    whole = whole if training.which == "global" else unfold(whole, 16)
    kept, due = None, {0, *range(training.warmup, training.epochs)}  # the interval is one epoch
    while training.step_done < training.total:
        epoch, position = divmod(training.step_done, training.steps)
        model = copy.deepcopy(training.model).eval()
        terms = training.losses()
        if position == 0 and epoch in due:
            with torch.no_grad():
                z = model.encode(whole)
            mean = [sum(float(v) for v in z[:, k]) / len(z) for k in range(Z)]
            square = sum(sum((float(v) - m) ** 2 for v, m in zip(row, mean, strict=True))
                         for row in z)  # fmt: skip
            kept = mean, max(0.6 * square / len(z), 1e-3)
        assert kept is not None
        np.testing.assert_allclose(training.model.mu, kept[0], rtol=1e-9, atol=1e-12)
        assert float(training.model.sigma2) == pytest.approx(kept[1], rel=1e-9)
        training.update(terms)


# --- training: as a whole ------------------------------------------------------------------------


def test_training_learns_the_normal_images_and_fine_tunes_a_copy():
    network, train = Small().to(DEVICE), images(16)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    settings = {"width": 4, "batch_size": 8, "epochs": 12, "lr": 3e-3, "warmup": 0.5}
    detector = IGD(network, image_size=32, **settings)  # type: ignore[arg-type]
    (training,) = detector.trainings(train)
    errors = []
    while training.step_done < training.total:
        terms = training.losses()
        errors.append(terms["rec"].item())
        training.update(terms)
    assert sum(errors[-2:]) < 0.9 * sum(errors[:2])
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    model = detector.models["global"]
    assert not torch.equal(model.backbone.conv1.weight, network.conv1.weight)
    # the encoder's batch norm learned before eq. 12 joined, the decoder's all the time
    assert model.backbone.bn1.num_batches_tracked == 12 and not model.training
    assert model.decoder[-4].num_batches_tracked == 24
    assert detector.reconstruct(train[:2]).shape == (2, 3, 32, 32)


def test_fit_trains_each_model_and_takes_its_steps_from_track():
    taken = []

    def track(steps):
        taken.append(0)
        for step in steps:
            taken[-1] += 1
            yield step

    settings = RESUMED | {"epochs": 1}
    detector = small(**settings).fit(images(4, 64), track=track)
    by_hand = small(**settings)
    for training in by_hand.trainings(torch.from_numpy(images(4, 64))):  # a tensor does as well
        run(training)
    assert taken == [2, 2] and same(detector, by_hand)


@pytest.mark.parametrize(("count", "batch", "want"), [(9, 5, 4), (3, 16, 2), (2, 2, 2), (8, 4, 4)])
def test_no_image_of_a_step_is_mixed_with_itself(count, batch, want):
    """The batch and its reverse: of an odd one the middle image would be its own partner."""
    training = next(small(False, batch_size=batch).trainings(images(count)))
    assert training.images == want and training.steps == count // want


def test_a_small_sigma_does_not_saturate_the_gaussian():
    """Without a least sigma^2 the collapsing z would leave h at 1, and its gradient at 0."""
    z = 1e-3 * torch.randn(4, Z, generator=generator())
    drifted = (z + 0.02).requires_grad_()
    sigma2 = {}
    for least in (0.0, 1.0):
        (training,) = small(sigma2_least=least).trainings(images(4))
        training.model.encode = lambda x: z[: len(x)]  # type: ignore[method-assign]
        training.estimate()
        sigma2[least] = training.model.sigma2.cpu()
        drifted.grad = None
        anomaly_likelihood(drifted, training.model.mu.cpu(), sigma2[least]).sum().backward()
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


@pytest.mark.parametrize("name", ["global", "local"])
def test_every_image_or_patch_is_seen_once_an_epoch(name):
    train = images(3, 64)
    trainings = small(True, image_size=64, patches=4, stride=32, batch_size=3).trainings(train)
    training = next(t for t in trainings if t.which == name)
    assert training.steps == (1 if name == "global" else 3)
    seen = [training.take(part) for part in training.order(0).reshape(training.steps, -1)]
    want = (torch.from_numpy(train).to(DEVICE).float() / 255).cpu()  # a GPU divides in its own way
    want = want if name == "global" else unfold(want, 32)
    rows = [sorted(map(tuple, t.flatten(1).tolist())) for t in (torch.cat(seen).cpu(), want)]
    assert rows[0] == rows[1]
    assert not np.array_equal(training.order(0), training.order(1)) or name == "global"


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


@pytest.mark.parametrize("name", ["global", "local"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_training_goes_on_bit_for_bit_from_its_state(unbroken, name, stop):
    """In the middle of an epoch, where an estimate is due, and where nothing is left to do."""
    file = io.BytesIO()
    first, second = (next(t for t in small(**RESUMED).trainings(images(4, 64)) if t.which == name)
                     for _ in range(2))  # fmt: skip
    torch.save(run(first, stop).state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, map_location=DEVICE, weights_only=True))
    assert second.step_done == stop
    run(second)
    wanted = unbroken.models[name].state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in second.model.state_dict().items())
    assert not second.model.training


def test_a_state_of_another_run_is_refused():
    (training,) = small(epochs=1).trainings(images(4))
    state = run(training).state_dict()
    (other,) = small(epochs=1, lr=1.0).trainings(images(5))
    with pytest.raises(ValueError, match="another lr, images"):
        other.load_state_dict(state)


def test_the_same_seed_gives_the_same_detector():
    train = images(6)
    first, second, third = (small(seed=seed, epochs=1).fit(train) for seed in (1, 1, 2))
    assert same(first, second) and not same(first, third)


def test_a_loss_that_is_not_finite_stops_before_a_weight_is_touched(monkeypatch):
    (good,) = small().trainings(images(8))
    run(good, 2)
    kept = copy.deepcopy(good.model.state_dict())
    calls = []

    def diverges(z, mu, sigma2):
        calls.append(len(z))
        return anomaly_likelihood(z, mu, sigma2) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr("igd.anomaly_likelihood", diverges)
    bad = small()
    with pytest.raises(FloatingPointError, match="IGD global: loss nan in step 2; lower lr"):
        bad.fit(images(8))
    assert len(calls) == 3
    for name, value in bad.models["global"].state_dict().items():
        if "running" not in name and "num_batches" not in name and name not in ("mu", "sigma2"):
            assert torch.equal(value, kept[name]), name


# --- files and mistakes --------------------------------------------------------------------------


def restored(path) -> IGD:
    detector = evaluation.load(path, DEVICE)
    assert isinstance(detector, IGD)
    return detector


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
    loaded = restored(tmp_path / "igd.pt")
    assert loaded.settings() == detector.settings()
    for a, b in zip(loaded.score(test), detector.score(test), strict=True):
        assert torch.equal(a, b)
    del detector.models["local"]
    detector.save(tmp_path / "global.pt")
    assert list(restored(tmp_path / "global.pt").models) == ["global"]


def test_user_mistakes_are_named():
    for wrong in (
        {"image_size": 16},
        {"image_size": 40},
        {"heat_map": "colour"},
        {"rho": 1.5},
        {"kappa": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"warmup": 1.5},
        {"sigma2_least": -1.0},
        {"sigma2_least": math.inf},
        {"epochs": 0},
        {"batch_size": 1},
        {"patches": 1},
        {"image_size": 72, "stride": 40},
    ):
        with pytest.raises(ValueError, match="got"):
            small(**wrong)
    with pytest.raises(ValueError, match="64 or more, got 32"):
        small(True)
    with pytest.raises(ValueError, match="N=1"):
        small().fit(images(1))
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\)"):
        small().fit(images(4, 64))


def test_the_defaults_are_the_papers_and_the_authors():
    got = {f.name: f.default for f in dataclasses.fields(IGD)}
    assert got == {
        "image_size": 256, "epochs": 256, "local_epochs": 256, "batch_size": 16, "patches": 450,
        "stride": 16, "width": 64, "lr": 1e-4, "encoder_lr": 1e-4, "rho": 0.15, "kappa": 1.0,
        "sigma2_least": 1.0, "interval": 10, "warmup": 0.0, "critic_weight": 0.1, "gamma": 0.2,
        "xi_global": 0.1, "xi_local": 0.9, "heat_map": "patch", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("kind", ["igd", "fanogan"])
def test_a_block_is_its_formula(kind, up):
    """A residual block with norm and ReLU first; the critic's looks at each sample alone."""
    torch.manual_seed(0)
    block, axes = Block(4, 6, up=up), (0, 2, 3) if up else (1, 2, 3)  # batch norm; of each sample
    if kind == "fanogan":
        block, axes = fanogan.Block(4, 6, lambda c: nn.GroupNorm(1, c), up=up), (1, 2, 3)
    x = torch.randn(3, 4, 8, 8, generator=generator())

    def normed(y):
        deviation = (y.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return ((y - y.mean(axes, keepdim=True)) / deviation).relu()

    def twice(y):
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def half(y):
        return (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4

    assert block.conv1.out_channels == (6 if up else 4) and block.conv1.bias is None
    y = twice(normed(x)) if up else normed(x)
    y = block.conv2(normed(block.conv1(y)))
    want = y + twice(block.shortcut(x)) if up else half(y) + block.shortcut(half(x))
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_start_weights_come_from_the_seed_and_differ_between_the_models():
    def starts(seed, noise):
        networks = [Small(), Small()]
        torch.manual_seed(noise)  # the caller's draws change nothing
        igd = IGD(*networks, image_size=64, width=2, seed=seed)  # type: ignore[arg-type]
        critics = [t.critic[0].weight for t in igd.trainings(images(4, 64))]
        models = [(m.linear.weight, m.decoder[0].bias) for m in igd.models.values()]
        return [critics[0], *models[0], *models[1]]

    one, same, other = starts(1, 5), starts(1, 6), starts(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[1], one[3])


def test_the_critic_is_linear_from_end_to_end_but_for_its_blocks():
    network, x = critic(32, 2, generator()), torch.randn(3, 3, 32, 32, generator=generator(1))
    y = network[0](x)
    for block in [part for part in network if isinstance(part, Block)]:
        y = block(y)
    last = next(part for part in network if isinstance(part, nn.Linear))
    torch.testing.assert_close(network(x), last(y.flatten(1))[:, 0])


def test_only_the_global_model_warms_up():
    trainings = small(True, image_size=64, epochs=4, warmup=0.5, patches=9).trainings(images(2, 64))
    assert [t.warmup for t in trainings] == [2, 0]
