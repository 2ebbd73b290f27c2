"""baselines/strong.py: what Fig. 6 compares with MedMix, each against a plain loop or formula.

Tolerances count roundings of U32 = 2^-24 against float64 on the same bits; seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import (
    DEVICE,
    SIGMAS,
    U32,
    assert_frequency,
    assert_within,
    flood_fill,
    generator,
    images,
)
from hypothesis import given
from hypothesis import strategies as st
from test_medmix import lesion_middles

from baselines import strong

NAMES = [name for name in strong.STRONG if name != "medmix"]  # test_medmix.py has its tests
LOCAL = ["cutout", "cutmix"]  # change n boxes; the others change the whole image


@st.composite
def batches(draw):
    b = draw(st.integers(2, 4))
    side = draw(st.sampled_from([8, 9, 16, 33, 64]))  # smallest; odd; with and without a blur
    classes = draw(st.integers(1, 8))
    copies = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31 - 1))
    x = images(b, side, seed)
    if draw(st.booleans()):
        x = x.round()  # 0 and 1, the ends of the range
    n = torch.randint(classes, (b * copies,), generator=generator(seed + 1))
    return x, n, classes, seed


def test_strong_has_medmix_and_the_augmentations_of_figure_6():
    assert list(strong.STRONG) == ["medmix", "rotation", "permutation", "cutout", "noise", "cutmix"]


@pytest.mark.parametrize("name", strong.STRONG)
@given(batches())
def test_strong_augmentations_change_the_mask_only(name, batch):
    x, n, classes, seed = batch
    before = x.clone()
    y, mask = strong.STRONG[name](x, n, generator(seed), classes=classes)
    again, mask_again = strong.STRONG[name](x, n, generator(seed), classes=classes)
    tiled = x.repeat(len(n) // len(x), 1, 1, 1)

    assert torch.equal(x, before)
    assert torch.equal(y, again) and torch.equal(mask, mask_again)
    assert y.shape == tiled.shape and mask.shape == (len(n), 1, *x.shape[2:])
    assert mask.dtype == torch.bool
    assert 0 <= y.min() and y.max() <= 1
    outside = ~mask.expand_as(y)
    assert torch.equal(y[outside], tiled[outside])
    assert torch.equal((y != tiled).flatten(1).any(1), n > 0)
    assert torch.equal(mask.flatten(1).any(1), n > 0)
    if name in ("medmix", *LOCAL):
        for m, k in zip(mask[:, 0].numpy(), n.tolist(), strict=True):
            assert len(flood_fill(m)) <= k


@pytest.mark.parametrize("name", NAMES)
def test_strong_augmentations_say_what_they_cannot_take(name):
    augment, x, n = strong.STRONG[name], images(2, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="images must be"):
        augment(x[0], n, generator())
    with pytest.raises(ValueError, match="n must be"):
        augment(x, n.float(), generator())
    with pytest.raises(ValueError, match=r"n must be in 0\.\.classes-1"):
        augment(x, n + 1, generator(), classes=2)


def test_arguments_out_of_range_are_named():
    x, n = images(2, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="8 classes"):
        strong.permutation(x, n, generator(), classes=9)
    for augment in (strong.cutout, strong.cutmix):
        with pytest.raises(ValueError, match="min_area"):
            augment(x, n, generator(), min_area=0.2, max_area=0.1)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        strong.cutmix(x[:1], n[1:], generator())


@pytest.mark.parametrize("name", LOCAL)
def test_class_n_shows_n_boxes(name):
    n = torch.arange(4).repeat_interleave(40)
    _, mask = strong.STRONG[name](images(40, 64), n, generator())
    count = torch.tensor([len(flood_fill(m)) for m in mask[:, 0].numpy()], dtype=torch.float)
    mean = count.view(4, 40).mean(1)
    assert mean[0] == 0 and mean[1] == 1
    assert mean[2] > 1.95 and mean[3] > 2.9


def test_rotation_by_right_angles_moves_pixels():
    x = images(3, 17)
    for n in range(4):
        y, _ = strong.rotation(x, torch.full((3,), n), generator())
        assert torch.equal(y, torch.from_numpy(np.rot90(x.numpy(), n, (2, 3)).copy()))
    y, _ = strong.rotation(x, torch.ones(3, dtype=torch.long), generator(), classes=2)
    assert torch.equal(y, x.flip(2, 3))


def test_rotation_by_other_angles_against_a_loop():
    side, x = 16, images(1, 16)
    for n, classes in ((1, 8), (1, 6), (4, 5)):
        y, _ = strong.rotation(x, torch.tensor([n]), generator(), classes=classes)
        angle = 2 * math.pi * n / classes
        want, inner = torch.zeros(3, side, side, dtype=torch.float64), []
        for i in range(side):
            for j in range(side):
                up, right = (side - 1) / 2 - i, j - (side - 1) / 2
                if math.hypot(up, right) > side / 2 - 1:
                    continue  # the corners are mirrored
                inner.append((i, j))
                row = (side - 1) / 2 - (up * math.cos(angle) - right * math.sin(angle))
                col = (side - 1) / 2 + (right * math.cos(angle) + up * math.sin(angle))
                a, b = math.floor(row), math.floor(col)
                for k, w in ((a, a + 1 - row), (a + 1, row - a)):
                    for m, z in ((b, b + 1 - col), (b + 1, col - b)):
                        want[:, i, j] += w * z * x[0, :, k, m].double()
        i, j = (torch.tensor(k) for k in zip(*inner, strict=True))
        # a position has about 8 roundings of at most 16 pixels, the slope is at most 1 in each axis
        assert_within(y[0, :, i, j], want[:, i, j], U32 * 2 * 8 * side)


@pytest.mark.parametrize("side", [16, 17])
def test_permutation_moves_every_tile_to_its_place(side):
    x, h = images(2, side), side // 2
    assert len(set(strong.TILES)) == 8
    mirrored = {old: tuple(old[i ^ 1] ^ 1 for i in range(4)) for old in strong.TILES}
    assert all(new == old or new not in strong.TILES for old, new in mirrored.items())
    for n, order in enumerate(strong.TILES):
        y, mask = strong.permutation(x, torch.full((2,), n), generator())
        assert n == 0 or all(order[i] != i for i in range(4))
        for to in range(4):
            (i, j), (k, m) = divmod(to, 2), divmod(order[to], 2)
            new = y[:, :, i * h : i * h + h, j * h : j * h + h]
            assert torch.equal(new, x[:, :, k * h : k * h + h, m * h : m * h + h])
        assert mask.sum() == (n > 0) * 2 * (2 * h) ** 2


def test_cutout_fills_boxes_with_the_mean():
    x = images(4, 32)
    y, mask = strong.cutout(x, torch.ones(8, dtype=torch.long), generator())
    for i in range(8):
        rows, cols = mask[i, 0].any(1).nonzero()[:, 0], mask[i, 0].any(0).nonzero()[:, 0]
        box = (slice(None), slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
        assert mask[i][box].all()
        want = x[i % 4].double().mean((1, 2), keepdim=True).expand(y[i][box].shape)
        assert_within(y[i][box], want, U32 * (math.log2(32 * 32) + 4))  # a tree sum, then a blend


def test_cutmix_pastes_other_images():
    b = 5
    own, source = lesion_middles(strong.cutmix, b, 200)
    away = (source - own) % b
    assert (away > 0).all()
    for step in range(1, b):
        assert_frequency(away == step, 1 / (b - 1))


def test_noise_grows_with_the_class():
    x = torch.full((4, 3, 64, 64), 0.5)
    y, _ = strong.gaussian_noise(x, torch.arange(4), generator(), std=0.05)
    std = y[:, 0].flatten(1).std(1)
    want = 0.05 * torch.arange(4)
    assert (std - want).abs().max() < 0.15 * SIGMAS / math.sqrt(2 * 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_gives_the_same_images_on_a_gpu(name):
    x, n = images(4, 32), torch.arange(4)
    y, mask = strong.STRONG[name](x, n, generator())
    z, mask_gpu = strong.STRONG[name](x.to(DEVICE), n.to(DEVICE), generator())
    assert torch.equal(mask, mask_gpu.cpu())
    if name == "noise":  # which a GPU draws itself
        assert (
            (z - x.to(DEVICE)).std(dim=(1, 2, 3)).cpu() - (y - x).std(dim=(1, 2, 3))
        ).max() < 0.05
    else:
        assert (y - z.cpu()).abs().max() < 1e-4


def test_lesions_and_noise_have_the_sizes_of_the_deviations_unless_told(monkeypatch):
    seen, lesions = [], strong.lesions

    def told(n, side, draws, low, high):
        seen.append((low, high))
        return lesions(n, side, draws, low, high)

    monkeypatch.setattr(strong, "lesions", told)
    monkeypatch.setattr("medmix.lesions", told)
    for augment in (strong.STRONG["medmix"], strong.cutout, strong.cutmix):
        augment(images(2, 16), torch.tensor([0, 1]), generator())
    assert seen == [(0.005, 0.08)] * 3
    x = torch.full((1, 3, 64, 64), 0.5)
    noisy, _ = strong.gaussian_noise(x, torch.tensor([1]), generator())
    assert noisy[0, 0].std() == pytest.approx(0.1, rel=SIGMAS / math.sqrt(2 * 4096))


def test_corners_of_a_turned_image_are_mirrored():
    y, _ = strong.rotation(torch.ones(1, 3, 16, 16), torch.tensor([1]), generator(), classes=8)
    assert y.min() > 0.999
