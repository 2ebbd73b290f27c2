"""PaDiM against loops in float64 from the printed formulas: eq. 13 and what it is fitted by."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, U32, assert_within
from hypothesis import given
from hypothesis import strategies as st

import detectors
from detectors import PaDiM, folded, moments, upsampling, whitening
from encoder import Encoder, ResNet18, channels_last, normalise, to_unit
from kernels.mahalanobis import mahalanobis


def images(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth uint8 images (N, 3, S, S) of one family."""
    gen = torch.Generator().manual_seed(seed)
    coarse = 40 + 160 * torch.rand(n, 3, 5, 5, generator=gen)
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    noise = 6 * torch.randn(n, 3, size, size, generator=gen)
    return (smooth + noise).clamp(0, 255).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def backbone() -> ResNet18:
    return ResNet18(torch.Generator().manual_seed(3)).to(DEVICE)


def gaussian_of(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse covariance of the rows of x (N, D), as printed, in float64."""
    mean = sum(x) / len(x)
    covariance = sum(np.outer(row - mean, row - mean) for row in x) / (len(x) - 1)
    return mean, np.linalg.inv(covariance + eps * np.eye(x.shape[1]))


def mirrored(i: int, size: int) -> int:
    """The index that a mirrored edge, d c b a | a b c d | d c b a, shows at i."""
    while not 0 <= i < size:
        i = -1 - i if i < 0 else 2 * size - 1 - i
    return i


def smooth_line(line: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """A line (h,) upsampled bilinearly, pixel centres aligned, and smoothed by a cut Gaussian."""
    h = len(line)
    fine = np.zeros(size)
    for i in range(size):
        at = (i + 0.5) * h / size - 0.5
        low = math.floor(at)
        a, b = max(low, 0), min(low + 1, h - 1)
        fine[i] = line[a] * (1 - (at - low)) + line[b] * (at - low)
    if sigma == 0:
        return fine
    reach = int(4 * sigma + 0.5)
    w = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)]
    return np.array(
        [
            sum(w[k + reach] * fine[mirrored(i + k, size)] for k in range(-reach, reach + 1))
            / sum(w)
            for i in range(size)
        ]
    )


# --- eq. 13 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "channels", "eps"), [(7, 30, 0.01), (60, 20, 0.2)], ids=["fewer_than_D", "more_than_D"]
)
def test_padim_agrees_with_a_loop_over_positions(backbone, n, channels, eps):
    """Distances, maps and scores, from the definition with an explicit inverse."""
    train, test = images(n), images(3, seed=1)
    detector = PaDiM(backbone, channels=channels, eps=eps, sigma=8.0).fit(train)
    x = detector.embeddings(train).double().cpu().numpy()  # (N, P, D)
    new = detector.embeddings(test)  # (B, P, D)
    want = np.zeros(new.shape[:2])
    for p in range(x.shape[1]):
        mean, inverse = gaussian_of(x[:, p], eps)
        for b, row in enumerate(new[:, p].double().cpu().numpy()):
            want[b, p] = math.sqrt((row - mean) @ inverse @ (row - mean))
    got = mahalanobis(new, detector.mean, detector.whitening).cpu().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5)

    maps, scores = detector.score(test)
    for b in range(len(test)):
        columns = [smooth_line(line, 32, 1.0) for line in want[b].reshape(8, 8).T]
        rows = np.array([smooth_line(line, 32, 1.0) for line in np.array(columns).T])
        np.testing.assert_allclose(maps[b].cpu().numpy(), rows, rtol=1e-5)
        assert scores[b] == maps[b].max()


def test_a_changed_patch_stands_out_where_it_is(backbone):
    train, test = images(40, 64), images(2, 64, seed=1)
    test[1, :, 40:52, 8:20] = 255 - test[1, :, 40:52, 8:20]
    maps, scores = PaDiM(backbone).fit(train).score(test)
    y, x = divmod(int(maps[1].argmax()), 64)
    assert scores[1] > scores[0] and 34 <= y < 58 and 2 <= x < 26


def test_one_image_at_a_time_scores_as_a_batch_does(backbone):
    detector, test = PaDiM(backbone).fit(images(12)), images(40, seed=1)  # two blocks
    maps, scores = detector.score(test)
    for b in (0, 31, 32, 39):
        one, score = detector.score(test[b : b + 1])
        torch.testing.assert_close(one[0], maps[b], rtol=1e-5, atol=0)
        torch.testing.assert_close(score[0], scores[b], rtol=1e-5, atol=0)
    again = detector.score(torch.from_numpy(test).float() / 255)
    torch.testing.assert_close(again[0], maps, rtol=1e-5, atol=0)


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 52])
def test_embeddings_are_the_concatenated_layers_at_layer1s_positions(backbone, size):
    """Choosing channels early changes no bit; folding the batch norms changes rounding."""
    network = copy.deepcopy(backbone).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            gen = torch.Generator().manual_seed(module.num_features)
            for value in (module.running_var, module.running_mean, module.weight, module.bias):
                assert value is not None
                value.data += 0.3 * torch.rand(value.shape, generator=gen).to(DEVICE)
    detector, x = PaDiM(network, seed=5), images(2, size)

    def concatenated(of: Any) -> torch.Tensor:
        with torch.no_grad():
            batch = normalise(to_unit(x, DEVICE)).to(memory_format=torch.channels_last)
            stages = of.stages(batch)[:3]
        side = stages[0].shape[2:]
        whole = torch.cat([F.interpolate(s, size=side, mode="nearest") for s in stages], dim=1)
        return whole[:, detector.channels].flatten(2).mT  # (B, P, D)

    got, plain = detector.embeddings(x), concatenated(channels_last(folded(network)))
    rounding = 0.0 if DEVICE.type == "cpu" else 1e-5  # fewer channels may be summed otherwise there
    torch.testing.assert_close(got, plain, rtol=rounding, atol=rounding)
    want = concatenated(network)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.max()))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_channels_of_a_single_layer_are_enough(backbone, layer):
    first = sum(detectors.LAYERS[:layer])
    detector = PaDiM(backbone, channels=2)
    detector.channels = torch.arange(first, first + 2)
    with torch.no_grad():
        stages = folded(detector.backbone).stages(normalise(to_unit(images(2), DEVICE)), last=3)
    want = F.interpolate(stages[layer][:, :2], size=stages[0].shape[2:], mode="nearest")
    want = want.flatten(2).mT
    torch.testing.assert_close(detector.embeddings(images(2)), want, rtol=1e-4, atol=1e-5)


@st.composite
def batches(draw):
    n = [draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 4)))]
    p, d = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    offset = draw(st.sampled_from([0.0, 1.0, 300.0]))  # far from 0 the shift decides
    spread = 10.0 ** draw(st.integers(-2, 1))
    return [offset + spread * torch.randn(k, p, d, generator=gen) for k in n], spread


@given(batches())
def test_streamed_moments_are_those_of_all_the_data_at_once(case):
    parts, spread = case
    count, mean, scatter = moments(iter(parts))
    x = torch.cat(parts).double()
    r = x - x.mean(dim=0)
    want = torch.einsum("npd,npe->pde", r, r)
    assert count == len(x)
    # x - shift and its products are float32; the shift is off by the first batch's spread
    scale = 8 * spread
    assert_within(mean, x.mean(dim=0), U32 * (x.abs().max() + 4 * scale))
    largest = U32 * x.abs().max()  # of one rounding in x - shift
    assert_within(scatter, want, 2 * count * (largest * scale + 16 * U32 * scale**2))


def test_the_sums_of_the_moments_are_float64():
    """In float32 what the last batches of a large set add to the sums would be lost."""
    pair = torch.tensor([1.0, -1.0])[:, None, None]
    count, mean, scatter = moments([1e4 * pair, *(2 * pair for _ in range(64))])
    assert (count, mean.dtype, mean.item()) == (130, torch.float64, 0)
    assert scatter.item() == 2e8 + 64 * 8


@given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 2**31 - 1))
def test_whitening_inverts_the_covariance(d, n, seed):
    x = torch.randn(n, 3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r = x - x.mean(dim=0)
    scatter = torch.einsum("npd,npe->pde", r, r)
    w = whitening(scatter, n, 0.01).double()
    want = np.stack([gaussian_of(x[:, p].numpy(), 0.01)[1] for p in range(3)])
    np.testing.assert_allclose((w.mT @ w).numpy(), want, rtol=0, atol=1e-5 * abs(want).max())
    assert torch.equal(w, w.tril())


def test_whitening_keeps_its_digits_on_an_ill_conditioned_covariance():
    """A float32 inverse would be off by per cents here."""
    gen = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=gen, dtype=torch.float64))[0]
    sigma = (axes * torch.logspace(3, -4, 40, dtype=torch.float64)) @ axes.T
    x = torch.randn(1, 1, 40, generator=gen)
    got = mahalanobis(x, torch.zeros(1, 40), whitening(sigma[None] * 9, 10, 0.0))
    want = (x.double()[0] @ torch.linalg.inv(sigma) @ x.double()[0].T).sqrt()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    naive = (x[0] @ torch.linalg.inv(sigma.float()) @ x[0].T).sqrt()
    assert abs(float(naive / want) - 1) > 1e-4


@given(st.integers(1, 9), st.integers(1, 33), st.sampled_from([0.0, 0.3, 1.0, 5.0]))
def test_upsampling_is_bilinear_then_gaussian(h, size, sigma):
    u = upsampling(h, size, sigma)
    want = np.stack([smooth_line(line, size, sigma) for line in np.eye(h)], axis=1)
    np.testing.assert_allclose(u.numpy(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(u.sum(dim=1), torch.ones(size))


class Counting(np.ndarray):
    """An array that records how many images were taken from it at once."""

    taken: list[int] = []

    def __getitem__(self, key):
        part = super().__getitem__(key)
        if isinstance(key, slice):
            self.taken.append(len(part))
        return part


def test_fit_reads_each_image_once_and_a_few_at_a_time(backbone):
    lazy = images(70).view(Counting)
    Counting.taken.clear()
    PaDiM(backbone, channels=4).fit(lazy)
    assert max(Counting.taken) <= detectors.IMAGES < len(lazy)
    blocks = [n for n in Counting.taken if n == detectors.IMAGES or n == 70 % detectors.IMAGES]
    assert sum(blocks[::2]) <= 70 + detectors.IMAGES


# --- reproducible, saved, refused ----------------------------------------------------------------


def test_fit_takes_its_steps_from_track(backbone):
    steps = []

    def track(items):
        for item in items:
            steps.append(item)
            yield item

    tracked = PaDiM(backbone, channels=4).fit(images(40), track=track)
    assert steps == [0, detectors.IMAGES]
    assert torch.equal(tracked.mean, PaDiM(backbone, channels=4).fit(images(40)).mean)


def test_the_same_seed_gives_the_same_detector_and_the_network_is_a_copy(backbone):
    train, test = images(8), images(2, seed=1)
    first = PaDiM(backbone, seed=7).fit(train)
    want = first.score(test)
    network = ResNet18(torch.Generator().manual_seed(3)).to(DEVICE).train()
    second = PaDiM(network, seed=7).fit(train)
    assert network.training and network.conv1.weight.requires_grad
    with torch.no_grad():
        network.conv1.weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(want, second.score(test), strict=True))
    assert not torch.equal(first.channels, PaDiM(backbone, seed=8).channels)
    assert len(first.channels.unique()) == 100


def test_a_saved_detector_scores_bit_for_bit_the_same(backbone, tmp_path):
    test, path = images(3, seed=1), tmp_path / "detector.pt"
    detector = PaDiM(backbone, channels=17, eps=0.2, sigma=3.0, seed=5).fit(images(6))
    detector.save(path)
    state = torch.load(path, map_location=DEVICE, weights_only=True)
    assert state["kind"] == "padim"
    loaded = PaDiM.of(state, DEVICE)
    assert torch.equal(loaded.whitening, detector.whitening)
    assert (loaded.eps, loaded.sigma, loaded.size) == (0.2, 3.0, 32)
    for a, b in zip(loaded.score(test), detector.score(test), strict=True):
        assert torch.equal(a, b)


def test_user_mistakes_are_named(backbone, tmp_path):
    for name, value in (
        ("channels", 0), ("channels", 449), ("eps", -1.0), ("eps", math.inf), ("sigma", math.nan)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            PaDiM(backbone, **{name: value})
    with pytest.raises(ValueError, match="must be a ResNet18, as Encoder's"):
        PaDiM(Encoder())
    detector = PaDiM(backbone, channels=8)
    with pytest.raises(ValueError, match="fitted"):
        detector.score(images(1))
    with pytest.raises(ValueError, match="fitted"):
        detector.save(tmp_path / "empty.pt")
    for few in (images(1), images(1)[:0]):
        with pytest.raises(ValueError, match=f"N={len(few)}"):
            detector.fit(few)
    with pytest.raises(ValueError, match=r"\(N, 3, S, S\)"):
        detector.fit(images(4)[:, :1])
    with pytest.raises(ValueError, match=r"\(N, 3, S, S\)"):
        detector.fit(images(4)[:, :, 1:])
    with pytest.raises(ValueError, match="32 pixels"):
        detector.fit(images(4)).score(images(1, 64))
    with pytest.raises(ValueError, match="got none"):
        moments([])
    with pytest.raises(ValueError, match="N=1"):
        whitening(torch.zeros(1, 2, 2, dtype=torch.float64), 1, 0.01)


def test_autocast_around_padim_costs_no_digits(backbone):
    want = PaDiM(backbone, channels=8).fit(images(12)).score(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = PaDiM(backbone, channels=8).fit(images(12)).score(images(2))
    assert all(map(torch.equal, got, want))


def test_features_without_a_covariance_are_refused(backbone):
    broken = torch.from_numpy(images(4)) / 255
    broken[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        PaDiM(backbone, channels=8).fit(broken)
    with pytest.raises(ValueError, match="not positive definite"):
        PaDiM(backbone, channels=30, eps=0.0, sigma=0.0).fit(images(5))  # singular with N <= D


def test_the_defaults_are_those_that_the_deviations_state(backbone):  # R19
    detector = PaDiM(backbone)
    assert (len(detector.channels), detector.eps, detector.sigma) == (100, 0.01, 4.0)
    assert torch.equal(detector.channels, PaDiM(backbone, seed=0).channels)


def test_a_side_that_is_no_multiple_of_four_has_the_positions_of_layer1(backbone):
    detector, test = PaDiM(backbone, channels=5).fit(images(4, 50)), images(2, 50, seed=1)
    with torch.no_grad():
        first = folded(detector.backbone).stages(normalise(to_unit(test, DEVICE)), last=1)[0]
    assert detector.embeddings(test).shape == (2, first[0, 0].numel(), 5)  # 13 x 13
    assert detector.score(test)[0].shape == (2, 50, 50)
