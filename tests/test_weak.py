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
from conftest import SIGMAS, U32, assert_frequency, assert_uniform, assert_within, generator, images
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
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(y, weak.weak(strided, generator(seed), preset=preset))


def test_weak_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="simclr, ccd"):
        weak.weak(images(1, 16), generator(), preset="strong")
    for area in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="min_area"):
            weak.weak(images(1, 16), generator(), min_area=area)
    with pytest.raises(ValueError, match="strength >= 0, got 0.08 and -1"):
        weak.weak(images(1, 16), generator(), strength=-1)
    for wrong in (images(1, 16)[0], images(1, 16)[:0], images(1, 16).half()):
        with pytest.raises(ValueError, match="images must be"):
            weak.weak(wrong, generator())


def test_autocast_around_weak_views_changes_no_bit():
    x = images(8, 32)
    want = weak.weak(x, generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weak.weak(x, generator(1)), want)


def test_views_of_a_batch_in_chunks_are_all_different(monkeypatch):
    monkeypatch.setattr(weak, "CHUNK", 1)  # 16 images at a time
    x = images(1, 16).expand(40, 3, 16, 16)
    y = weak.weak(x, generator())
    equal = (y[:, None] == y).flatten(2).all(2)
    assert torch.equal(equal, torch.eye(40, dtype=torch.bool))


def test_each_step_fires_with_its_probability_and_in_its_place(monkeypatch):
    """Each step is replaced by one that leaves its mark in the image."""
    flips, strengths, sigmas, calls = [], [], [], []

    def marks(name, mark, seen=None):
        def step(x, *draws):
            calls.append(name)
            if seen is not None:
                seen.append(draws[0] if name != "crop" else draws[1])
            return x[:, :1].expand(-1, 3, -1, -1) + mark

        return step

    monkeypatch.setattr(weak, "crop", marks("crop", 0, flips))
    monkeypatch.setattr(weak, "jitter", marks("jitter", 1 / 8, strengths))
    monkeypatch.setattr(weak, "luma", marks("grey", 2 / 8))
    monkeypatch.setattr(weak, "blur", marks("blur", 4 / 8, sigmas))
    y = weak.weak(torch.zeros(6000, 3, 8, 8), generator())
    assert calls == ["crop", "jitter", "grey", "blur"] * 2  # 4096 images, and the rest
    fired = (y[:, 0, 0, 0] * 8).long()
    jittered, greyed, blurred = fired & 1 > 0, fired & 2 > 0, fired & 4 > 0
    assert_frequency(torch.cat(flips), 0.5)
    for hits, p in ((jittered, 0.8), (greyed, 0.2), (blurred, 0.5)):
        assert_frequency(hits, p)
    assert_frequency(jittered & greyed, 0.16)
    assert_frequency(greyed & blurred, 0.1)
    assert_frequency(jittered & blurred, 0.4)
    assert_uniform(torch.cat(sigmas), 0.1, 2.0)
    assert strengths == [(0.8, 0.8, 0.8, 0.2)] * 2

    strengths.clear()
    y = weak.weak(torch.zeros(6000, 3, 8, 8), generator(), preset="ccd", strength=0.5)
    assert y.max() < 4 / 8  # no blur
    assert strengths == [(0.2, 0.2, 0.2, 0.05)] * 2


def record(monkeypatch, *names):
    """The named functions of weak.py keep working; each call appends (name, x before, the rest)."""
    calls = []

    def wrapped(name, function):
        def call(x, *rest, **options):
            calls.append((name, x.clone(), *rest))
            return function(x, *rest, **options)

        return call

    for name in names:
        monkeypatch.setattr(weak, name, wrapped(name, getattr(weak, name)))
    return calls


