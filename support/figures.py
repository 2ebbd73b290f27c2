"""Grids, heat maps, outlines and charts, drawn with pillow: Fig. 3-7 of the paper.   [P:§4.6]

N images, S pixels a side. Images are (3, S, S) or (S, S, 3) uint8 or PIL's, heat maps (S, S).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from support.layouts import Sample

Array = NDArray[Any]

_INFERNO = np.array(  # dark is low, bright is high, for every kind of colour vision
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
     (250, 193, 39), (252, 255, 164)]
)  # fmt: skip
GREEN, RED, YELLOW, CYAN = (40, 160, 60), (215, 40, 40), (255, 225, 0), (0, 235, 235)


def heat_colours(x: Array) -> Array:
    """Values in [0, 1] to RGB uint8, from dark violet to light yellow; clipped outside."""
    at = np.clip(x, 0, 1) * (len(_INFERNO) - 1)
    channels = [np.interp(at, np.arange(len(_INFERNO)), c) for c in _INFERNO.T]
    return np.stack(channels, -1).round().astype(np.uint8)


def map_scale(maps: Array, labels: Array | None = None) -> tuple[float, float]:
    """The ends of the colour scale that all heat maps of a detector share.

    returns: the median pixel of the normal images (what is usual is dark) and the 99.5th
             percentile of the abnormal ones, from a grid of at most 64 x 64 pixels an image;
             without labels both are of all images.
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
) -> Image.Image:
    """A labelled grid of images on white.

    cells:   rows of images: PIL, (3, S, S) or (S, S, 3) uint8; None leaves the place empty.
    rows:    a label left of each row.    columns: a label above each column, of one line or more.
    title:   above all, larger.               note:    below all, wrapped.
    side:    pixels of a cell; images are resized to it.
    """
    font, large, gap, line = ImageFont.load_default(14), ImageFont.load_default(18), 6, 18
    left = gap + (gap + int(max(font.getlength(r) for r in rows)) if rows else 0)
    width = left + max(len(row) for row in cells) * (side + gap)
    heads = ["\n".join(part[: side // 6] for part in c.splitlines()) for c in columns]
    notes = textwrap.wrap(note, width // 7)
    top = gap + (28 if title else 0) + line * max((h.count("\n") + 1 for h in heads), default=0)
    bottom = top + len(cells) * (side + gap)
    sheet = Image.new("RGB", (width, bottom + line * len(notes) + (8 if note else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, "black", large)
    draw.multiline_text((gap, bottom + 2), "\n".join(notes), "black", font, spacing=3)
    for c, head in enumerate(heads):
        at = (left + c * (side + gap), top - line * (head.count("\n") + 1) - 2)
        draw.multiline_text(at, head, "black", font, spacing=3)
    for r, row in enumerate(cells):
        y = top + r * (side + gap)
        draw.text((gap, y + side // 2), rows[r] if rows else "", "black", font, anchor="lm")
        for c, cell in enumerate(row):
            if cell is not None:
                sheet.paste(_picture(cell, side), (left + c * (side + gap), y))
    return sheet


def _picture(image: Array | Image.Image, side: int) -> Image.Image:
    """An image as RGB of side x side pixels."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
            array = array.transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(array))
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def overlay(image: Array, heat: Array, scale: tuple[float, float], side: int) -> Image.Image:
    """The heat map's colours over the grey image, on a scale shared by all images."""
    x = (np.asarray(heat, np.float32) - scale[0]) / (scale[1] - scale[0])
    resized = Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR)
    colours = Image.fromarray(heat_colours(np.asarray(resized)))
    return Image.blend(_picture(image, side).convert("L").convert("RGB"), colours, 0.6)


def outlined(image: Array, mask: Array, colour: tuple[int, int, int], side: int) -> Image.Image:
    """The image with a region tinted and outlined."""
    area = Image.fromarray(np.asarray(mask, bool)).convert("L").resize((side, side))
    m = np.pad(np.asarray(area) > 0, 2)
    inner = m.copy()
    for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2)):
        inner &= np.roll(m, (dy, dx), (0, 1))
    pixels = np.asarray(_picture(image, side)).copy()
    m, inner = m[2:-2, 2:-2], inner[2:-2, 2:-2]
    pixels[inner] = pixels[inner] * 0.75 + np.array(colour) * 0.25
    pixels[m & ~inner] = colour
    return Image.fromarray(pixels)


def choose_cases(
    scores: Array, labels: Array, usable: Array, lesions: int = 6, normals: int = 3
) -> list[int]:
    """Indices for a figure: lesions evenly over their scores, the worst included, then normals."""
    shown: list[int] = []
    for members, count in ((labels & usable, lesions), (~labels & usable, normals)):
        order = np.flatnonzero(members)[np.argsort(-scores[members], kind="stable")]
        ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
        shown += order[ranks].tolist()
    return shown


def localisation_figure(
    images: Array,
    maps: Array,
    masks: Array | None,
    samples: Sequence[Sample],
    scores: Array,
    row: Mapping[str, Any],
    shown: Sequence[int],
    title: str = "",
    side: int = 160,
) -> Image.Image:
    """Image, heat map, prediction and ground truth, a column a case.   [P:§4.6.1]

    images ... scores: of the whole test set, N long; shown: the indices to draw.
    row:     of results.json: threshold, map_scale and, with masks, pixel_threshold.
    returns: green frames around images that are judged rightly, red around the others (Fig. 5).
    """
    low, high = row["map_scale"]
    verdicts = {(0, 0): "passed", (0, 1): "false alarm", (1, 0): "missed", (1, 1): "found"}
    framed, columns = [], []
    for i in shown:
        judged, label = int(scores[i] >= row["threshold"]), samples[i].label
        framed.append(_picture(images[i], side))
        box, colour = (0, 0, side - 1, side - 1), GREEN if judged == label else RED
        ImageDraw.Draw(framed[-1]).rectangle(box, None, colour, width=5)
        columns.append(f"{samples[i].kind}\n{scores[i]:.4g}, {verdicts[label, judged]}")
    cells = {
        "image": framed,
        "heat map": [overlay(images[i], maps[i], (low, high), side) for i in shown],
    }
    note = (
        f"Abnormal at a score >= {row['threshold']:.4g}; green frame: judged rightly, red: "
        f"wrongly. Heat maps share one scale: dark {low:.4g} (median pixel of normal images) to "
        f"bright {high:.4g} (99.5th percentile of abnormal ones)."
    )
    if masks is not None and "pixel_threshold" in row:
        t = row["pixel_threshold"]
        cells["prediction"] = [outlined(images[i], maps[i] >= t, YELLOW, side) for i in shown]
        cells["ground truth"] = [outlined(images[i], masks[i], CYAN, side) for i in shown]
        note += f" Prediction: pixels >= {t:.4g}."
    return image_grid(
        list(cells.values()), rows=list(cells), columns=columns, title=title, note=note, side=side
    )


def png(image: Image.Image, source: str = "") -> bytes:
    """The PNG file of an image, marked as ours and with the file that it shows."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Software", "pmsacl")
    info.add_text("Source", source)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def source_of(path: Path) -> str:
    """The name of the image that a heat map of ours shows; empty for any other file."""
    if not path.name.endswith(".heatmap.png"):
        return ""
    try:
        with Image.open(path) as image:
            return image.info.get("Source", "") if image.info.get("Software") == "pmsacl" else ""
    except OSError:
        return ""


# --- Charts, as Fig. 6 and 7 -------------------------------------------------------------------

BLUE, PALE, GREY = "#1f5fa8", "#8fb4dd", "#777777"
OTHERS = ("#d9730d", "#2e8b57", "#8e44ad", "#b8860b")


def dot_chart(
    values: Mapping[str, Sequence[float]],
    printed: Mapping[str, Mapping[str, float | None]],
    *,
    title: str,
    axis: str,
    note: str = "",
) -> Image.Image:
    """A line a row: the mean as a dot with a bar of one standard deviation, others' as diamonds.

    values:  row -> one value a run; "not run" stands where there is none.
    printed: name of the legend -> row -> value to compare with, four names at most.
    """
    font, small, large = (ImageFont.load_default(size) for size in (15, 13, 18))
    everything = [v for row in values.values() for v in row]
    spread = {name: float(np.std(row, ddof=1)) for name, row in values.items() if len(row) > 1}
    ends = [
        float(np.mean(values[name])) + sign * sd for name, sd in spread.items() for sign in (-1, 1)
    ]
    everything += ends + [v for p in printed.values() for v in p.values() if v is not None]
    low, high = (min(everything), max(everything)) if everything else (0.5, 1.0)
    step = next((t for t in (0.01, 0.02, 0.05, 0.1) if high - low <= 8 * t), 0.2)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    left, width = int(max(font.getlength(name) for name in values)) + 40, 640
    notes = textwrap.wrap(note, (left + width) // 7)
    heads = textwrap.wrap(title, (left + width) // 10)
    top = 70 + 24 * len(heads)
    bottom = top + 34 * len(values)
    legend = 330 + sum(44 + int(small.getlength(name)) for name in printed)
    size = max(left + width + 40, legend), bottom + 60 + 18 * len(notes)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def x_of(value: float) -> float:
        return left + (value / step - first) / (last - first) * width

    def dot(x: float, y: float, r: int, colour: str) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), colour)

    def diamond(x: float, y: float, r: int, colour: str) -> None:
        draw.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], colour)

    draw.multiline_text((12, 10), "\n".join(heads), "black", large)
    x, y = 20.0, top - 38
    marks = [("mean ± standard deviation", dot, 6, BLUE), ("single runs", dot, 3, PALE)]
    marks += [(name, diamond, 6, OTHERS[i]) for i, name in enumerate(printed)]
    for name, mark, r, colour in marks:
        mark(x, y, r, colour)
        draw.text((x + 12, y), name, "black", small, anchor="lm")
        x += 44 + small.getlength(name)
    for k in range(first, last + 1):
        draw.line((x_of(k * step), top - 6, x_of(k * step), bottom), "#dddddd")
        draw.text((x_of(k * step), bottom + 5), f"{k * step:.2f}", "black", small, anchor="ma")
    draw.text((left + width / 2, bottom + 24), axis, "black", font, anchor="ma")
    draw.multiline_text((12, bottom + 50), "\n".join(notes), GREY, small)
    for i, (name, row) in enumerate(values.items()):
        y = top + 34 * i + 14
        draw.text((left - 20, y), name, "black", font, anchor="rm")
        for k, others in enumerate(printed.values()):
            if (value := others.get(name)) is not None:
                diamond(x_of(value), y, 6, OTHERS[k])
        if not row:
            draw.text((left + 6, y), "not run", GREY, small, anchor="lm")
            continue
        mean, sd = float(np.mean(row)), spread.get(name, 0.0)
        for value in row if name in spread else ():
            dot(x_of(value), y + 10, 3, PALE)
        for end in (x_of(mean - sd), x_of(mean + sd)) if name in spread else ():
            draw.line((x_of(mean), y, end, y), BLUE, 2)
            draw.line((end, y - 6, end, y + 6), BLUE, 2)
        dot(x_of(mean), y, 6, BLUE)
    return sheet
