"""medmix.py: what the lesions are made of, where they lie, and how often each alteration fires.

That nothing changes but the mask is in test_strong.py, for all strong sets.

Tolerances count roundings of U32 = 2^-24 against float64 on the same bits. Frequencies may differ
from their probability by SIGMAS standard deviations of the binomial; seeds are fixed.
"""

from __future__ import annotations

import itertools
import math

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

import medmix
import weak

JITTER, NOISE, FISHEYE, WAVE = range(4)  # the columns of `alterations`


def test_class_n_shows_n_lesions():
    x, n = images(40, 64), torch.arange(4).repeat_interleave(40)
    y, mask = medmix.medmix(x, n, generator())
    changed = (y != x.repeat(4, 1, 1, 1)).any(1)
    for regions in (mask[:, 0], changed):
        count = torch.tensor([len(flood_fill(m)) for m in regions.numpy()], dtype=torch.float)
        mean = count.view(4, 40).mean(1)
        assert mean[0] == 0 and mean[1] == 1
        assert abs(mean[2] - 2) < 0.05 and abs(mean[3] - 3) < 0.1
    assert changed[n > 0].sum() > 0.9 * mask[n > 0].sum()


def test_medmix_says_what_it_cannot_take():
    x, n = images(2, 16), torch.tensor([0, 1])
    for bad in (x[0], x[:, :2], x[..., :8], images(2, 7), (x * 255).byte()):
        with pytest.raises(ValueError, match="images must be"):
            medmix.medmix(bad, n, generator())
    for bad in (n[:1], n.float(), n[:, None], torch.zeros(0, dtype=torch.long), torch.arange(3)):
        with pytest.raises(ValueError, match="n must be"):
            medmix.medmix(x, bad, generator())
    for bad, classes in ((n - 1, None), (n + 1, 2)):
        with pytest.raises(ValueError, match=r"n must be in 0\.\.classes-1"):
            medmix.medmix(x, bad, generator(), classes=classes)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="p must be"):
            medmix.medmix(x, n, generator(), p=p)
    for low, high in ((0, 0.1), (0.2, 0.1), (0.1, 1.1)):
        with pytest.raises(ValueError, match="min_area"):
            medmix.medmix(x, n, generator(), min_area=low, max_area=high)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        medmix.medmix(x[:1], n[1:], generator())
    assert torch.equal(medmix.medmix(x[:1], n[:1], generator())[0], x[:1])
    assert medmix.medmix(x, n, generator(), p=1, min_area=1, max_area=1)[1][1].any()  # no mistake


# Where lesions lie ---------------------------------------------------------------------------


def test_lesion_sizes_and_places():
    side, n = 256, torch.ones(4000, dtype=torch.long)
    ((image, box),) = medmix.lesions(n, side, generator(), 0.005, 0.08)
    assert torch.equal(image, torch.arange(4000))
    top, left, height, width = box.double().unbind(1)
    area, aspect = height * width / side**2, (height / width).log()
    # a side is rounded by half a pixel: of 10.5 px, the smallest, that is 5%
    assert 0.9 * 0.005 < area.min() and area.max() < 1.05 * 0.08
    rounded = 1e-4  # mean effect of rounding both sides, (1/12) / side^2 each, and its spread
    assert abs(area.mean() - 0.0425) < SIGMAS * 0.075 / math.sqrt(12 * 4000) + rounded
    assert_uniform(aspect, -math.log(3) - 0.1, math.log(3) + 0.1)
    for start, size in ((top, height), (left, width)):
        assert start.min() >= 0 and (start + size).max() <= side
        assert_uniform((start + 0.5) / (side - size + 1), 0, 1)


