"""MS-SSIM against loops in float64 from the printed formulas, and where rounding would show."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from ssim import PATCH_SCALES, SCALES, ms_ssim, residual_map, scale_weights, setting, ssim_maps


def ssim_of(x: np.ndarray, y: np.ndarray, window: int, R: float) -> tuple[np.ndarray, np.ndarray]:
    """l and cs of one channel (S, S), window by window, as Wang et al. print them."""
    g = [math.exp(-((i - window // 2) ** 2) / (2 * 1.5**2)) for i in range(window)]
    w = np.outer(g, g) / sum(g) ** 2
    n = len(x) - window + 1
    luminance, structure = np.zeros((n, n)), np.zeros((n, n))
    c_1, c_2 = (0.01 * R) ** 2, (0.03 * R) ** 2
    for i in range(n):
        for j in range(n):
            a, b = x[i : i + window, j : j + window], y[i : i + window, j : j + window]
            mu_a, mu_b = (w * a).sum(), (w * b).sum()
            var_a, var_b = (w * (a - mu_a) ** 2).sum(), (w * (b - mu_b) ** 2).sum()
            cov = (w * (a - mu_a) * (b - mu_b)).sum()
            luminance[i, j] = (2 * mu_a * mu_b + c_1) / (mu_a**2 + mu_b**2 + c_1)
            structure[i, j] = (2 * cov + c_2) / (var_a + var_b + c_2)
    return luminance, structure


def halved(x: np.ndarray) -> np.ndarray:
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def ms_ssim_of(x: np.ndarray, y: np.ndarray, weights, window: int, R: float) -> float:
    """One image (C, S, S): the product over the scales, its mean over the channels."""
    values = []
    for a, b in zip(x, y, strict=True):
        product = 1.0
        for k, weight in enumerate(weights):
            luminance, structure = ssim_of(a, b, window, R)
            last = k + 1 == len(weights)
            term = (luminance * structure if last else structure).mean()
            product *= max(term, 0.0) ** weight
            a, b = halved(a), halved(b)
        values.append(product)
    return float(np.mean(values))


def pair(shape: tuple[int, ...], noise: float = 0.2, seed: int = 0, **kwargs):
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=gen, **kwargs)
    return x, (x + noise * torch.randn(shape, generator=gen, **kwargs)).clamp(0, 1)


@pytest.mark.parametrize(
    ("size", "window", "weights", "R"),
    [(24, 5, SCALES[:3], 1.0), (32, 3, PATCH_SCALES, 1.0), (24, 11, None, 1.0), (16, 7, (1,), 4.8)],
)
def test_ms_ssim_agrees_with_a_loop_over_windows(size, window, weights, R):
    x, y = (R * t for t in pair((2, 2, size, size)))
    weights = weights or scale_weights(size, window)
    want = [
        ms_ssim_of(a, b, weights, window, R)
        for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    got = ms_ssim(x.to(DEVICE), y.to(DEVICE), weights=weights, window=window, data_range=R)
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=1e-6)


def test_residual_map_agrees_with_a_loop():
    x, y = pair((2, 2, 16, 16))
    want = np.zeros((2, 16, 16))
    for b in range(2):
        for c in range(2):
            u, v = x[b, c].double().numpy(), y[b, c].double().numpy()
            want[b] += 0.15 * abs(u - v) / 2
            for weight in (0.4, 0.6):
                luminance, structure = ssim_of(u, v, 3, 1.0)
                at = np.arange(16) * len(luminance) // 16
                want[b] += 0.85 * weight * (1 - luminance * structure)[np.ix_(at, at)] / 2
                u, v = halved(u), halved(v)
    got = residual_map(x, y, weights=(0.4, 0.6), window=3, rho=0.15)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_scales_and_weights_by_size():
    """Wang et al.'s five at 256 px, IGD's four at 32 px, what window 11 admits between."""
    assert scale_weights(256, 11) == SCALES
    assert [len(scale_weights(s, 11)) for s in (11, 32, 64, 128, 176, 256)] == [1, 2, 3, 4, 5, 5]
    assert setting(32) == {"window": 3, "weights": (0.0516, 0.3295, 0.3463, 0.2726)}
    np.testing.assert_allclose(scale_weights(32, 3), PATCH_SCALES, atol=2e-4)
    for size in (16, 64, 96, 128):
        assert sum(setting(size)["weights"]) == pytest.approx(1)
        assert ms_ssim(*pair((1, 1, size, size)), **setting(size)) < 1


@st.composite
def images(draw):
    """Flat, nearly flat, black, saturated and noisy images: where rounding cancels."""
    size = draw(st.sampled_from([11, 12, 23, 32, 45]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    level = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    x, y = level + draw(st.sampled_from([0.0, 1e-4, 0.3])) * torch.rand(
        2, 2, 3, size, size, generator=gen
    )
    return x, y + draw(st.sampled_from([0.0, 1e-4, 0.1]))


@given(images())
def test_never_above_one_and_symmetric(case):
    x, y = case
    got = ms_ssim(x, y)
    assert (got <= 1).all() and (got >= 0).all()
    torch.testing.assert_close(got, ms_ssim(y, x), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.double(), ms_ssim(x.double(), y.double()), rtol=0, atol=2e-5)
    assert torch.equal(ms_ssim(x, x), torch.ones(2))


def test_the_gradient_is_that_of_finite_differences():
    x, y = pair((1, 1, 10, 10), dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ms_ssim(a, b, window=5), (x, y))


def test_opposite_images_have_a_finite_gradient():
    """Negative structure counts as 0; the power's gradient at 0 would be infinite."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    m = ms_ssim(x, 1 - x.detach())
    m.sum().backward()
    assert torch.equal(m, torch.zeros(2)) and x.grad is not None and x.grad.isfinite().all()


