"""medmix.py: the strong augmentations' properties, each operation against a plain loop or formula,
and how often and how strongly each fires.

Tolerances count roundings of U32 = 2^-24 against float64 on the same bits. Frequencies may differ
from their probability by SIGMAS standard deviations of the binomial; seeds are fixed.
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
    assert_uniform,
    assert_within,
    flood_fill,
    generator,
    images,
)
from hypothesis import given
from hypothesis import strategies as st

import medmix
import weak

LOCAL = ["medmix", "cutout", "cutmix"]  # change n boxes; the others change the whole image


# Every strong augmentation -------------------------------------------------------------------


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


@pytest.mark.parametrize("name", medmix.STRONG)
@given(batches())
def test_strong_augmentations_change_the_mask_only(name, batch):
    x, n, classes, seed = batch
    before = x.clone()
    y, mask = medmix.STRONG[name](x, n, generator(seed), classes=classes)
    again, mask_again = medmix.STRONG[name](x, n, generator(seed), classes=classes)
    tiled = x.repeat(len(n) // len(x), 1, 1, 1)

    assert torch.equal(x, before)
    assert torch.equal(y, again) and torch.equal(mask, mask_again)
    assert y.shape == tiled.shape and mask.shape == (len(n), 1, *x.shape[2:])
    assert mask.dtype == torch.bool
    assert 0 <= y.min() and y.max() <= 1
    outside = ~mask.expand_as(y)
    assert torch.equal(y[outside], tiled[outside])
    assert torch.equal(mask.flatten(1).any(1), n > 0)
    assert torch.equal(y[n == 0], tiled[n == 0])
    if name in LOCAL:
        for m, k in zip(mask[:, 0].numpy(), n.tolist(), strict=True):
            assert len(flood_fill(m)) <= k


@pytest.mark.parametrize("name", medmix.STRONG)
def test_strong_augmentations_say_what_they_cannot_take(name):
    strong, x, n = medmix.STRONG[name], images(2, 16), torch.tensor([0, 1])
    for bad in (x[0], x[:, :2], x[..., :8], images(2, 7), (x * 255).byte()):
        with pytest.raises(ValueError, match="images must be"):
            strong(bad, n, generator())
    for bad in (n[:1], n.float(), n[None], torch.zeros(0, dtype=torch.long), torch.arange(3)):
        with pytest.raises(ValueError, match="n must be"):
            strong(x, bad, generator())
    for bad, classes in ((n - 1, None), (n + 1, 2)):
        with pytest.raises(ValueError, match=r"n must be in 0\.\.classes-1"):
            strong(x, bad, generator(), classes=classes)


def test_arguments_out_of_range_are_named():
    x, n = images(2, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="p must be"):
        medmix.medmix(x, n, generator(), p=1.5)
    for low, high in ((0, 0.1), (0.2, 0.1), (0.1, 1.1)):
        with pytest.raises(ValueError, match="min_area"):
            medmix.medmix(x, n, generator(), min_area=low, max_area=high)
    with pytest.raises(ValueError, match="8 classes"):
        medmix.permutation(x, n, generator(), classes=9)
    for name in ("medmix", "cutmix"):
        with pytest.raises(ValueError, match="at least 2, got 1"):
            medmix.STRONG[name](x[:1], n[1:], generator())
        assert torch.equal(medmix.STRONG[name](x[:1], n[:1], generator())[0], x[:1])


# MedMix --------------------------------------------------------------------------------------


def flat_images(b: int, side: int) -> torch.Tensor:
    """Image i has the grey level i / (b - 1) everywhere."""
    return (torch.arange(b) / (b - 1)).view(b, 1, 1, 1).expand(b, 3, side, side).contiguous()


def unaltered(x, n, gen):
    return medmix.medmix(x, n, gen, p=0, at_least_one=False)


@pytest.mark.parametrize("strong", [unaltered, medmix.cutmix])
def test_lesions_come_from_other_images_and_from_all_of_them(strong):
    b, copies = 5, 200
    x = flat_images(b, 16)
    y, mask = strong(x, torch.ones(b * copies, dtype=torch.long), generator())
    # the middle of a lesion is what changed most; outlines are mixtures
    change = (y - x.repeat(copies, 1, 1, 1))[:, 0].flatten(1)
    most = change.gather(1, change.abs().argmax(1, keepdim=True))[:, 0]
    own = torch.arange(b).repeat(copies)
    source = (own / (b - 1) + most) * (b - 1)
    # some of 3 pixel sides have no fully opaque pixel: their middle is at 2/3 of an edge, or more
    core = (source - source.round()).abs() < 1e-3
    assert core.double().mean() > 0.9
    assert not (source.round() == own)[core].any()
    away = (source.round().long() - own) % b
    for step in range(1, b):
        assert_frequency(away[core] == step, 1 / (b - 1))


def test_at_least_one_alteration_and_each_with_its_probability(monkeypatch):
    seen = []

    def record(patch, fired, lesions, gen):
        seen.append(fired)
        return patch

    monkeypatch.setattr(medmix, "alter", record)
    x, n = images(4, 16), torch.full((2000,), 2)
    medmix.medmix(x, n, generator(), at_least_one=False)
    fired = torch.cat(seen)
    assert fired.shape == (4000, 4)
    for j in range(4):
        assert_frequency(fired[:, j], 0.25)
    assert_frequency(~fired.any(1), 0.75**4)

    seen.clear()
    medmix.medmix(x, n, generator(1))
    fired = torch.cat(seen)
    assert fired.any(1).all()
    for j in range(4):
        assert_frequency(fired[:, j], 0.25 + 0.75**4 / 4)


def test_lesion_sizes_and_places():
    side, x = 256, torch.zeros(1, 3, 256, 256)
    n = torch.ones(4000, dtype=torch.long)
    box = torch.cat([part.box for part in medmix.place_lesions(n, x, generator(), 2, 0.005, 0.08)])
    top, left, height, width = box.double().unbind(1)
    area, aspect = height * width / side**2, (height / width).log()
    # a side is rounded by half a pixel: of 10.5 px, the smallest, that is 5%
    assert 0.9 * 0.005 < area.min() and area.max() < 1.05 * 0.08
    rounded = 1e-4  # mean effect of rounding both sides, (1/12) / side^2 each, and its spread
    assert abs(area.mean() - 0.0425) < SIGMAS * 0.075 / math.sqrt(12 * 4000) + rounded
    assert aspect.abs().max() < math.log(3) + 0.1
    assert abs(aspect.mean()) < SIGMAS * 2 * math.log(3) / math.sqrt(12 * 4000)
    for start, size in ((top, height), (left, width)):
        assert start.min() >= 0 and (start + size).max() <= side
        assert_uniform((start + 0.5) / (side - size + 1), 0, 1)


@pytest.mark.parametrize("name", LOCAL)
def test_class_n_shows_n_lesions(name):
    n = torch.arange(4).repeat_interleave(40)
    _, mask = medmix.STRONG[name](images(40, 64), n, generator())
    count = torch.tensor([len(flood_fill(m)) for m in mask[:, 0].numpy()], dtype=torch.float)
    mean = count.view(4, 40).mean(1)
    assert mean[0] == 0 and mean[1] == 1
    assert mean[2] > 1.95 and mean[3] > 2.9


def test_lesions_of_all_sizes_fit_into_one_square_or_many(monkeypatch):
    """Whatever the parts, every lesion is pasted: the masks of cutout do not depend on them."""
    x, n = images(2, 64), torch.tensor([3, 5, 1, 0])
    whole = medmix.cutout(x, n, generator())
    monkeypatch.setattr(medmix, "CACHE", 1)
    single = medmix.cutout(x, n, generator())
    assert torch.equal(whole[1], single[1]) and torch.equal(whole[0], single[0])


def one_lesion(side: int, box: tuple[int, int, int, int], s: int, x: torch.Tensor):
    zero = torch.zeros(1, dtype=torch.long)
    return medmix._lesions(zero, zero, torch.tensor([box]), s, x)


@pytest.mark.parametrize("ellipse", [True, False])
@pytest.mark.parametrize("box", [(3, 4, 9, 14), (20, 17, 9, 14), (0, 0, 3, 3)])
def test_opacity_is_a_smooth_step_inside_the_outline(ellipse, box):
    x = images(1, 32)
    lesions = one_lesion(32, box, 15, x)
    got = medmix.opacity(lesions.v, lesions.u, torch.tensor([ellipse]))[0, 0]
    want = torch.zeros(15, 15, dtype=torch.float64)
    top, left, height, width = box
    for i, row in enumerate(lesions.row[0].tolist()):
        for j, col in enumerate(lesions.col[0].tolist()):
            v = (row + 0.5 - top - height / 2) / (height / 2)
            u = (col + 0.5 - left - width / 2) / (width / 2)
            r = math.hypot(v, u) if ellipse else max(abs(v), abs(u))
            t = min(max((1 - r) / 0.25, 0), 1)
            want[i, j] = 3 * t**2 - 2 * t**3
    # v, u: 4 roundings each of at most 32; times the largest slope 1.5 / 0.25, then 4 more
    assert_within(got, want, U32 * (8 * 32 * 6 + 4))
    assert (got > 0).any() and (got[lesions.v[0].abs() > 1] == 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_fisheye_and_wave_take_each_pixel_from_where_the_formula_says(seed):
    """On images that are ramps, the value of a pixel is the position that it was taken from."""
    side, s, box = 64, 28, (30, 41, 21, 17)
    top, left, height, width = box
    lesions = one_lesion(side, box, s, images(1, side))
    ramp = torch.arange(s, dtype=torch.float32) / s
    patch = torch.stack([ramp[:, None].expand(s, s), ramp.expand(s, s), torch.zeros(s, s)])[None]
    bend, curve = seed % 2 == 0, seed % 4 > 0
    fired = torch.tensor([[False, False, bend, curve]])
    got = medmix.alter(patch.clone(), fired, lesions, generator(seed))

    gen = generator(seed)  # the same draws, in the same order
    weak.jitter_steps(1, gen, medmix.LESION_JITTER, fired[:, 0])
    torch.rand(1, 1, generator=gen)  # the noise's standard deviation
    centre, radius, gamma = (y[0].double() for y in medmix.fisheye_points(1, gen))
    knot, shift = (y[0].double().tolist() for y in medmix.wave_points(1, gen))
    knot, shift = [-1.0, *knot, 1.0], [0.0, *shift, 0.0]
    want = patch.double().clone()
    offset = (top - int(lesions.row[0, 0]), left - int(lesions.col[0, 0]))
    for i in range(height):
        for j in range(width):
            v, u = (i + 0.5) * 2 / height - 1, (j + 0.5) * 2 / width - 1
            if curve:
                k = max(k for k in range(4) if v >= knot[k])
                t = (v - knot[k]) / (knot[k + 1] - knot[k])
                u += shift[k] + (shift[k + 1] - shift[k]) * (1 - math.cos(math.pi * t)) / 2
                u = -2 - u if u < -1 else 2 - u if u > 1 else u
            if bend:
                dv, du = v - centre[0].item(), u - centre[1].item()
                r = math.hypot(dv, du) / radius.item()
                factor = r ** (gamma.item() - 1) if r < 1 else 1
                v, u = centre[0].item() + dv * factor, centre[1].item() + du * factor
            row = min(max((v + 1) * height / 2 - 0.5, 0), height - 1) + offset[0]
            col = min(max((u + 1) * width / 2 - 0.5, 0), width - 1) + offset[1]
            want[0, :2, offset[0] + i, offset[1] + j] = torch.tensor([row / s, col / s])
    inside = (0, slice(0, 2), slice(offset[0], offset[0] + height))
    inside += (slice(offset[1], offset[1] + width),)
    # near the centre of the lens r^(gamma - 1) has a steep slope, hence the factor 4 on about 40
    # roundings of positions up to s pixels, in units of s
    assert_within(got[inside], want[inside], U32 * 4 * 40)
    assert not torch.equal(got[inside], patch[inside]) or not (bend or curve)


def test_control_points_are_what_they_say():
    k = 500
    centre, radius, gamma = medmix.fisheye_points(k, generator())
    angle = torch.rand(k, generator=generator(1)) * 2 * math.pi
    half = torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None] / 2 + centre
    v, u = medmix.fisheye(half[:, :1, None], half[:, 1:, None], centre, radius, gamma)
    third = torch.stack([v[:, 0, 0], u[:, 0, 0]], 1) - centre
    assert_uniform(third.norm(dim=1) / radius, 0.1 - 1e-5, 0.35 + 1e-5)
    assert_uniform(radius, 0.7, 1.3)
    grid = torch.linspace(-1, 1, 9).expand(k, 9)
    v, u = medmix.fisheye(grid[:, :, None], grid[:, None, :], centre, radius, gamma)
    assert max(v.abs().max(), u.abs().max()) <= 1 + 8 * U32

    height, shift = medmix.wave_points(k, generator())
    moved = medmix.wave(height, torch.zeros(k, 1), height, shift)[:, :, 0]
    assert_within(moved, shift.double(), 16 * U32)
    assert (height.diff() > 0).all() and (shift.sign() == -shift.sign().roll(1, 1))[:, 1:].all()
    ends = medmix.wave(torch.tensor([[-1.0, 1.0]]).expand(k, 2), grid, height, shift)
    assert_within(ends, grid[:, None, :].expand_as(ends).double(), 8 * U32)
    assert_uniform(shift.abs(), 0.2, 0.6)


def test_noise_has_its_deviation_and_leaves_grey_images_grey():
    x = torch.full((2, 3, 64, 64), 0.5)
    std = torch.tensor([0.02, 0.1]).view(2, 1, 1, 1)
    medmix.add_noise(x, std, generator())
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    # a standard deviation of k = 4096 draws is off by 1 / sqrt(2 k) of itself
    off = x[:, 0].flatten(1).std(1) / std.flatten() - 1
    assert off.abs().max() < SIGMAS / math.sqrt(2 * 4096)


# Other strong augmentations ------------------------------------------------------------------


def test_rotation_by_right_angles_moves_pixels():
    x = images(3, 17)
    for n in range(4):
        y, _ = medmix.rotation(x, torch.full((3,), n), generator())
        assert torch.equal(y, torch.from_numpy(np.rot90(x.numpy(), n, (2, 3)).copy()))
    y, _ = medmix.rotation(x, torch.ones(3, dtype=torch.long), generator(), classes=2)
    assert torch.equal(y, x.flip(2, 3))


def test_rotation_by_other_angles_against_a_loop():
    side, x = 16, images(1, 16)
    for n, classes in ((1, 8), (1, 6), (4, 5)):
        y, _ = medmix.rotation(x, torch.tensor([n]), generator(), classes=classes)
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
    assert sorted(medmix.TILES) == sorted(set(medmix.TILES))
    for n, order in enumerate(medmix.TILES):
        y, mask = medmix.permutation(x, torch.full((2,), n), generator())
        assert n == 0 or all(order[i] != i for i in range(4))
        for to in range(4):
            (i, j), (k, m) = divmod(to, 2), divmod(order[to], 2)
            new = y[:, :, i * h : i * h + h, j * h : j * h + h]
            assert torch.equal(new, x[:, :, k * h : k * h + h, m * h : m * h + h])
        assert mask.sum() == (n > 0) * 2 * (2 * h) ** 2


def test_cutout_fills_boxes_with_the_mean():
    x = images(4, 32)
    y, mask = medmix.cutout(x, torch.tensor([1, 1, 1, 1]), generator())
    for i in range(4):
        rows, cols = mask[i, 0].any(1).nonzero()[:, 0], mask[i, 0].any(0).nonzero()[:, 0]
        box = (slice(None), slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
        assert mask[i][box].all()
        want = x[i].double().mean((1, 2), keepdim=True).expand(y[i][box].shape)
        assert_within(y[i][box], want, U32 * (math.log2(32 * 32) + 4))  # a tree sum, then a blend


def test_noise_grows_with_the_class():
    x = torch.full((4, 3, 64, 64), 0.5)
    y, _ = medmix.gaussian_noise(x, torch.arange(4), generator(), std=0.05)
    std = y[:, 0].flatten(1).std(1)
    want = 0.05 * torch.arange(4)
    assert (std - want).abs().max() < 0.15 * SIGMAS / math.sqrt(2 * 4096)


@pytest.mark.gpu
def test_the_same_generator_gives_the_same_views_on_a_gpu():
    x, n = images(4, 64), torch.arange(4).repeat_interleave(4)
    for seed in range(4):
        y, mask = medmix.medmix(x, n, generator(seed))
        z, mask_gpu = medmix.medmix(x.to(DEVICE), n.to(DEVICE), generator(seed))
        assert torch.equal(mask, mask_gpu.cpu()) and (y - z.cpu()).abs().max() < 1e-4
        v, w = weak.weak(y, generator(seed)), weak.weak(y.to(DEVICE), generator(seed))
        assert (v - w.cpu()).abs().max() < 1e-3
    weak.weak(x.to(DEVICE), torch.Generator(DEVICE).manual_seed(0))
