"""The charts of report.html as SVG text: ROC curve, histograms, curves of the training.

Each is one <svg> with a title and a description for those who cannot see it. What the page's
script moves (threshold line, operating point) carries the class `moves`, and the <svg> says in
data-x and data-y which values its plot spans. Sizes: M scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy import ndarray as Array

WIDTH, HEIGHT = 440, 300  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 46  # around the plot
BINS = 30
CORNERS = 300  # of an ROC curve, at most
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # curves differ in more than colour
COLOURS = ("#0b4f9e", "#555555", "#9a4a00", "#6a2d87")  # 5 : 1 and more on white


class Plot:
    """An SVG with two axes, to which marks are added."""

    def __init__(
        self,
        title: str,
        text: str,
        x: tuple[float, float],
        y: tuple[float, float],
        labels: tuple[str, str],
        size: tuple[int, int] = (WIDTH, HEIGHT),
    ) -> None:
        """title: of the chart.  text: what it shows.  x, y: the values at the ends of the axes."""
        self.x, self.y, (self.width, self.height) = x, y, size
        self.parts = [f"<title>{escape(title)}</title><desc>{escape(text)}</desc>"]
        for value in ticks(*x):
            at = self.column(value)
            self.parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{self.height - BOTTOM}"/>')
            self.text(at, self.height - BOTTOM + 16, number(value), "middle")
        for value in ticks(*y):
            at = self.row(value)
            self.parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{self.width - RIGHT}"/>')
            self.text(LEFT - 6, at + 4, number(value), "end")
        self.text((LEFT + self.width - RIGHT) / 2, self.height - 8, labels[0], "middle")
        middle = (TOP + self.height - BOTTOM) / 2
        turned = f'transform="rotate(-90 13 {middle:.0f})"'
        self.text(13, middle, labels[1], "middle", turned)

    def column(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def row(self, value: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def text(self, x: float, y: float, words: str, anchor: str = "start", more: str = "") -> None:
        where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}'.rstrip()
        self.parts.append(f"<text {where}>{escape(words)}</text>")

    def curve(self, x: Sequence[float], y: Sequence[float], style: str, closed: bool = False):
        """A line through points; those that are not finite are left out."""
        points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a + b)]
        path = " ".join(f"{self.column(a):.1f},{self.row(b):.1f}" for a, b in points)
        shape = "polygon" if closed else "polyline"
        self.parts.append(f'<{shape} points="{path}" {style}/>')

    def svg(self, kind: str) -> str:
        """kind: the class of the element, by which the script finds it."""
        plot = f"{LEFT} {self.width - RIGHT} {self.height - BOTTOM} {TOP}"
        ends = f"{self.x[0]!r} {self.x[1]!r} {self.y[0]!r} {self.y[1]!r}"
        return (
            f'<svg class="{kind}" role="img" viewBox="0 0 {self.width} {self.height}" '
            f'data-plot="{plot}" data-ends="{ends}">{"".join(self.parts)}</svg>'
        )


def number(value: float) -> str:
    """Four digits, as on an axis."""
    return f"{value:.4g}"


def spread_out(count: int, most: int) -> Array:
    """At most `most` of `count` indices at even steps: neither end is left out."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def ticks(low: float, high: float) -> list[float]:
    """At most six round values between the ends, which are among them where they are round."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def span(values: Array) -> tuple[float, float]:
    """The least and the greatest of the finite values, made distinct."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1e-9) else (low - 1, low + 1)


def roc(scores: Array, labels: Array) -> tuple[Array, Array]:
    """False-positive and true-positive rate at each distinct threshold, from (0, 0) to (1, 1).

    scores: (M,).   labels: (M,) true where abnormal; both classes are there.
    """
    order = np.argsort(-scores, kind="stable")
    y, s = labels[order].astype(bool), scores[order]
    last = np.r_[s[1:] != s[:-1], True]  # tied scores enter together
    tpr, fpr = y.cumsum()[last] / y.sum(), (~y).cumsum()[last] / (~y).sum()
    return np.r_[0, fpr], np.r_[0, tpr]


def roc_chart(
    curves: Mapping[str, tuple[Array, Array]], point: tuple[float, float], text: str
) -> str:
    """ROC curves, the first one with its operating point.

    curves: name -> what `roc` returns.   point: false-positive and true-positive rate.
    """
    labels = ("false alarms: 1 - specificity", "sensitivity")
    plot = Plot("ROC curve", text, (0.0, 1.0), (0.0, 1.0), labels)
    plot.curve([0, 1], [0, 1], 'class="chance"')
    for k, (name, (fpr, tpr)) in enumerate(curves.items()):
        keep = np.unique(spread_out(len(fpr), CORNERS))
        dash, colour = DASHES[k % len(DASHES)], COLOURS[k % len(COLOURS)]
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        plot.curve(fpr[keep].tolist(), tpr[keep].tolist(), style)
        y = plot.row(0.06 + 0.07 * (len(curves) - 1 - k))
        plot.parts.append(f'<path d="M{WIDTH - 170} {y - 4:.1f}h28" {style}/>')
        plot.text(WIDTH - 136, y, name)
    at = f'cx="{plot.column(point[0]):.1f}" cy="{plot.row(point[1]):.1f}"'
    plot.parts.append(f'<circle class="moves" r="6" {at}/>')
    return plot.svg("roc")


def histogram(groups: Mapping[str, Array], threshold: float | None, text: str) -> str:
    """The share of each group's scores in BINS bins, and the threshold.

    groups: name -> scores, two groups at most.
    """
    low, high = span(np.concatenate([np.asarray(s, float) for s in groups.values()]))
    edges = np.linspace(low, high, BINS + 1)
    counts = {name: np.histogram(s, edges)[0] / max(len(s), 1) for name, s in groups.items()}
    top = 1.25 * max(float(c.max()) for c in counts.values()) or 1.0  # room for the legend
    axis = ("score: higher is more abnormal", "share of the images")
    plot = Plot("Scores", text, (low, high), (0.0, top), axis)
    x = np.repeat(edges, 2).tolist()
    for k, (name, share) in enumerate(counts.items()):
        y = [0.0, *np.repeat(share, 2).tolist(), 0.0]
        plot.curve(x, y, f'class="bars{k}"', closed=True)
        at = TOP + 14 + 18 * k
        plot.parts.append(f'<rect class="bars{k}" x="{WIDTH - 150}" y="{at - 10}" width="24" ')
        plot.parts[-1] += 'height="11"/>'
        plot.text(WIDTH - 120, at, name)
    if threshold is not None:
        at_x = plot.column(min(max(threshold, low), high))
        line = f'x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        plot.parts.append(f'<line class="moves" {line}/>')
    return plot.svg("histogram")


def curve_chart(title: str, x: Sequence[float], y: Sequence[float], axis: str) -> str:
    """A small chart of one column of a log; single points are marked."""
    values = np.array(y, float)
    first, *_, last = values[np.isfinite(values)].tolist() * 2  # twice: there may be one alone
    text = f"{title} from {number(first)} to {number(last)} over {len(x)} rows of the log"
    plot = Plot(title, text, span(np.array(x, float)), span(values), (axis, ""), (300, 200))
    plot.curve(x, y, f'fill="none" stroke="{COLOURS[0]}" stroke-width="2"')
    if len(x) <= 40:
        for a, b in zip(x, y, strict=True):
            if math.isfinite(a + b):
                at = f'cx="{plot.column(a):.1f}" cy="{plot.row(b):.1f}"'
                plot.parts.append(f'<circle r="2.5" fill="{COLOURS[0]}" {at}/>')
    return plot.svg("curve")