def test_nan_is_not_hidden():
    x, y = pair((1, 3, 16, 16))
    x[0, 1, 3, 3] = math.nan
    assert ms_ssim(x, y).isnan().all()


def test_user_mistakes_are_named():
    x, y = pair((1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, C, S, S\)"):
        ms_ssim(x, y[:, :, 1:])
    with pytest.raises(ValueError, match=r"\(B, C, S, S\)"):
        ms_ssim(x[0], y[0])
    with pytest.raises(ValueError, match="floating .* got torch.uint8"):
        ms_ssim(x.byte(), y)
    with pytest.raises(ValueError, match="of one type"):
        ms_ssim(x.double(), y)
    with pytest.raises(ValueError, match="odd"):
        ms_ssim(x, y, window=4)
    with pytest.raises(ValueError, match="16 px hold 1 scales of window 11, not 5"):
        ms_ssim(x, y, weights=SCALES)
    with pytest.raises(ValueError, match="hold 0 scales"):
        ssim_maps(x, y, 1, 17, 1.0)


def test_an_odd_side_is_halved_with_a_zero_row_and_column_before_it():
    """23 px give 12."""
    x, y = (t[0, 0] for t in pair((1, 1, 23, 23)))
    want, a, b = 1.0, x.double().numpy(), y.double().numpy()
    for last, weight in ((False, 0.4), (True, 0.6)):
        luminance, structure = ssim_of(a, b, 5, 1.0)
        want *= (luminance * structure if last else structure).mean() ** weight
        a, b = (halved(np.pad(t, ((1, 0), (1, 0)))) if len(t) % 2 else halved(t) for t in (a, b))
    got = ms_ssim(x[None, None], y[None, None], weights=(0.4, 0.6), window=5)
    assert float(got) == pytest.approx(want, abs=1e-6)
    assert len(a) == 6 and len(scale_weights(21, 11)) == 2 and len(scale_weights(20, 11)) == 1


def test_autocast_around_a_call_costs_no_digits():
    x, y = pair((2, 3, 32, 32))
    want = ms_ssim(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ms_ssim(x, y), want)
