"""Grids, heat maps, outlines and charts, drawn with pillow: Fig. 3-7 of the paper.   [P:§4.6-4.7]

N images, S pixels a side. Images are (3, S, S) or (S, S, 3) uint8 or PIL's, heat maps (S, S).
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from support.charts import spread_out
from support.layouts import Sample
from support.run import write_file

_INFERNO = np.array(  # dark is low, bright is high, for every kind of colour vision
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
     (250, 193, 39), (252, 255, 164)]
)  # fmt: skip
VERDICTS = (("passed", "false alarm"), ("missed", "found"))  # [abnormal][judged abnormal]
GREEN, RED, YELLOW, CYAN = (40, 160, 60), (215, 40, 40), (255, 225, 0), (0, 235, 235)


def heat_colours(x: Array) -> Array:
    """Values in [0, 1] to RGB uint8, from dark violet to light yellow; clipped outside."""
    at = np.clip(x, 0, 1) * (len(_INFERNO) - 1)
    channels = [np.interp(at, np.arange(len(_INFERNO)), c) for c in _INFERNO.T]
    return np.stack(channels, -1).round().astype(np.uint8)


_PALETTE = heat_colours(np.arange(256) / 255).tobytes()


def map_scale(maps: Array, labels: Array | None = None) -> tuple[float, float]:
    """The ends of the colour scale that all heat maps of a detector share.

    returns: the median pixel of the normal images, so that what is normal is dark, and the 99.5th
             percentile of the abnormal ones; from a grid of at most 64 x 64 pixels of each image.
             Without labels both are of all images.
    """
    step = -(-maps.shape[-1] // 64)
    normal = abnormal = maps[:, ::step, ::step]
    if labels is not None:
        normal, abnormal = normal[labels == 0], abnormal[labels != 0]
    low, high = float(np.median(normal)), float(np.percentile(abnormal, 99.5))
    return low, max(high, low + 1e-6 * max(abs(low), 1))


def image_grid(
    cells: Sequence[Sequence[Array | Image.Image | None]],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    side: int = 160,
    text: int = 14,
) -> Image.Image:
    """A labelled grid of images on white.

    cells:   rows of images: PIL, (3, S, S) or (S, S, 3) uint8; None leaves the place empty.
    rows:    a label left of each row.   columns: a label above each column, of one line or more.
    title:   at the top, larger.         note:    at the bottom, wrapped.
    side:    of a cell, in pixels; images are resized to it.   text: height of the letters.
    """
    font, large, gap = ImageFont.load_default(text), ImageFont.load_default(1.3 * text), 6
    line, wide = round(1.3 * text), 0.43 * text  # a line's height, a letter's width
    left = gap + (gap + int(max(font.getlength(r) for r in rows)) if rows else 0)
    width = left + max(len(row) for row in cells) * (side + gap)
    heads = ["\n".join(part[: int(side / wide)] for part in c.splitlines()) for c in columns]
    notes = textwrap.wrap(note, int(width / (1.16 * wide)), break_on_hyphens=False)
    titles = textwrap.wrap(title, int(width / (1.5 * wide)), break_on_hyphens=False)
    tallest = max((h.count("\n") + 1 for h in heads), default=0)
    top = gap + 2 * text * len(titles) + line * tallest
    bottom = top + len(cells) * (side + gap)
    sheet = Image.new("RGB", (width, bottom + line * len(notes) + (8 if note else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, part in enumerate(titles):
        draw.text((gap, gap + 2 * text * k), part, "black", large)
    draw.multiline_text((gap, bottom + 2), "\n".join(notes), "black", font, spacing=3)
    for c, head in enumerate(heads):
        at = (left + c * (side + gap), top - line * (head.count("\n") + 1) - 2)
        draw.multiline_text(at, head, "black", font, spacing=3)
    for r, row in enumerate(cells):
        y = top + r * (side + gap)
        draw.text((gap, y + side // 2), rows[r] if rows else "", "black", font, anchor="lm")
        for c, cell in enumerate(row):
            if cell is not None:
                sheet.paste(picture(cell, side), (left + c * (side + gap), y))
    return sheet


def picture(image: Array | Image.Image, side: int) -> Image.Image:
    """An image as RGB of side x side pixels."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
            array = array.transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(array))
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def overlay(grey: Image.Image, heat: Array, scale: tuple[float, float]) -> Image.Image:
    """The heat map's colours over an image, on a scale shared by all images.

    grey: mode L.   heat: (S, S).   scale: the values of the darkest and of the brightest colour.
    """
    x = np.clip((heat - scale[0]) / (scale[1] - scale[0]), 0, 1)
    small = Image.fromarray(np.round(255 * x).astype(np.uint8))
    colours = small.resize(grey.size, Image.Resampling.BILINEAR)
    colours.putpalette(_PALETTE)
    return Image.blend(grey.convert("RGB"), colours.convert("RGB"), 0.6)


