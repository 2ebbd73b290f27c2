"""figures.py: colours, grids, overlays, outlines, the cases that a figure shows, charts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

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
    titled = [figures.image_grid([[red]], title="word " * n, side=90) for n in (1, 20)]
    black = [(np.asarray(sheet) < 60).all(-1).sum() for sheet in titled]
    assert black[1] > 15 * black[0]  # a long title is wrapped, not cut


def test_overlay_uses_the_scale_that_is_given():
    image = Image.new("L", (8, 8), 120)
    low, high = (np.asarray(figures.overlay(image, np.full((8, 8), v), (0, 10))) for v in (1, 9))
    assert (high > low).all()
    again = np.asarray(figures.overlay(image, np.full((8, 8), 0.1), (0, 1)))
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
    assert figure.height - plain.height == 2 * 166 + 18  # two rows, and a line of the note


@pytest.mark.parametrize("size", [(40, 30), (8, 8), (700, 500)])
def test_an_overlay_has_the_images_size_and_its_scale_beside_it(size):
    grey = Image.new("L", size, 100)
    heat = np.linspace(-1, 3, 64).reshape(8, 8).astype(np.float32)
    sheet = figures.overlay_with_bar(grey, heat, (0.0, 2.0))
    assert sheet.height == size[1] and sheet.width > size[0] + figures.BAR
    pixels = np.asarray(sheet)
    for corner, value in (((0, 0), 0.0), ((-1, size[0] - 1), 1.0)):
        want = 0.6 * figures.heat_colours(np.array(value)) + 0.4 * 100
        assert np.abs(pixels[corner] - want).max() <= 2
    bar = pixels[:, size[0] + 6 : size[0] + 6 + figures.BAR]
    assert (bar[0] == figures.heat_colours(np.array(1.0))).all()
    assert (bar[-1] == figures.heat_colours(np.array(0.0))).all()


def test_the_numbers_beside_an_overlay_stand_where_their_colours_are(monkeypatch):
    written = {}

    def text(self, at, words, *_, anchor):
        written[words] = at[1]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    figures._bar_of_colours.__wrapped__(100, 0.5, 2.5)
    assert written == {"2.5": 0, "1.5": 50, "0.5": 100}  # bright above


def test_what_is_found_in_an_image_judged_normal_is_dashed_and_not_tinted():
    image, mask = np.full((3, 32, 32), 90, np.uint8), np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    solid, dashed = (
        np.asarray(figures.outlined(image, mask, figures.YELLOW, 64, dashed=d))
        for d in (False, True)
    )
    drawn = (solid == figures.YELLOW).all(-1).sum(), (dashed == figures.YELLOW).all(-1).sum()
    assert 0.3 * drawn[0] < drawn[1] < 0.7 * drawn[0]
    assert (dashed[32, 32] == 90).all() and not (solid[32, 32] == 90).all()
    images, maps = np.stack([image, image]), np.stack([mask, mask]).astype(np.float32)
    samples = [layouts.Sample(Path("x"), 1, "kind")] * 2
    row = {"threshold": 1.0, "map_scale": (0.0, 1.0), "pixel_threshold": 0.5}
    figure = figures.localisation_figure(
        images, maps, maps > 0, samples, np.array([2.0, 0.0]), row, [0, 1]
    )
    yellow = (np.asarray(figure) == figures.YELLOW).all(-1).sum(0)
    assert 0.3 * yellow[-332:-166].sum() < yellow[-166:].sum() < 0.7 * yellow[-332:-166].sum()


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


# --- what a picture shows is of its image --------------------------------------------------------


def corners() -> np.ndarray:
    """Four maps of 32 px, each 1 in one quarter, row by row from above left."""
    maps = np.zeros((4, 32, 32), np.float32)
    for k in range(4):
        maps[k, k // 2 * 16 :, k % 2 * 16 :][:16, :16] = 1
    return maps


def quarter(image: Image.Image) -> int:
    """The brightest of an image's four quarters."""
    grey = np.asarray(image.convert("L")).astype(float)
    h, w = (n // 2 * 2 for n in grey.shape)
    return int(grey[:h, :w].reshape(2, h // 2, 2, w // 2).mean(axis=(1, 3)).argmax())


def test_every_picture_of_a_column_is_of_its_image(monkeypatch):
    maps, samples = corners(), [layouts.Sample(Path("x"), k, "") for k in (0, 0, 0, 1)]
    row = {"threshold": 0.5, "map_scale": (0.0, 1.0), "pixel_threshold": 0.5}
    monkeypatch.setattr(figures, "image_grid", lambda cells, **more: (cells, more))
    black, scores = np.zeros((4, 3, 32, 32), np.uint8), np.array([0.0, 1.0, 2.0, 0.2])
    cells, more = figures.localisation_figure(
        black, maps, maps[::-1] > 0, samples, scores, row, [3, 1]
    )
    for what, wanted in (("heat map", [3, 1]), ("prediction", [3, 1]), ("ground truth", [0, 2])):
        assert [quarter(cell) for cell in cells[more["rows"].index(what)]] == wanted, what
    assert [c.splitlines()[1] for c in more["columns"]] == ["0.2, missed", "1, false alarm"]


def test_the_scale_of_heat_maps_ends_at_the_abnormal_images():
    maps, labels = np.random.default_rng(0).random((6, 32, 32)), np.arange(6) % 2
    maps[1::2] += 3
    want = np.median(maps[::2]), np.percentile(maps[1::2], 99.5)
    assert figures.map_scale(maps, labels) == want


def test_a_picture_keeps_its_rows_and_columns():
    image = np.zeros((3, 32, 32), np.uint8)
    image[:, :16, 16:] = 255
    assert quarter(figures.picture(image, 64)) == 1
    assert quarter(figures.picture(image.transpose(1, 2, 0), 64)) == 1


def test_a_reconstruction_stands_below_its_image(monkeypatch):
    monkeypatch.setattr(figures, "image_grid", lambda cells, **_: cells)
    x, x_tilde = np.full((2, 3, 32, 32), 0.2), np.full((2, 3, 32, 32), 0.8)
    cells = figures.reconstruction_figure(x, x_tilde, (), "dae")
    assert [int(row[0].flat[0]) for row in cells] == [51, 204, 255]
