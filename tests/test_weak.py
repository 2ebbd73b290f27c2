"""weak.py: each step against a plain loop or formula, how often and how strongly each fires.

Tolerances count roundings of U32 = 2^-24 against float64 on the same bits. Frequencies may differ
from their probability by SIGMAS standard deviations of the binomial; seeds are fixed.
"""

from __future__ import annotations

import colorsys
import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SIGMAS,
    U32,
    assert_frequency,
    assert_uniform,
    assert_within,
    generator,
    images,
)
from hypothesis import given
from hypothesis import strategies as st

import weak


@given(
    b=st.integers(1, 5),
    side=st.sampled_from([8, 20, 33, 64]),
    preset=st.sampled_from(list(weak.WEAK)),
    seed=st.integers(0, 2**31 - 1),
    extreme=st.booleans(),
)
def test_weak_views_are_images(b, side, preset, seed, extreme):
    x = images(b, side, seed)
    x = x.round() if extreme else x
    before = x.clone()
    y = weak.weak(x, generator(seed), preset=preset)
    assert torch.equal(x, before)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1
    pairs = torch.empty(b, 2, 3, side, side)
    into = weak.weak(x, generator(seed), preset=preset, out=pairs[:, 1])
    assert torch.equal(y, into) and into.data_ptr() == pairs[:, 1].data_ptr()
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(y, weak.weak(strided, generator(seed), preset=preset))


def test_weak_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="simclr, ccd"):
        weak.weak(images(1, 16), generator(), preset="strong")
    for area in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="min_area"):
            weak.weak(images(1, 16), generator(), min_area=area)
    with pytest.raises(ValueError, match="images must be"):
        weak.weak(images(1, 16)[0], generator())


def test_parts_of_a_batch_do_not_change_it(monkeypatch):
    x = images(7, 32)
    whole = weak.weak(x, generator())
    monkeypatch.setattr(weak, "CACHE", 2 * 3 * 32 * 32)
    # the sizes of groups may change how a mean is summed, nothing else
    assert_within(weak.weak(x, generator()), whole.double(), U32 * 4 * math.log2(32 * 32))


def test_probabilities_and_strengths_of_the_weak_augmentation(monkeypatch):
    seen = []

    def record(x, op, value, changes):
        seen.append((op, value))
        return x

    flips = []
    monkeypatch.setattr(weak, "in_steps", record)
    monkeypatch.setattr(weak, "crop", lambda x, box, flip: flips.append(flip) or x.clone())
    weak.weak(torch.zeros(6000, 3, 8, 8), generator())
    op, value = (torch.cat(y) for y in zip(*seen, strict=True))
    jittered, finish, flip = op[:, 0] > 0, op[:, 4], torch.cat(flips)
    assert_frequency(flip, 0.5)
    assert_frequency(jittered, 0.8)
    assert_frequency((finish == 5) | (finish == 7), 0.2)
    assert_frequency(finish >= 6, 0.5)
    assert_frequency(finish == 7, 0.1)
    assert (op[~jittered, :4] == 0).all()
    for order in permutations((1, 2, 3, 4)):
        assert_frequency((op[jittered, :4] == torch.tensor(order)).all(1), 1 / 24)
    factor = value[jittered, :4].gather(1, op[jittered, :4].argsort(1))
    for j, (low, high) in enumerate([(0.2, 1.8)] * 3 + [(-0.2, 0.2)]):
        assert_uniform(factor[:, j], low - U32, high + 2 * U32)
    assert_uniform(value[:, 4], 0.1, 2.0)

    seen.clear()
    weak.weak(torch.zeros(2000, 3, 8, 8), generator(), preset="ccd")
    op, value = (torch.cat(y) for y in zip(*seen, strict=True))
    assert (op[:, 4] != 6).all() and (op[:, 4] != 7).all()
    assert value[op[:, :4].eq(4).nonzero(as_tuple=True)].abs().max() <= 0.1 + U32


@pytest.mark.parametrize("min_area", [0.08, 0.5])
def test_crop_boxes_are_drawn_as_torchvision_draws_them(min_area):
    """Against torchvision's RandomResizedCrop.get_params, written out here."""
    b, side = 4000, 64
    box = weak.crop_boxes(b, side, generator(), min_area).double()
    rng = np.random.default_rng(0)
    want = []
    for _ in range(b):
        for _ in range(10):
            area = side * side * rng.uniform(min_area, 1)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= side and 0 < h <= side:
                want.append((rng.integers(0, side - h + 1), rng.integers(0, side - w + 1), h, w))
                break
        else:
            want.append((0, 0, side, side))
    want = torch.tensor(want, dtype=torch.float64)
    for moment in (lambda y: y, lambda y: y**2, lambda y: (y[:, 2:3] / y[:, 3:]).log()):
        got, expected = moment(box), moment(want)
        spread = (got.var(0) / b + expected.var(0) / b).sqrt()
        assert ((got.mean(0) - expected.mean(0)).abs() < SIGMAS * spread).all()
    assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= side).all()
    assert box[:, 2:].min() >= 1


