"""The frame of report.html and of report_scored.html, and what their sections are made of.

Style and script are in page.html. Without the script (in print, say) a page shows
the verdicts at the run's own threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy import ndarray as Array

from support import charts

SCORES = 10_000  # of a class that the slider recounts; of more, as many at even ranks
TEMPLATE = Path(__file__).with_suffix(".html")
GLOSSARY = {
    "Score": "a number for each image; higher is more abnormal. Those of two detectors cannot be "
    "compared.",
    "Threshold": "an image is judged abnormal at this score or above. A few test images of both "
    "classes set it, which are not among those measured; without test images it is the 95th "
    "percentile of healthy images that were held out of the training.",
    "Percentile": "the percentage of held-out healthy images with a lower score.",
    "Sensitivity, specificity": "the share of abnormal images that are found, and of normal images "
    "that are passed, at the threshold.",
    "AUROC": "the probability that an abnormal image scores higher than a normal one, with no "
    "threshold: 0.5 is chance, 1 is perfect.",
    "Interval": "95% bootstrap interval over the test images, for the same network.",
    "Heat map": "the score of each pixel, from dark (as in normal images) to bright; all images of "
    "a detector share one scale.",
    "IoU, Dice": "how much the predicted region and the lesion's mask overlap: 0 not at all, 1 "
    "wholly.",
    "Pro, AUPRO": "the share of each lesion that is covered, whatever its size, averaged over "
    "thresholds with at most 30% false alarms among normal pixels.",
    "Untrained, trivial": "baselines: if they do as well, the pre-training has brought nothing.",
    "Spread, accuracy (training)": "the standard deviation of the features (near 0: they have "
    "collapsed to a constant), and how often f_beta predicts the right class.",
}


@dataclass(frozen=True)
class Section:
    """A section of the page.   content: HTML.   detector: the name of the one that it is about."""

    title: str
    content: str
    detector: str = ""

    @property
    def id(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    @property
    def html(self) -> str:
        more = f' class="detector" data-detector="{escape(self.detector)}"' * bool(self.detector)
        return (
            f'<section id="{self.id}" aria-labelledby="{self.id}-title"{more}>'
            f'<h2 id="{self.id}-title">{escape(self.title)}</h2>{self.content}</section>'
        )


def page(title: str, sections: Iterable[Section], scores: Mapping[str, Any]) -> bytes:
    """The whole file.

    sections: those without content are left out.
    scores:   what `recounted` returns, by the name of the detector whose section there is.
    """
    kept = [section for section in sections if section.content]
    links = (f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in kept)
    body = (
        f"<header><h1>{escape(title)}</h1>"
        '<p class="note">PMSACL: detectors of abnormal images, fitted to healthy ones alone. '
        "Research software, not a medical device.</p>"
        f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav></header>'
        f'<main id="main">{"".join(section.html for section in kept)}</main>'
    )
    data = json.dumps(scores).replace("<", "\\u003c")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = template.substitute(title=escape(title), body=body, scores=data)
    return text.encode("utf-8", "backslashreplace")  # a file's name may be no UTF-8


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; the first of a row is its heading. No header: a list of facts."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = (
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escape(caption)}</caption>'
        + f"<thead><tr>{head}</tr></thead>" * bool(header)
        + f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def recounted(scores: Array, labels: Array | None, threshold: float | None) -> dict[str, Any]:
    """What the script recounts: ascending scores of each class; labels None: not known."""
    y = np.ones(len(scores), bool) if labels is None else labels
    content: dict[str, Any] = {
        "threshold": None if threshold is None else float(f"{threshold:.9g}"),
        "labelled": labels is not None,
    }
    for word, members in (("normal", ~y), ("abnormal", y)):
        ascending = np.sort(scores[members])
        ascending = ascending[charts.spread_out(len(ascending), SCORES)]
        content[word] = [float(f"{s:.9g}") for s in ascending]  # what tells any two float32 apart
    return content


def slider(name: str, threshold: float, scores: Array) -> str:
    """The controls of a detector's threshold."""
    low, high = charts.span(np.append(scores, threshold))
    return (
        f'<div class="controls"><label>Threshold of {escape(name)} <input type="range" step="any" '
        f'name="threshold" min="{low:.9g}" max="{high:.9g}" value="{threshold:.9g}"></label>'
        '<label>Exactly <input type="number" step="any" name="exact" '
        f'value="{threshold:.9g}"></label><button name="reset" type="button">As in the run</button>'
        "</div>"
    )


def glossary() -> Section:
    lines = (f"<div><dt>{escape(k)}:</dt> <dd>{escape(v)}</dd></div>" for k, v in GLOSSARY.items())
    return Section("Glossary", f'<dl class="glossary">{"".join(lines)}</dl>')
