"""report_scored.html: the new images of `eval.py RUN --score`, their scores and heat maps."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support import charts
from support.cards import CARDS, Card, Gallery, cards_html, pictures_of
from support.page import Section, glossary, page, recounted, slider, table
from support.progress import notify
from support.run import write_file

Array = NDArray[Any]


class NewImages:
    """Every score, and the pictures of the highest and of the lowest scores of each detector."""

    def __init__(
        self, results: Mapping[str, Any], scales: Mapping[str, tuple[float, float]]
    ) -> None:
        """results: of the run.   scales: of the heat maps, by the name of the detector."""
        self.results, self.scales = results, scales
        self.count = 0
        self.scores: dict[str, list[float]] = {name: [] for name in scales}
        # Of each detector a heap of its highest scores and one of its lowest; the number of the
        # image comes before the card, so that cards are never compared.
        self.ends: dict[str, tuple[list, list]] = {name: ([], []) for name in scales}
        self.most = max(2, CARDS // (2 * max(1, len(scales))))  # cards in a heap

    def add(
        self, file: Path, image: Array, scored: Mapping[str, tuple[Any, float]]
    ) -> dict[str, list[str]]:
        """One image more.

        image:   (3, S, S) uint8.   scored: heat map (S, S) and score, by the name of the detector.
        returns: the verdict of each detector, in a list that is empty if it has no threshold.
        """
        k, shown = self.count, str(file)
        self.count += 1
        for name, (heat, score) in scored.items():
            if name not in self.scales:
                continue  # no heat maps
            self.scores[name].append(score)
            if not any(
                len(heap) < self.most or sign * score > heap[0][0]
                for sign, heap in zip((1, -1), self.ends[name], strict=True)
            ):
                continue
            pictures = pictures_of(image, heat, self.scales[name], shown, score)
            card = Card(shown, score, None, "", "", pictures)
            for sign, heap in zip((1, -1), self.ends[name], strict=True):
                heapq.heappush(heap, (sign * score, k, card))
                if len(heap) > self.most:
                    heapq.heappop(heap)
        thresholds = {name: self.results.get(name, {}).get("threshold") for name in scored}
        return {
            name: [] if t is None else ["abnormal" if scored[name][1] >= t else "normal"]
            for name, t in thresholds.items()
        }

    def cards(self, name: str) -> list[Card]:
        """From the highest score to the lowest, each image once."""
        high, low = self.ends[name]
        kept = {k: card for _, k, card in high + low}
        return [kept[k] for k in sorted(kept, key=lambda k: (-kept[k].score, k))]


def write_score_report(folder: Path, new: NewImages) -> None:
    """Write report_scored.html into the run's folder and say so."""
    facts = [("Run", escape(str(folder.resolve()))), ("New images", str(new.count))]
    sections, data = [Section("What was scored", table("The images", (), facts))], {}
    for name, values in new.scores.items():
        row, s = new.results.get(name, {}), np.array(values)
        threshold = row.get("threshold")
        data[name] = recounted(s, None, threshold)
        sections.append(_detector(name, s, threshold, new))
    path = folder / "report_scored.html"
    title = f"{folder.resolve().name}: {new.count} new images"
    write_file(path, page(title, [*sections, glossary()], data))
    notify(f"scores and heat maps on one page: {path}")


def _detector(name: str, s: Array, threshold: float | None, new: NewImages) -> Section:
    """Histogram, threshold and images of a detector.   s: (N,) scores."""
    text = f"{name}: scores from {charts.number(s.min())} to {charts.number(s.max())}, median "
    text += charts.number(float(np.median(s)))
    content = f'<div class="charts">{charts.histogram({"new images": s}, threshold, text)}</div>'
    if threshold is None:
        content += (
            "<p>The run had no test images, so there is no threshold: these scores can be compared "
            "with one another only.</p>"
        )
    else:
        high = int((s >= threshold).sum())
        content += (
            f"{slider(name, threshold, s)}"
            f'<p class="recount" role="status">At a threshold of {threshold:.9g}: {high} of '
            f"{len(s)} ({high / len(s):.3f}) judged abnormal.</p>"
        )
    cards = new.cards(name)
    words = "All images, the most abnormal first."
    if len(cards) < len(s):
        words = f"The {new.most} highest and the {new.most} lowest scores of {len(s)}."
    content += cards_html(Gallery(cards, new.scales[name]), threshold, words)
    return Section(f"Detector: {name}", content, detector=name)