def test_ranks_are_those_of_the_class_and_the_largest_comes_first():
    n = torch.tensor([3, 0, 1, 5] * 50)
    ranks = list(medmix.lesions(n, 64, generator(), 0.005, 0.08))
    assert len(ranks) == 5
    areas = torch.zeros(len(n), 5)
    for rank, (image, box) in enumerate(ranks):
        assert torch.equal(image, (n > rank).nonzero()[:, 0]) and box.shape == (len(image), 4)
        areas[image, rank] = (box[:, 2] * box[:, 3]).float()
    shown = torch.arange(1, 5) < n[:, None]
    # sides are rounded by half a pixel, of at least 2.6 px
    assert (areas[:, 1:] <= 1.5 * areas[:, :-1])[shown].all()
    assert (areas[:, 1:] <= areas[:, :-1])[shown].double().mean() > 0.9


def test_of_sixteen_places_the_emptiest_is_taken():
    n = torch.full((2000,), 3)  # three lesions of 0.1 to 0.15 of the image each
    boxes = [box.double() for _, box in medmix.lesions(n, 64, generator(), 0.1, 0.15)]
    shared = []
    for a, b in itertools.combinations(boxes, 2):
        first = a[:, :2].maximum(b[:, :2])
        last = (a[:, :2] + a[:, 2:]).minimum(b[:, :2] + b[:, 2:])
        shared.append((last - first).clamp(min=0).prod(1))
    # pixels; of 1, 4, 8, 16 and 32 places: 95, 23, 9.5, 3.9 and 2.2, each to a tenth or so
    assert 3 < torch.cat(shared).mean() < 5.5


def test_squares_hold_the_boxes_and_number_their_pixels():
    side, x = 32, images(4, 32)
    box = torch.tensor([[3, 4, 9, 14], [20, 17, 9, 14], [0, 0, 3, 3], [29, 29, 3, 3]])
    image = torch.tensor([1, 0, 3, 2])
    at, v, u = medmix.squares(image, box, x)
    inside = (v.abs() < 1) & (u.abs() < 1)
    assert at.shape == (4, 3, 14, 14) and v.shape == u.shape == (4, 14, 14)
    for k, (top, left, height, width) in enumerate(box.tolist()):
        want = torch.arange(4 * 3 * side * side).view(4, 3, side, side)[image[k]]
        want = want[:, top : top + height, left : left + width]
        assert torch.equal(at[k][:, inside[k]], want.flatten(1))
        rows = (torch.arange(height, dtype=torch.float64) + 0.5) * 2 / height - 1
        cols = (torch.arange(width, dtype=torch.float64) + 0.5) * 2 / width - 1
        assert_within(v[k][inside[k]], rows.repeat_interleave(width), 4 * U32)
        assert_within(u[k][inside[k]], cols.repeat(height), 4 * U32)


@pytest.mark.parametrize("ellipse", [True, False])
def test_opacity_is_a_smooth_step_inside_the_outline(ellipse):
    v, u = torch.linspace(-1.6, 1.6, 33).view(1, 33, 1), torch.linspace(-1.2, 1.2, 29)
    v, u = v.expand(1, 33, 29), u.expand(1, 33, 29)
    got = medmix.opacity(v, u, torch.tensor([ellipse]))[0, 0]
    want = torch.zeros(33, 29, dtype=torch.float64)
    for i in range(33):
        for j in range(29):
            a, b = v[0, i, j].item(), u[0, i, j].item()
            r = math.hypot(a, b) if ellipse else max(abs(a), abs(b))
            t = min(max((1 - r) / 0.25, 0), 1)
            want[i, j] = 3 * t**2 - 2 * t**3
    # r: 4 roundings, times the largest slope 1.5 / 0.25, then 4 more
    assert_within(got, want, U32 * (4 * 6 + 4))
    assert got.max() == 1 and (got[(v[0].abs() >= 1) | (u[0].abs() >= 1)] == 0).all()


# What they are made of -----------------------------------------------------------------------