def test_crop_against_one_image_at_a_time():
    b, side = 24, 32
    x = images(b, side)
    box = weak.crop_boxes(b, side, generator(), 0.08)
    box[0] = torch.tensor([0, 0, side, side])  # the whole image
    box[1] = torch.tensor([5, 7, 1, 1])  # a single pixel
    flip = torch.arange(b) % 3 == 0
    got = weak.crop(x, box, flip)
    want = []
    for i, (top, left, height, width) in enumerate(box.long().tolist()):
        part = x[i : i + 1, :, top : top + height, left : left + width].double()
        part = F.interpolate(part, (side, side), mode="bilinear", align_corners=False)
        want.append(part.flip(3) if flip[i] else part)
    # about 10 roundings of positions up to `side` pixels in each axis, the slope at most 1; 4 for
    # the interpolation
    assert_within(got, torch.cat(want), U32 * (2 * 10 * side + 4))


def values_for(b: int, low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, b).view(b, 1, 1, 1)


def test_brightness_contrast_saturation_and_grey_are_their_formulas():
    x, factor = images(9, 20), values_for(9, 0.0, 1.8)
    x[0], x[1, :, :10] = 0.25, 1.0
    red, green, blue = x.double().split(1, 1)
    y = 0.2989 * red + 0.587 * green + 0.114 * blue
    f = factor.double()
    mean = y.mean((1, 2, 3), keepdim=True)
    cases = {
        weak.brightness: f * x,
        weak.contrast: f * x + (1 - f) * mean,
        weak.saturation: f * x + (1 - f) * y,
        weak.to_grey: y.expand_as(x),
    }
    for change, want in cases.items():
        got = x.clone()
        change(got, factor)
        # luma: 3 weights, 3 products, 2 sums; mean: a tree; then 4, all of numbers below 2
        assert_within(got, want.clamp(0, 1), 2 * U32 * (8 + math.log2(400) + 4))


def test_hue_against_colorsys():
    """Random colours, greys, primaries, ties and near-greys, for turns in -+0.5 of the circle."""
    b, side = 11, 8
    x = images(b, side)
    x[:, :, 0] = x[:, :1, 0]  # greys
    levels = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)[:24]
    x[:, :, 1:4] = levels.T.reshape(3, 3, 8)  # ties of two or three channels
    x[:, :, 4] = (x[:, :1, 4] + torch.logspace(-7, -2, 8) * x[:, :, 5]).clamp(max=1)
    turn = values_for(b, -0.5, 0.5)
    got = x.clone()
    weak.hue(got, turn)
    want = torch.empty_like(x, dtype=torch.float64)
    for i in range(b):
        for j in range(side):
            for k in range(side):
                h, s, v = colorsys.rgb_to_hsv(*x[i, :, j, k].double().tolist())
                rgb = colorsys.hsv_to_rgb((h + turn[i].double().item()) % 1, s, v)
                want[i, :, j, k] = torch.tensor(rgb, dtype=torch.float64)
    # the numerator of h: 3 roundings of numbers below 2, divided by the chroma and multiplied by it
    # again; h and its turn: 4 roundings of numbers below 8, times the chroma, at most 1; 3 more
    assert_within(got, want, U32 * (3 * 2 + 4 * 8 + 3 + 1))


@pytest.mark.parametrize("side", [16, 40, 64, 192])
def test_blur_against_a_loop(side):
    sigma = values_for(3, 0.1, 2.0)
    x = images(3, side)
    got = x.clone()
    weak.blur(got, sigma)
    reach = side // 20  # a tenth of the side is 2 reach + 1 taps
    want = x.double()
    tap = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (-0.5 * (tap / sigma.double().view(3, 1)) ** 2).exp()
    kernel /= kernel.sum(1, keepdim=True)
    mirrored = np.abs(np.arange(-reach, side + reach))
    mirrored = np.where(mirrored >= side, 2 * side - 2 - mirrored, mirrored)
    for axis in (2, 3):
        padded = want.index_select(axis, torch.from_numpy(mirrored))
        want = sum(
            kernel[:, i].view(3, 1, 1, 1) * padded.narrow(axis, i, side)
            for i in range(2 * reach + 1)
        )
    # weights: 4 roundings of the exponent, at most 50 where the weight counts, 2 more; sums of taps
    left_out = 2 * math.erfc(8.5 / 2 / math.sqrt(2)) if reach > 8 else 0  # in each of two passes
    assert_within(got, want, U32 * 2 * (4 * 8 + 2 + 2 * reach + 1) + 2 * left_out)


def test_steps_are_those_of_each_image():
    """Sorting the images for each step changes nothing: images one at a time, in a plain loop."""
    b, steps = 40, 5
    x = images(b, 8)
    changes = (weak.brightness, weak.saturation, weak.hue)
    op = torch.randint(4, (b, steps), generator=generator())
    op[:, 2] = 3  # a step with one group
    value = 0.5 + torch.rand(b, steps, generator=generator(1))
    got = weak.in_steps(x.clone(), op, value, changes)
    for i in range(b):
        want = x[i : i + 1].clone()
        for t in range(steps):
            if op[i, t]:
                changes[op[i, t] - 1](want, value[i, t].view(1, 1, 1, 1))
        assert torch.equal(got[i : i + 1], want)
