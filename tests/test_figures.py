"""figures.py: colours, grids, overlays, outlines and the cases that a figure shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from support import figures, layouts


def test_heat_colours_grow_brighter():
    colours = figures.heat_colours(np.linspace(-0.5, 1.5, 200)).astype(int)
    light = colours @ [299, 587, 114]
    assert (np.diff(light) >= -300).all()  # rounding of one step
    assert (colours[0] == (0, 0, 4)).all() and (colours[-1] == (252, 255, 164)).all()


def test_image_grid_holds_its_cells_and_labels():
    red = np.zeros((3, 8, 8), np.uint8)
    red[0] = 200
    blue = Image.new("RGB", (5, 9), (0, 0, 255))
    sheet = figures.image_grid(
        [[red, None], [None, blue]], rows=["a", "b"], columns=["c", "d"], side=40
    )
    pixels = np.asarray(sheet)
    assert (pixels == (200, 0, 0)).all(-1).sum() == (pixels == (0, 0, 255)).all(-1).sum() == 1600
    bare = np.asarray(figures.image_grid([[red, None], [None, blue]], side=40))
    assert bare.shape == (2 * 46 + 6, 2 * 46 + 6, 3)
    assert (pixels < 60).all(-1).sum() > 20  # the letters


def test_overlay_uses_the_scale_that_is_given():
    image = np.full((3, 8, 8), 120, np.uint8)
    low, high = (np.asarray(figures.overlay(image, np.full((8, 8), v), (0, 10), 8)) for v in (1, 9))
    assert (high > low).all()
    again = np.asarray(figures.overlay(image, np.full((8, 8), 0.1), (0, 1), 8))
    assert np.abs(again.astype(int) - low).max() <= 1


def test_outline_follows_the_mask():
    mask = np.zeros((32, 32), bool)
    mask[8:24, 10:20] = True
    shown = np.asarray(figures.outlined(np.zeros((3, 32, 32), np.uint8), mask, (255, 225, 0), 32))
    edge = (shown == (255, 225, 0)).all(-1)
    assert edge[8, 10:20].all() and edge[8:24, 10].all() and not edge[12:20, 14:16].any()
    assert (shown.any(-1) == mask).all()


def test_cases_for_a_figure_cover_the_best_and_the_worst():
    scores = np.arange(20.0)
    labels = np.arange(20) % 2 == 0
    shown = figures.choose_cases(scores, labels, scores != 18, lesions=3, normals=2)
    assert shown == [16, 8, 0, 19, 1]
    assert figures.choose_cases(scores, labels, scores < 1) == [0]


def test_frames_are_green_around_what_is_judged_rightly():
    images = np.zeros((4, 3, 16, 16), np.uint8)
    samples = [layouts.Sample(Path("x"), label, "kind") for label in (1, 0, 1, 0)]
    scores = np.array([2.0, 0.0, 0.5, 1.0])  # found, passed, missed, false alarm
    row = {"threshold": 1.0, "map_scale": (0.0, 1.0), "pixel_threshold": 0.5}
    maps, masks = np.zeros((4, 16, 16), np.float32), np.zeros((4, 16, 16), bool)
    figure = figures.localisation_figure(images, maps, masks, samples, scores, row, [0, 1, 2, 3])
    pixels = np.asarray(figure)
    for colour, column in ((figures.GREEN, (0, 1)), (figures.RED, (2, 3))):
        x = np.flatnonzero((pixels == colour).all(-1).any(0)) - (pixels.shape[1] - 4 * 166)
        assert sorted({k // 166 for k in x.tolist()}) == list(column)
    plain = figures.localisation_figure(images, maps, None, samples, scores, row, [0, 1, 2, 3])
    assert figure.height - plain.height == 2 * 166  # no prediction, no ground truth