def test_patches_are_windows_of_other_images():
    b, side, height, width, k = 4, 12, 5, 7, 400
    x, image = images(b, side), torch.arange(400)
    box = torch.tensor([[2, 1, height, width]]).expand(k, 4)
    _, v, u = medmix.squares(image, box, x)
    inside = (v[0].abs() < 1) & (u[0].abs() < 1)
    patch = medmix.cut(x, image, box, v, u, generator())[:, :, inside]  # (k, 3, 35)
    windows = x.unfold(2, height, 1).unfold(3, width, 1).flatten(4)  # (b, 3, 8, 6, 35)
    windows = windows.permute(0, 2, 3, 1, 4).flatten(0, 2)
    error, which = (patch[:, None] - windows).abs().flatten(2).amax(2).min(1)
    # positions of up to `side` pixels have about 10 roundings in each axis, the slope is at most 1
    assert error.max() <= U32 * (2 * 10 * side + 4)
    source, top, left = which // 48, which // 6 % 8, which % 6
    away = (source - image) % b
    assert away.min() > 0
    for step in range(1, b):
        assert_frequency(away == step, 1 / 3)
    for place, count in ((top, 8), (left, 6)):
        for i in range(count):
            assert_frequency(place == i, 1 / count)


def flat_images(b: int, side: int) -> torch.Tensor:
    """Image i has the grey level i / (b - 1) everywhere."""
    return (torch.arange(b) / (b - 1)).view(b, 1, 1, 1).expand(b, 3, side, side).contiguous()