def test_jitter_has_a_random_order_and_factors_for_each_image(monkeypatch):
    calls = record(monkeypatch, *STEPS)
    draws, x = generator(), torch.zeros(3, 3, 1, 1)
    for _ in range(2400):
        weak.jitter(x, (0.8, 0.4, 1.5, 0.2), draws)
    names = [name for name, _, _ in calls]
    orders = [tuple(names[i : i + 4]) for i in range(0, len(names), 4)]
    for order in permutations(STEPS):
        assert_frequency(torch.tensor([got == order for got in orders]), 1 / 24)
    ranges = zip(STEPS, ((0.2, 1.8), (0.6, 1.4), (0.0, 2.5), (-0.2, 0.2)), strict=True)
    for step, (low, high) in ranges:
        factor = torch.stack([f.flatten() for name, _, f in calls if name == step])
        assert factor.shape == (2400, 3)
        assert_uniform(factor, low - U32, high + 2 * U32)
        assert (factor.std(1) > 0).all()  # not one for all images
        assert abs(torch.corrcoef(factor.T)[0, 1]) < SIGMAS / math.sqrt(2400)


def test_weak_against_one_image_at_a_time(monkeypatch):
    """A loop over the images in float64, from torchvision's definitions and weak's draws."""
    b, side = 30, 40
    x = images(b, side)
    calls = record(monkeypatch, "crop", "jitter", "blur", *STEPS)
    got = weak.weak(x, generator(3))
    drawn = {name: rest for name, _, *rest in calls}
    (box, flip), (sigma,) = drawn["crop"], drawn["blur"]
    order = [name for name, *_ in calls if name in STEPS]
    monkeypatch.undo()

    cropped = weak.crop(x, box, flip)
    selected = next(y for name, y, *_ in calls if name == "jitter")
    jittered = [i for i in range(b) if any(torch.equal(cropped[i], y) for y in selected)]
    before_blur = next(y for name, y, *_ in calls if name == "blur")
    assert 0 < len(jittered) < b and 0 < len(sigma) < b
    greyed, blurred = 0, 0
    for i in range(b):
        want = crop_loop(x[i], box[i], bool(flip[i]))
        if i in jittered:
            for step in order:
                want = STEPS[step](want, drawn[step][0][jittered.index(i)].item())
        # cropping: see below. No step but the hue has a slope above 1.8, and the hue's is at most 2
        budget = U32 * (2 * 10 * side + 4 + 4 * 40) * 1.8**3 * 2
        if torch.equal(got[i, 0], got[i, 1]) and torch.equal(got[i, 0], got[i, 2]):
            want, greyed = grey_loop(want).expand(3, side, side), greyed + 1
        near = (before_blur - want).abs().flatten(1).amax(1) <= budget
        if near.any():
            want = blur_loop(want[None], sigma[near])[0]
            blurred += 1
        assert_within(got[i], want.clamp(0, 1), budget)
    assert 0 < greyed < b and blurred == len(sigma)


def grey_loop(x):
    return (0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2])[None]


