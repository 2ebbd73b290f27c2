"""The images that report.html shows: which, their pictures, and their cards in HTML.

Sizes: N images, S pixels a side.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy import ndarray as Array
from PIL import Image

from measures import dice
from support import charts, figures
from support.layouts import Sample

SIDE = 160  # pixels of a picture on the page
CARDS = 96  # images on the page, of all detectors together: 20 KB each or so


@dataclass(frozen=True)
class Card:
    """An image on the page. pictures: alternative text -> JPEG; label None: not known."""

    name: str
    score: float
    label: int | None
    kind: str
    facts: str
    pictures: Mapping[str, bytes]


@dataclass(frozen=True)
class Gallery:
    """The images of a detector that the page shows, and the ends of their colour scale."""

    cards: Sequence[Card]
    scale: tuple[float, float]


def gallery(
    images: Array,
    maps: Array,
    masks: Array | None,
    samples: Sequence[Sample],
    scores: Array,
    row: Mapping[str, Any],
    validation: Array,
) -> Gallery:
    """Misses and false alarms first, then the most and the least abnormal images of each class.

    images (N, 3, S, S) uint8, maps (N, S, S), masks (N, S, S) or None, samples, scores (N,): of
    all test images.   row: of results.json, with map_scale.   validation: (N,) bool, not shown
    unless the row measures them, too.
    """
    labels = np.array([sample.label for sample in samples], bool)
    cards = []
    for i in choose(scores, labels, row["threshold"], measured_images(row, validation), CARDS // 2):
        sample, name = samples[i], "/".join(samples[i].path.parts[-2:])
        facts, pictures = "", pictures_of(images[i], maps[i], row["map_scale"], name, scores[i])
        if masks is not None and "pixel_threshold" in row:
            predicted, mask = maps[i] >= row["pixel_threshold"], np.asarray(masks[i], bool)
            outline = figures.outlined(images[i], predicted, figures.YELLOW, SIDE)
            text = f"{name}: prediction outlined in yellow, {predicted.mean():.0%} of the image"
            if mask.any():
                outline = figures.outlined(np.array(outline), mask, figures.CYAN, SIDE)
                facts = f"Dice {float(dice(predicted, mask)):.2f}"
                text += f"; lesion in cyan, {mask.mean():.0%}; {facts}"
            pictures[text] = jpeg(outline)
        card = Card(name, float(scores[i]), sample.label, sample.kind, facts, pictures)
        cards.append(card)
    return Gallery(cards, row["map_scale"])


def measured_images(row: Mapping[str, Any], validation: Array) -> Array:
    """(N,) true for the test images that the row's measures are of."""
    everything = bool(row.get("data", {}).get("paper_protocol"))
    return np.ones(len(validation), bool) if everything else ~validation


def choose(scores: Array, labels: Array, threshold: float, shown: Array, count: int) -> list[int]:
    """Indices of at most `count` images, half of each class: wrong ones, then both ends.

    A class's wrong ones, the worst first, take up to half of its places; the others go to its
    highest and its lowest scores in turn.
    """
    wrong, rest = [], []
    for label in (True, False):
        members = np.flatnonzero(shown & (labels == label))
        order = members[np.argsort(scores[members], kind="stable")]  # ascending
        worst_first = order if label else order[::-1]
        errors = [i for i in worst_first if (scores[i] >= threshold) != label][: count // 4]
        others = [int(i) for i in order if i not in set(errors)]
        turns = [others[-1 - k // 2] if k % 2 == 0 else others[k // 2] for k in range(len(others))]
        wrong += [int(i) for i in errors]
        rest += turns[: count // 2 - len(errors)]
    return wrong + sorted(rest, key=lambda i: -scores[i])


def pictures_of(
    image: Array, heat: Array, scale: tuple[float, float], name: str, score: float
) -> dict[str, bytes]:
    """The image and its heat map, by their alternative texts."""
    y, x = np.unravel_index(int(np.argmax(heat)), heat.shape)
    where = f"{(x + 0.5) / heat.shape[1]:.0%} from the left, {(y + 0.5) / heat.shape[0]:.0%} down"
    shown = figures.picture(image, SIDE)
    heated = figures.overlay(shown.convert("L"), heat, scale)
    return {
        f"{name}, score {charts.number(score)}": jpeg(shown),
        f"{name}, heat map: brightest {where}": jpeg(heated),
    }


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def img(content: bytes, alt: str, size: tuple[int, int] = (SIDE, SIDE)) -> str:
    source = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" width="{size[0]}" height="{size[1]}">'


def card_html(card: Card, threshold: float | None) -> str:
    """A card with its verdict; the script writes the verdict again when the threshold moves."""
    high = threshold is not None and card.score >= threshold
    judged, words = "", ""
    if threshold is not None and card.label is None:
        words = "abnormal" if high else "normal"
    elif threshold is not None:
        judged = " right" if high == bool(card.label) else " wrong"
        words = figures.VERDICTS[int(bool(card.label))][high]
    facts = ", ".join(filter(None, [card.kind, f"score {charts.number(card.score)}", card.facts]))
    label = "" if card.label is None else card.label
    return (
        f'<li class="card{judged}" data-score="{card.score:.9g}" data-label="{label}" '
        f'data-kind="{escape(card.kind)}" data-name="{escape(card.name)}" data-verdict="{words}">'
        f'<div class="pictures">{"".join(img(c, alt) for alt, c in card.pictures.items())}</div>'
        f'<p><span class="verdict">{words}</span> {escape(facts)}</p>'
        f"<p><code>{escape(card.name)}</code></p></li>"
    )


def cards_html(shown: Gallery, threshold: float | None, what: str) -> str:
    """The controls, the key and the cards of a detector.   what: which images these are."""
    labelled = any(card.label is not None for card in shown.cards)
    classes = {"1": "abnormal", "0": "normal"} if labelled else {}
    kinds = sorted({card.kind for card in shown.cards if card.kind})
    classes |= {f"kind {kind}": kind for kind in kinds} if len(kinds) > len(classes) else {}
    verdicts = ["missed", "false alarm", "found", "passed"] if classes else ["abnormal", "normal"]
    orders = {"high": "highest score first", "low": "lowest score first", "name": "file name"}
    if classes:
        orders = {"errors": "misses and false alarms first"} | orders
    fields = [select("order", "Order", orders)]
    if classes:
        fields.append(select("class", "Class", {"": "all"} | classes))
    if threshold is not None:
        fields.append(select("verdict", "Verdict", {"": "all"} | {v: v for v in verdicts}))
    fields += [
        f'<label>Score {word} <input type="number" step="any" name="{word}"></label>'
        for word in ("from", "to")
    ]
    colours = figures.heat_colours(np.linspace(0, 1, 8)).tolist()
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours)
    low, high = (charts.number(end) for end in shown.scale)
    return (
        f"<h3>Images</h3><p>{what} Heat maps: {low} "
        f'<span class="bar" style="background:linear-gradient(90deg,{stops})"></span> {high}.</p>'
        f'<div class="controls">{"".join(fields)}</div>'
        f'<p class="shown" role="status">{len(shown.cards)} images are shown.</p>'
        f'<ul class="cards">{"".join(card_html(card, threshold) for card in shown.cards)}</ul>'
    )


def select(name: str, title: str, options: Mapping[str, str]) -> str:
    words = (f'<option value="{escape(v)}">{escape(t)}</option>' for v, t in options.items())
    return f'<label>{title} <select name="{name}">{"".join(words)}</select></label>'