def lesion_middles(strong, b: int, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of each output's own image, and of the one that its lesion came from."""
    x, own = flat_images(b, 16), torch.arange(b).repeat(copies)
    y, _ = strong(x, torch.ones(b * copies, dtype=torch.long), generator())
    # the middle of a lesion is what changed most; outlines are mixtures
    change = (y - x.repeat(copies, 1, 1, 1))[:, 0].flatten(1)
    most = change.gather(1, change.abs().argmax(1, keepdim=True))[:, 0]
    source = (own / (b - 1) + most) * (b - 1)
    # some of 3 pixel sides have no fully opaque pixel: their middle is at 2/3 of an edge, or more
    core = (source - source.round()).abs() < 1e-3
    assert core.double().mean() > 0.9
    return own[core], source[core].round().long()


def test_lesions_come_from_other_images_and_from_all_of_them():
    def unaltered(x, n, draws):
        return medmix.medmix(x, n, draws, p=0, at_least_one=False)

    b = 5
    own, source = lesion_middles(unaltered, b, 200)
    away = (source - own) % b
    assert (away > 0).all()
    for step in range(1, b):
        assert_frequency(away == step, 1 / (b - 1))


def test_lesions_are_blended_by_their_opacity(monkeypatch):
    """A white patch on black images shows the opacity; the mask is where it is above 0."""
    shares = []

    def opacity(*inputs):
        shares.append(true_opacity(*inputs))
        return shares[-1]

    true_opacity = medmix.opacity
    monkeypatch.setattr(medmix, "opacity", opacity)
    monkeypatch.setattr(
        medmix, "cut", lambda x, image, box, v, u, g: torch.ones(len(v), 3, *v[0].shape)
    )
    x, n = torch.zeros(20, 3, 48, 48), torch.ones(20, dtype=torch.long)
    y, mask = medmix.medmix(x, n, generator(), p=0, at_least_one=False)
    assert torch.equal(mask.expand_as(y), y > 0)
    for i in range(20):
        shown, share = y[i, :, mask[i, 0]], shares[0][i, 0]
        assert_within(shown, share[share > 0].double().expand(3, -1), 2 * U32)
    assert y.flatten(1).amax(1).min() > 0.5 and ((y > 0) & (y < 1)).any()


def test_pasting_keeps_the_range():
    """Bilinear weights may add up to 1 + 2^-23."""
    x, at = torch.zeros(1, 3, 8, 8), torch.arange(192).view(1, 3, 8, 8)
    medmix.paste(x, x.bool(), at, torch.full((1, 3, 8, 8), 1 + 2**-23), torch.ones(1, 1, 8, 8))
    assert torch.equal(x, torch.ones(1, 3, 8, 8))


def test_half_of_the_lesions_are_elliptic():
    x, n = flat_images(2, 32), torch.ones(1000, dtype=torch.long)
    _, mask = medmix.medmix(x, n, generator(), min_area=0.05)
    filled = []
    for m in mask[:, 0]:
        rows, cols = m.any(1).sum(), m.any(0).sum()
        filled.append(m.sum() / (rows * cols) > 0.95)  # a rectangle fills its box, an ellipse 79%
    assert_frequency(torch.stack(filled), 0.5)


def test_at_least_one_alteration_and_each_with_its_probability():
    fired = medmix.alterations(4000, generator(), 0.25, False)
    assert fired.shape == (4000, 4)
    for j in range(4):
        assert_frequency(fired[:, j], 0.25)
        assert_frequency(fired[:, j] & fired[:, j - 1], 0.25**2)
    assert_frequency(~fired.any(1), 0.75**4)

    fired = medmix.alterations(4000, generator(1), 0.25, True)
    assert fired.any(1).all()
    for j in range(4):
        assert_frequency(fired[:, j], 0.25 + 0.75**4 / 4)
    assert medmix.alterations(50, generator(), 1.0, True).all()
    assert torch.equal(medmix.alterations(50, generator(), 0.0, True).sum(1), torch.ones(50))


def test_medmix_draws_its_alterations_as_told(monkeypatch):
    told, true_alterations = [], medmix.alterations

    def alterations(k, draws, p, at_least_one):
        told.append((k, p, at_least_one))
        return true_alterations(k, draws, p, at_least_one)

    monkeypatch.setattr(medmix, "alterations", alterations)
    x, n = images(4, 16), torch.tensor([0, 2, 1, 2])
    medmix.medmix(x, n, generator())
    medmix.medmix(x, n, generator(), p=0.5, at_least_one=False)
    assert told == [(3, 0.25, True), (2, 0.25, True), (3, 0.5, False), (2, 0.5, False)]


COLOUR = torch.tensor([0.6, 0.4, 0.3])


def altered(monkeypatch, fired: torch.Tensor):
    """One lesion on each image, cut from images of one COLOUR, altered where `fired` (N, 4) says.

    returns: v, u (N, s, s) before and after the alterations, and the patches (N, 3, s, s).
    """
    seen = {}

    def squares(*inputs):
        at, v, u = true_squares(*inputs)
        seen["before"] = (v.clone(), u.clone())
        return at, v, u

    def cut(x, image, box, v, u, draws):
        seen["after"] = (v.clone(), u.clone())
        return COLOUR.view(1, 3, 1, 1).repeat(len(v), 1, *v.shape[1:])

    def paste(out, mask, at, patch, share):
        seen["patch"] = patch.clone()

    true_squares = medmix.squares
    for name, stand_in in (("squares", squares), ("cut", cut), ("paste", paste)):
        monkeypatch.setattr(medmix, name, stand_in)
    monkeypatch.setattr(medmix, "alterations", lambda *_: fired)
    n = torch.ones(len(fired), dtype=torch.long)
    medmix.medmix(images(len(fired), 64), n, generator())
    return seen["before"], seen["after"], seen["patch"]


@pytest.mark.parametrize("which", [JITTER, NOISE, FISHEYE, WAVE])
def test_each_alteration_changes_the_lesions_on_which_it_fires(monkeypatch, which):
    fired = torch.zeros(12, 4, dtype=torch.bool)
    fired[::2, which] = True
    (v, u), (v_from, u_from), patch = altered(monkeypatch, fired)
    plain = COLOUR.view(1, 3, 1, 1).expand_as(patch)
    changes = {
        "v": (v_from != v, which == FISHEYE),
        "u": (u_from != u, which in (FISHEYE, WAVE)),
        "colour": (patch != plain, which in (JITTER, NOISE)),
    }
    for name, (change, expected) in changes.items():
        change = change.flatten(1).any(1)
        assert change[::2].all() if expected else not change[::2].any(), name
        assert not change[1::2].any(), name


def test_a_lesion_may_have_all_alterations(monkeypatch):
    (v, u), (v_from, u_from), patch = altered(monkeypatch, torch.ones(4, 4, dtype=torch.bool))
    assert (v_from != v).any() and (u_from != u).any()
    noise = patch - patch.mean((2, 3), keepdim=True)
    assert (noise.flatten(1).std(1) > 0.01).all()


def test_each_lesion_has_its_own_jitter(monkeypatch):
    fired = torch.tensor([[True, False, False, False]]).expand(8, 4)
    _, _, patch = altered(monkeypatch, fired)
    colours = patch[:, :, 0, 0]
    assert torch.equal(patch, colours[:, :, None, None].expand_as(patch))
    assert ((colours[:, None] - colours).abs().amax(2) + torch.eye(8)).min() > 1e-3
    seen = []
    monkeypatch.setattr(medmix, "jitter", lambda x, *rest: seen.append(rest) or x)
    (v, u), _, _ = altered(monkeypatch, fired)
    ((strength, _, region),) = seen
    assert strength == (0.6, 0.6, 0.6, 0.1)
    assert torch.equal(region[:, 0], (v.abs() < 1) & (u.abs() < 1))  # of the contrast


def test_each_lesion_has_its_own_noise_in_all_channels(monkeypatch):
    fired = torch.tensor([[False, True, False, False]]).expand(1000, 4)
    _, _, patch = altered(monkeypatch, fired)
    noise = patch - COLOUR.view(1, 3, 1, 1)
    for channel in (1, 2):
        difference = (noise[:, 0] - noise[:, channel])[(patch > 0).all(1) & (patch < 1).all(1)]
        assert difference.abs().max() <= 4 * U32
    # the deviation of the patch's hundreds of draws is off by some 3% of itself: 0.01 at most
    assert_uniform(noise[:, 1].flatten(1).std(1), 0.03 - 0.01, 0.12 + 0.01)


def test_noise_has_its_deviation_and_leaves_grey_images_grey():
    x, std = torch.full((2, 3, 64, 64), 0.5), torch.tensor([0.02, 0.1])
    y = medmix.add_noise(x, std, generator())
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    # a standard deviation of k = 4096 draws is off by 1 / sqrt(2 k) of itself
    off = y[:, 0].flatten(1).std(1) / std - 1
    assert off.abs().max() < SIGMAS / math.sqrt(2 * 4096)


def test_fisheye_has_the_control_points_that_it_states():
    """Centre, radius and gamma of each lens, found from where it moves a grid of points."""
    k = 300
    axis = torch.linspace(-1, 1, 41, dtype=torch.float64)
    v, u = (y.expand(k, 41, 41) for y in (axis[:, None], axis[None, :]))
    v_from, u_from = medmix.fisheye(v, u, generator())
    points, ends = (torch.stack(y, 3).flatten(1, 2) for y in ((v, u), (v_from, u_from)))
    move = points - ends  # (k, 1681, 2), along the line from the centre
    across = torch.stack([-move[..., 1], move[..., 0]], 2)
    offset = (across * points).sum(2, keepdim=True)
    centre = torch.linalg.lstsq(across, offset).solution[..., 0]  # (k, 2)
    assert_uniform(centre, -0.4, 0.4)
    r, r_from = ((y - centre[:, None]).norm(dim=2) for y in (points, ends))
    moved = move.norm(dim=2) > 1e-9
    assert (r_from[moved] < r[moved]).all()
    far, near = (
        r.where(moved, -1.0).argmax(1, True),
        r.where(moved & (r > 0.1), 9.0).argmin(1, True),
    )
    (log_far, from_far), (log_near, from_near) = (
        (r.gather(1, i).log(), r_from.gather(1, i).log()) for i in (far, near)
    )
    gamma = (from_far - from_near) / (log_far - log_near)  # r' = R (r / R)^gamma
    radius = ((from_far - gamma * log_far) / (1 - gamma)).exp()
    assert_uniform(radius, 0.7, 1.3)
    assert_uniform(0.5**gamma, 0.1, 0.35)  # r' / R of the point half-way to the rim
    want = torch.where(r < radius, radius * (r / radius) ** gamma, r)
    assert (r_from - want).abs().max() < 1e-6  # what finding the lens leaves


def test_wave_has_the_control_points_that_it_states():
    """Heights and displacements of the three points, found from the extremes of the curve."""
    k, rows = 400, 4001
    v = torch.linspace(-1, 1, rows, dtype=torch.float64).view(1, rows, 1).expand(k, rows, 1)
    f = medmix.wave(v, torch.zeros_like(v), generator())[..., 0]  # (k, rows)
    assert f[:, [0, -1]].abs().max() < 1e-6
    sign = f[:, 1].sign()
    assert_frequency(sign > 0, 0.5)
    middle = (-sign[:, None] * f).argmax(1)
    before = torch.arange(rows) < middle[:, None]
    pushed = sign[:, None] * f
    knots = [pushed.where(before, -9.0).argmax(1), middle, pushed.where(~before, -9.0).argmax(1)]
    height = torch.stack([v[0, i, 0] for i in knots], 1)  # (k, 3)
    shift = torch.stack([f.gather(1, i[:, None])[:, 0] for i in knots], 1)
    for j, low in enumerate((-5 / 6, -1 / 6, 1 / 2)):
        assert_uniform(height[:, j], low - 1e-3, low + 1 / 3 + 1e-3)
    assert_uniform(shift.abs(), 0.2 - 1e-6, 0.6 + 1e-6)
    ends = torch.ones(k, 1, dtype=torch.float64)
    height, shift = torch.cat([-ends, height, ends], 1), torch.cat([0 * ends, shift, 0 * ends], 1)
    for j in range(4):  # a cosine passes a quarter of the way at a third of the time
        for t, share in ((1 / 3, 1 / 4), (1 / 2, 1 / 2)):
            at = height[:, j] + t * (height[:, j + 1] - height[:, j])
            i = ((at + 1) / 2 * (rows - 1)).round().long()
            want = shift[:, j] + share * (shift[:, j + 1] - shift[:, j])
            # heights are found, and rounded, to half a row: 1e-3 of slopes up to 12
            assert (f.gather(1, i[:, None])[:, 0] - want).abs().max() < 0.012


def test_wave_mirrors_the_patch_at_its_sides():
    v = torch.linspace(-1, 1, 21).view(1, 21, 1).expand(50, 21, 21)
    u = v.mT
    moved = medmix.wave(v, torch.zeros_like(u), generator()) + u
    want = torch.where(moved > 1, 2 - moved, torch.where(moved < -1, -2 - moved, moved))
    assert ((want - moved) != 0).any()
    assert_within(medmix.wave(v, u, generator()), want.double(), 8 * U32)


@pytest.mark.gpu
def test_the_same_generator_gives_the_same_views_on_a_gpu(monkeypatch):
    """But for the noise, which a GPU draws itself, and the order of the jitter in small chunks."""
    monkeypatch.setattr(medmix, "add_noise", lambda x, std, generator: x)
    x, n = images(4, 64), torch.arange(4).repeat_interleave(4)
    for seed in range(4):
        y, mask = medmix.medmix(x, n, generator(seed))
        z, mask_gpu = medmix.medmix(x.to(DEVICE), n.to(DEVICE), generator(seed))
        assert torch.equal(mask, mask_gpu.cpu()) and (y - z.cpu()).abs().max() < 1e-4
        v, w = weak.weak(y, generator(seed)), weak.weak(y.to(DEVICE), generator(seed))
        assert (v - w.cpu()).abs().max() < 1e-3
    weak.weak(x.to(DEVICE), torch.Generator(DEVICE).manual_seed(0))
    medmix.medmix(x.to(DEVICE), n, torch.Generator(DEVICE).manual_seed(0))


def test_lesions_have_three_pixels_a_side_and_one_between_them():
    ((_, box),) = medmix.lesions(torch.ones(200, dtype=torch.long), 16, generator(), 0.005, 0.005)
    assert box[:, 2:].min() == 3  # 1.3 pixels of area as drawn
    ranks = medmix.lesions(torch.full((4000,), 2), 64, generator(), 0.005, 0.02)
    (_, one), (_, two) = ranks  # so small that one of the places is always free
    start = one[:, :2].maximum(two[:, :2])
    end = (one[:, :2] + one[:, 2:]).minimum(two[:, :2] + two[:, 2:])
    assert (start - end).amax(1).min() == 1