def outlined(
    image: Array, mask: Array, colour: tuple[int, int, int], side: int, *, dashed: bool = False
) -> Image.Image:
    """The image with a region tinted and outlined; only outlined, with dashes, if `dashed`."""
    area = Image.fromarray(np.asarray(mask, bool)).convert("L").resize((side, side))
    m = np.pad(np.asarray(area) > 0, 2)
    inner = m.copy()
    for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2)):
        inner &= np.roll(m, (dy, dx), (0, 1))
    pixels = np.asarray(picture(image, side)).copy()
    m, inner = m[2:-2, 2:-2], inner[2:-2, 2:-2]
    edge = m & ~inner
    if dashed:
        y, x = np.indices(edge.shape)
        pixels[edge & ((x + y) // 5 % 2 == 0)] = colour
    else:
        pixels[inner] = pixels[inner] * 0.75 + np.array(colour) * 0.25
        pixels[edge] = colour
    return Image.fromarray(pixels)


def choose_cases(
    scores: Array, labels: Array, usable: Array, lesions: int = 6, normals: int = 3
) -> list[int]:
    """Abnormal images for a figure, from the highest score to the lowest, then normal ones.

    scores, labels, usable: (N,) of the test images; only usable ones are chosen.
    lesions, normals: how many of each class, at even ranks of their scores.
    returns: indices.
    """
    cases: list[int] = []
    for members, count in ((labels & usable, lesions), (~labels & usable, normals)):
        order = np.flatnonzero(members)[np.argsort(-scores[members], kind="stable")]
        cases += order[spread_out(len(order), count)].tolist()
    return cases


def localisation_figure(
    images: Array,
    maps: Array,
    masks: Array | None,
    samples: Sequence[Sample],
    scores: Array,
    row: Mapping[str, Any],
    cases: Sequence[int],
    title: str = "",
    side: int = 160,
    text: int = 14,
) -> Image.Image:
    """Image, heat map, prediction and ground truth, one column for each case.   [P:§4.6.1]

    images ... scores: of the whole test set, N long.
    row:     of results.json: threshold, map_scale and, with masks, pixel_threshold.
    cases:   indices of the images to draw.
    returns: green frames around images that are judged correctly, red around the others (Fig. 5).
    """
    low, high = row["map_scale"]
    framed, heat, columns = [], [], []
    for i in cases:
        predicted, label = int(scores[i] >= row["threshold"]), samples[i].label
        framed.append(picture(images[i], side))
        heat.append(overlay(framed[-1].convert("L"), maps[i], (low, high)))
        box, colour = (0, 0, side - 1, side - 1), GREEN if predicted == label else RED
        ImageDraw.Draw(framed[-1]).rectangle(box, None, colour, width=5)
        columns.append(f"{samples[i].kind}\n{scores[i]:.4g}, {VERDICTS[label][predicted]}")
    cells = {"image": framed, "heat map": heat}
    note = (
        f"Abnormal at a score >= {row['threshold']:.4g}; green frame: judged correctly, red: "
        f"wrongly. Heat maps share one scale: dark {low:.4g} (median pixel of normal images) to "
        f"bright {high:.4g} (99.5th percentile of abnormal ones)."
    )
    if masks is not None and "pixel_threshold" in row:
        t = row["pixel_threshold"]
        normal = scores < row["threshold"]
        parts = ((i, maps[i] >= t, bool(normal[i])) for i in cases)
        cells["prediction"] = [outlined(images[i], m, YELLOW, side, dashed=n) for i, m, n in parts]
        cells["ground truth"] = [outlined(images[i], masks[i], CYAN, side) for i in cases]
        note += f" Prediction: pixels >= {t:.4g}; dashed where the image is judged normal."
    return image_grid(
        list(cells.values()), rows=list(cells), columns=columns, title=title, note=note,
        side=side, text=text,
    )  # fmt: skip


def reconstruction_figure(x: Array, x_tilde: Array, heads: Sequence[str], name: str) -> Image.Image:
    """Images, their reconstructions and the size of the difference, a column for each image.

    x, x_tilde: (N, 3, S, S) in [0, 1].   heads: above the columns, or none.   name: the detector's.
    """
    difference = np.abs(x - x_tilde).mean(axis=1)  # (N, S, S), over the colours
    white = max(float(difference.max()), 1e-6)
    cells: list[list[Array]] = [[(255 * y).astype(np.uint8) for y in ys] for ys in (x, x_tilde)]
    cells.append([np.round(255 * d / white).astype(np.uint8) for d in difference])
    note = (
        "Difference: |image - reconstruction|, mean over the colours, from black, 0, to white, "
        f"{white:.2g} (an image goes from 0 to 1); one scale for all columns."
    )
    rows = ("image", "reconstruction", "difference")
    return image_grid(cells, rows=rows, columns=heads, title=name, note=note)


BAR = 14  # pixels that the colour bar of an overlay is wide


def overlay_with_bar(grey: Image.Image, heat: Array, scale: tuple[float, float]) -> Image.Image:
    """As `overlay`, and right of it the scale."""
    bar = _bar_of_colours(grey.height, *scale)
    sheet = Image.new("RGB", (grey.width + bar.width, grey.height), "white")
    sheet.paste(overlay(grey, heat, scale), (0, 0))
    sheet.paste(bar, (grey.width, 0))
    return sheet


@functools.lru_cache(maxsize=64)  # images of a set have few heights
def _bar_of_colours(height: int, low: float, high: float) -> Image.Image:
    """The scale, bright above, with its ends and, where there is room, its middle in numbers."""
    values = [f"{high:.3g}", f"{(low + high) / 2:.3g}", f"{low:.3g}"]
    font = ImageFont.load_default(max(9, min(14, height // 5)))
    width = 6 + BAR + 4 + int(max(font.getlength(value) for value in values)) + 4
    bar = Image.new("RGB", (width, height), "white")
    colours = heat_colours(np.linspace(1, 0, height))[:, None].repeat(BAR, axis=1)
    bar.paste(Image.fromarray(colours), (6, 0))
    draw, x = ImageDraw.Draw(bar), 6 + BAR + 4
    for value, y, anchor in zip(values, (0, height / 2, height), ("lt", "lm", "lb"), strict=True):
        if anchor != "lm" or height >= 48:
            draw.text((x, y), value, "black", font, anchor=anchor)
    return bar


def png(image: Image.Image) -> bytes:
    """The PNG file of an image, marked as ours."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Software", "pmsacl")
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_all(folder: Path, drawn: Mapping[str, Image.Image]) -> None:
    """figures/NAME.png of a run's folder, for each."""
    for name, figure in drawn.items():
        write_file(folder / "figures" / f"{name}.png", png(figure))


# --- Charts, as Fig. 6 and 7 ---------------------------------------------------------------------

BLUE, PALE, GREY = "#1f5fa8", "#8fb4dd", "#777777"
COMPARED = ("#d9730d", "#2e8b57", "#8e44ad", "#b8860b")  # a colour for each name of `printed`
ROW = 34  # pixels between two lines of a chart
LINE = 30  # pixels between two lines of its title
SMALL = 18  # pixels, the height of its smallest letters, legible at half that
WIDTH = 640  # pixels of its axis


def dot_chart(
    values: Mapping[str, Sequence[float]],
    printed: Mapping[str, Mapping[str, float | None]],
    *,
    title: str,
    axis: str,
    note: str = "",
) -> Image.Image:
    """A line for each row: the mean as a dot, with a bar of one standard deviation.

    values:  row -> one value a run; a row without values says "not run".
    printed: name in the legend -> row -> value to compare with, a diamond; four names at most.
    axis:    what the values are.
    """
    font, small, large = (ImageFont.load_default(size) for size in (20, SMALL, 23))
    first, last, step = _ticks(values, printed)
    left = int(max(font.getlength(name) for name in values)) + 40

    def column(value: float) -> float:
        return left + (value / step - first) / (last - first) * WIDTH

    right = left + WIDTH
    notes, heads = textwrap.wrap(note, right // 9), textwrap.wrap(title, right // 12)
    top = 70 + LINE * len(heads)
    bottom = top + ROW * len(values)
    legend = 430 + sum(44 + int(small.getlength(name)) for name in printed)
    size = max(right + 40, legend), bottom + 70 + 24 * len(notes)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((12, 10), "\n".join(heads), "black", large)
    _draw_legend(draw, top - 38, list(printed))
    for k in range(first, last + 1):
        x = column(k * step)
        draw.line((x, top - 6, x, bottom), "#dddddd")
        draw.text((x, bottom + 5), f"{k * step:.2f}", "black", small, anchor="ma")
    draw.text((left + WIDTH / 2, bottom + 28), axis, "black", font, anchor="ma")
    draw.multiline_text((12, bottom + 60), "\n".join(notes), GREY, small)
    for i, (name, row) in enumerate(values.items()):
        y = top + ROW * i + 14
        draw.text((left - 20, y), name, "black", font, anchor="rm")
        for compared, colour in zip(printed.values(), COMPARED, strict=False):
            if (value := compared.get(name)) is not None:
                _diamond(draw, column(value), y, 6, colour)
        _draw_runs(draw, [column(value) for value in row], left, y)
    return sheet


def _ticks(
    values: Mapping[str, Sequence[float]], printed: Mapping[str, Mapping[str, float | None]]
) -> tuple[int, int, float]:
    """First and last tick of an axis that holds all values and bars, in steps, and the step."""
    marks = [v for row in values.values() for v in [*row, *_bar(row)]]
    marks += [v for compared in printed.values() for v in compared.values() if v is not None]
    low, high = (min(marks), max(marks)) if marks else (0.5, 1.0)
    step = next((t for t in (0.01, 0.02, 0.05, 0.1) if high - low <= 8 * t), 0.2)
    first = math.floor(low / step)
    return first, max(math.ceil(high / step), first + 1), step


def _bar(row: Sequence[float]) -> tuple[float, ...]:
    """One standard deviation below the mean, and one above; nothing for fewer than two runs."""
    if len(row) < 2:
        return ()
    mean, sd = float(np.mean(row)), float(np.std(row, ddof=1))
    return mean - sd, mean + sd


def _draw_legend(draw: ImageDraw.ImageDraw, y: int, printed: Sequence[str]) -> None:
    """The marks of a chart from left to right, with their names."""
    font, x = ImageFont.load_default(SMALL), 20.0
    marks = [("mean ± standard deviation", _dot, 6, BLUE), ("single runs", _dot, 3, PALE)]
    marks += [(name, _diamond, 6, COMPARED[k]) for k, name in enumerate(printed)]
    for name, mark, radius, colour in marks:
        mark(draw, x, y, radius, colour)
        draw.text((x + 12, y), name, "black", font, anchor="lm")
        x += 44 + font.getlength(name)


def _draw_runs(draw: ImageDraw.ImageDraw, columns: Sequence[float], left: int, y: int) -> None:
    """The marks of one line: single runs, the bar, the mean."""
    if not columns:
        draw.text((left + 6, y), "not run", GREY, ImageFont.load_default(SMALL), anchor="lm")
        return
    mean = float(np.mean(columns))
    for x in columns if len(columns) > 1 else ():
        _dot(draw, x, y + 10, 3, PALE)
    for end in _bar(columns):
        draw.line((mean, y, end, y), BLUE, 2)
        draw.line((end, y - 6, end, y + 6), BLUE, 2)
    _dot(draw, mean, y, 6, BLUE)


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _diamond(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: str) -> None:
    draw.polygon([(x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)], colour)
