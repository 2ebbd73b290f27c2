"""report_scored.html: the new images of `eval.py RUN --score`, their scores and heat maps."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array

from support import charts
from support.cards import CARDS, Card, Gallery, cards_html, pictures_of
from support.page import Section, glossary, page, recounted, slider, table
from support.run import real, write_file

REPORT = "report_scored.html"


class NewImages:
    """Every score, and the pictures of the highest and of the lowest scores of each detector."""

    def __init__(self, judges: Mapping[str, Any]) -> None:
        """judges: by the name of the detector, as in score_files.py; their scales may be set later.

        A detector without heat maps has no section.
        """
        self.judges = judges
        self.count = 0
        self.scores: dict[str, list[float]] = {}
        # Of each detector a heap of its highest scores and one of its lowest; the number of the
        # image comes before the card, so that cards are never compared.
        self.ends: dict[str, tuple[list, list]] = {}
        self.most = max(2, CARDS // (2 * max(1, len(judges))))  # cards in a heap

    def add(
        self,
        file: Path,
        image: Array,
        scored: Mapping[str, tuple[float, Any]],
        words: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """One image more.

        image:  (3, S, S) uint8.   scored: score and heat map (S, S) or None, by detector.
        words:  of each detector, with the score's percentile.
        """
        k, shown = self.count, str(file)
        self.count += 1
        for name, (score, heat) in scored.items():
            if heat is None:
                continue
            self.scores.setdefault(name, []).append(score)
            ends = self.ends.setdefault(name, ([], []))
            if not any(
                len(heap) < self.most or sign * score > heap[0][0]
                for sign, heap in zip((1, -1), ends, strict=True)
            ):
                continue
            pictures = pictures_of(image, heat, self.judges[name].scale, shown, score)
            percentile = words[name]["percentile"]
            facts = "" if percentile is None else f"above {percentile:.1f}% of healthy images"
            card = Card(shown, score, None, "", facts, pictures)
            for sign, heap in zip((1, -1), ends, strict=True):
                heapq.heappush(heap, (sign * score, k, card))
                if len(heap) > self.most:
                    heapq.heappop(heap)

    def cards(self, name: str) -> list[Card]:
        """From the highest score to the lowest, each image once."""
        high, low = self.ends[name]
        kept = {k: card for _, k, card in high + low}
        return [kept[k] for k in sorted(kept, key=lambda k: (-kept[k].score, k))]


def write_score_report(folder: Path, new: NewImages) -> None:
    """Write report_scored.html into the folder of a scoring."""
    facts = [("Folder", escape(str(real(folder)))), ("New images", str(new.count))]
    sections, data = [Section("What was scored", table("The images", (), facts))], {}
    for name, values in new.scores.items():
        s = np.array(values)
        data[name] = recounted(s, None, new.judges[name].threshold)
        sections.append(_detector(name, s, new))
    title = f"{real(folder).name}: {new.count} new images"
    write_file(folder / REPORT, page(title, [*sections, glossary()], data))


def _detector(name: str, s: Array, new: NewImages) -> Section:
    """Histogram, threshold and images of a detector.   s: (N,) scores."""
    judge = new.judges[name]
    threshold, healthy = judge.threshold, judge.healthy
    text = f"{name}: scores from {charts.number(s.min())} to {charts.number(s.max())}, median "
    text += charts.number(float(np.median(s)))
    groups = {} if healthy is None else {f"healthy ({len(healthy.scores)})": healthy.scores}
    groups[f"new images ({len(s)})"] = s
    content = f'<div class="charts">{charts.histogram(groups, threshold, text)}</div>'
    if threshold is None:
        content += (
            "<p>The run has neither test images nor healthy ones that were held out of its "
            "training, so there is no threshold: these scores can be compared with one another "
            "only.</p>"
        )
    else:
        high = int((s >= threshold).sum())
        content += f"<p>{_origin(judge)}</p>" if healthy is not None else ""
        content += (
            f"{slider(name, threshold, s)}"
            f'<p class="recount" role="status">At a threshold of {threshold:.9g}: {high} of '
            f"{len(s)} ({high / len(s):.3f}) judged abnormal.</p>"
        )
    cards = new.cards(name)
    words = "All images, the most abnormal first."
    if len(cards) < len(s):
        words = f"The {new.most} highest and the {new.most} lowest scores of {len(s)}."
    content += cards_html(Gallery(cards, judge.scale), threshold, words)
    return Section(f"Detector: {name}", content, detector=name)


def _origin(judge: Any) -> str:
    """Where the threshold comes from, and its percentile among the healthy images."""
    healthy, threshold = judge.healthy, judge.threshold
    if threshold == healthy.threshold:
        return (
            f"The threshold is the 95th percentile of the scores of {len(healthy.scores)} held-out "
            "healthy images: about one healthy image in twenty lies above it."
        )
    return (
        f"The threshold was set by the run's test images; {healthy.percentile(threshold):.0f}% of "
        f"{len(healthy.scores)} held-out healthy images lie below it."
    )