def hue_loop(x, turn):
    want = torch.empty_like(x)
    for j in range(x.shape[1]):
        for k in range(x.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*x[:, j, k].tolist())
            want[:, j, k] = want.new_tensor(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    return want


STEPS = {
    "brightness": lambda x, f: (f * x).clamp(0, 1),
    "contrast": lambda x, f: (f * x + (1 - f) * grey_loop(x).mean()).clamp(0, 1),
    "saturation": lambda x, f: (f * x + (1 - f) * grey_loop(x)).clamp(0, 1),
    "hue": hue_loop,
}  # of one image (3, S, S) in float64, as torchvision defines them


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


def crop_loop(x, box, flip):
    top, left, height, width = box.long().tolist()
    part = x[None, :, top : top + height, left : left + width].double()
    part = F.interpolate(part, x.shape[1:], mode="bilinear", align_corners=False)[0]
    return part.flip(2) if flip else part


def test_crop_against_one_image_at_a_time():
    b, side = 24, 32
    x = images(b, side)
    box = weak.crop_boxes(b, side, generator(), 0.08)
    box[0] = torch.tensor([0, 0, side, side])  # the whole image
    box[1] = torch.tensor([5, 7, 1, 1])  # a single pixel
    flip = torch.arange(b) % 3 == 0
    want = torch.stack([crop_loop(x[i], box[i], bool(flip[i])) for i in range(b)])
    # about 10 roundings of positions up to `side` pixels in each axis, the slope at most 1; 4 for
    # the interpolation
    assert_within(weak.crop(x, box, flip), want, U32 * (2 * 10 * side + 4))


def values_for(b: int, low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, b).view(b, 1, 1, 1)


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_their_formulas(step):
    x, factor = images(9, 20), values_for(9, 0.0, 1.8)
    x[0], x[1, :, :10] = 0.25, 1.0
    want = torch.stack([STEPS[step](y.double(), f.item()) for y, f in zip(x, factor, strict=True)])
    getattr(weak, step)(x, factor)
    # luma: 3 weights, 3 products, 2 sums; mean: a tree; then 4, all of numbers below 2
    assert_within(x, want, 2 * U32 * (8 + math.log2(400) + 4))


def test_contrast_keeps_the_mean_luma_of_its_region():
    x, factor = images(5, 20), values_for(5, 0.0, 1.8)
    region = torch.rand(5, 1, 20, 20, generator=generator(1)) < 0.3
    want = x.double()
    for i in range(5):
        mean = grey_loop(want[i])[region[i]].mean()
        want[i] = (factor[i].double() * want[i] + (1 - factor[i].double()) * mean).clamp(0, 1)
    weak.contrast(x, factor, region)
    assert_within(x, want, 2 * U32 * (8 + math.log2(400) + 4))
    strength = (0.0, 0.8, 0.0, 0.0)  # the jitter passes its region on
    within = weak.jitter(images(5, 20), strength, generator(), region)
    assert not torch.equal(within, weak.jitter(images(5, 20), strength, generator()))


def test_luma_is_its_formula():
    x = images(4, 20)
    want = torch.stack([grey_loop(y) for y in x.double()])
    assert_within(weak.luma(x), want, U32 * 8)


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
    want = torch.stack([hue_loop(y.double(), t.item()) for y, t in zip(x, turn, strict=True)])
    # the numerator of h: 3 roundings of numbers below 2, divided by the chroma and multiplied by it
    # again; h and its turn: 4 roundings of numbers below 8, times the chroma, at most 1; 3 more
    assert_within(got, want, U32 * (3 * 2 + 4 * 8 + 3 + 1))


def blur_loop(x, sigma):
    """x (B, 3, S, S) in float64, sigma (B,)."""
    side = x.shape[3]
    reach = side // 20  # a tenth of the side is 2 reach + 1 taps
    tap = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (-0.5 * (tap / sigma.double()[:, None]) ** 2).exp()
    kernel /= kernel.sum(1, keepdim=True)
    mirrored = np.abs(np.arange(-reach, side + reach))
    mirrored = np.where(mirrored >= side, 2 * side - 2 - mirrored, mirrored)
    for axis in (2, 3):
        padded = x.index_select(axis, torch.from_numpy(mirrored))
        x = sum(
            kernel[:, i].view(-1, 1, 1, 1) * padded.narrow(axis, i, side)
            for i in range(2 * reach + 1)
        )
    return x


@pytest.mark.parametrize("side", [16, 40, 64, 192])
def test_blur_against_a_loop(side):
    sigma = torch.linspace(0.1, 2.0, 3)
    x = images(3, side)
    reach = side // 20
    # weights: 4 roundings of the exponent, at most 50 where the weight counts, 2 more; sums of taps
    budget = U32 * 2 * (4 * 8 + 2 + 2 * reach + 1)
    left_out = 2 * math.erfc(8.5 / 2 / math.sqrt(2)) if reach > 8 else 0  # in each of two passes
    assert_within(weak.blur(x, sigma), blur_loop(x.double(), sigma), budget + 2 * left_out)


def test_the_smallest_crop_is_the_presets_unless_given(monkeypatch):
    areas, crop_boxes = [], weak.crop_boxes

    def boxes(b, side, draws, area):
        areas.append(area)
        return crop_boxes(b, side, draws, area)

    monkeypatch.setattr(weak, "crop_boxes", boxes)
    for options in ({}, {"preset": "ccd"}, {"min_area": 0.5}, {"preset": "ccd", "min_area": 0.3}):
        weak.weak(images(1, 16), generator(), **options)
    assert areas == [0.08, 0.2, 0.5, 0.3]


def test_a_crop_that_never_fits_is_the_whole_image():
    box = weak.crop_boxes(50, 64, generator(), 1.0)  # of the image's area, but never square
    assert torch.equal(box, torch.tensor([0.0, 0, 64, 64], dtype=box.dtype).expand(50, 4))
