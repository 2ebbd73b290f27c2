"""figures.py: colours, grids, overlays, outlines, the cases that a figure shows, charts."""

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


def test_frames_are_green_around_what_is_judged_correctly():
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


def test_a_heat_map_of_each_detector_stands_beside_a_new_image():
    image = np.full((3, 8, 8), 120, np.uint8)
    image[0] = 200  # no grey, which the letters have
    maps = {"padim": np.zeros((8, 8)), "igd": np.full((8, 8), 5.0)}
    scales = {"padim": (0.0, 1.0), "igd": (0.0, 5.0)}
    sheet = np.asarray(
        figures.heatmap_figure(image, maps, scales, ["padim: 0", "igd: 5"], title="T", side=40)
    )
    want = [image.transpose(1, 2, 0)[0, 0]]
    want += [np.asarray(figures.overlay(image, maps[n], scales[n], 1))[0, 0] for n in maps]
    for column, colour in enumerate(want):  # flat cells, 46 pixels apart
        cell = (sheet[:, 6 + 46 * column : 46 + 46 * column] == colour).all(-1)
        assert cell.sum() == 1600


# --- charts --------------------------------------------------------------------------------------


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def middle(pixels: np.ndarray, colour: str, line: int) -> float:
    """The column at the middle of a colour's marks, in one line of a chart with a short title."""
    top = 70 + figures.LINE + figures.ROW * line
    return float(np.flatnonzero((pixels[top : top + 20] == rgb(colour)).all(-1).any(0)).mean())


def test_a_chart_shows_each_row_and_keeps_its_marks_inside():
    values = {"a": [0.6, 0.7, 0.8], "one run": [0.9], "none": []}
    paper = {"paper: AUC": {"a": 0.99, "none": None}}
    picture = figures.dot_chart(values, paper, title="T", axis="AUROC", note="note " * 40)
    assert picture.height > 34 * 3 and picture.width > 640
    colours = {colour for _, colour in picture.getcolors(2**16)}
    assert {rgb(c) for c in (figures.BLUE, figures.PALE, figures.COMPARED[0])} <= colours
    empty = figures.dot_chart({"none": []}, {}, title="T", axis="AUROC")
    assert empty.width >= 640
    same = figures.dot_chart({"a": [0.5]}, {}, title="T", axis="AUROC")
    assert same.height == empty.height


def test_marks_of_a_chart_stand_at_their_values():
    values = {"low": [0.5], "high": [0.9], "mean": [0.6, 0.7, 0.8]}
    paper = {"paper": {"low": 0.9, "high": 0.5, "mean": None}}
    pixels = np.asarray(figures.dot_chart(values, paper, title="T", axis="AUROC"))
    low, high, mean = (middle(pixels, figures.BLUE, line) for line in range(3))
    assert high - low > 300
    assert abs(mean - (low + high) / 2) <= 1  # the bar ends 0.1 on either side
    assert abs(middle(pixels, figures.COMPARED[0], 0) - high) <= 1
    assert abs(middle(pixels, figures.COMPARED[0], 1) - low) <= 1
    bar = (pixels == rgb(figures.BLUE)).all(-1)[70 + figures.LINE + 2 * figures.ROW :].any(0)
    assert abs(np.flatnonzero(bar).size - (high - low) / 2) <= 3
