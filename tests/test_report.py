"""report.html: its structure, its numbers, and in Chromium, where it is installed, its script."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mvtec
from PIL import Image
from test_figures import corners

import eval as evaluation
from detectors import PaDiM
from encoder import ResNet18
from measures import auroc, confusion
from support import cards, charts, data, figures, healthy, layouts, options, report
from support.new_images import NewImages, write_score_report
from support.page import SCORES, recounted, slider
from support.readers import ROW_COUNTS
from support.score_files import Judge

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
VOID = {"meta", "img", "input", "br", "link"}
SHAPES = {"rect", "path", "polygon", "polyline", "circle", "line"}  # closed by themselves
EVIL = "<b>\"&'<!--<script>.png"


class Page(HTMLParser):
    """The elements of a page in order, and that they are closed as they were opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.elements, self.open, self.texts = html, [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SHAPES
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "script" not in self.open and "style" not in self.open:
            self.texts.append(text)

    def all(self, tag: str, **wanted) -> list[dict]:
        attributes = [a for t, a in self.elements if t == tag]
        return [a for a in attributes if all(a.get(k) == v for k, v in wanted.items())]

    def cards(self) -> list[dict]:
        return [a for a in self.all("li") if (a.get("class") or "").startswith("card")]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


class Detector:
    """Scores with errors of both kinds; the maps' brightest place is at the left."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores, self.seen = scores, 0

    def score(self, images):
        part = self.scores[self.seen : self.seen + len(images)]
        self.seen = (self.seen + len(images)) % len(self.scores)
        ramp = torch.linspace(1, 0, images.shape[-1])
        maps = torch.as_tensor(part)[:, None, None] * ramp.expand(len(images), len(ramp), -1)
        return maps.contiguous(), torch.as_tensor(part)


N, SIDE = 40, 16


def scores_of(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.arange(N) % 2
    return (3 + labels + rng.normal(size=N)).astype(np.float32)


def data_set(root: Path) -> layouts.Dataset:
    samples = tuple(
        layouts.Sample(Path(f"{i:02}{EVIL}"), i % 2, ("good", "flat", "good", "round")[i % 4])
        for i in range(N)
    )
    return layouts.Dataset("MVTec", root, (Path("a.png"),), samples)


def run(folder: Path, *, masks: bool = True, paper: bool = False, **detectors) -> dict:
    """Evaluate detectors on made-up images and write all of a run's files."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (N, 3, SIDE, SIDE), dtype=np.uint8)
    lesions = np.zeros((N, SIDE, SIDE), bool)
    lesions[1::2, 4:9, 2:9] = True
    config = vars(options.make_config({"data": "", "out": str(folder), "lr": 0.02, "seed": 7}))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"commit": "abc", "torch": "2"}))
    (folder / "log.csv").write_text("epoch,ctr,accuracy,fake_auroc\n1,0.5,,\n2,0.25,0.3,0.7\n")
    return evaluation.evaluate(
        folder, data_set(folder), detectors or {"padim": Detector(scores_of(1))}, images,
        lesions if masks else None, np.ones(N, bool), seed=0, paper_protocol=paper,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with two detectors, its page and its results."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    both = {"padim": Detector(scores_of(1)), "untrained": Detector(scores_of(2))}
    results = run(folder, **both)
    return folder, results, Page((folder / "report.html").read_text())


def assert_well_made(page: Page) -> None:
    """What holds for every page: ids, labels, alternative texts, nothing from outside."""
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), value
    assert all(a["href"][1:] in ids for a in page.all("a"))
    rest = re.sub(r'base64,[^"]+"', "", page.html)
    assert not re.search(r"//[a-z]|@import|url\(|\bfetch\(|XMLHttp", rest), "from outside"
    assert all(a.get("alt") for a in page.all("img"))
    charts_ = page.all("svg")
    assert all(a["role"] == "img" for a in charts_)
    assert page.html.count("<desc>") == len(charts_) and "<desc></desc>" not in page.html
    assert page.all("html")[0]["lang"] == "en" and page.all("main") and len(page.all("h1")) == 1
    for control in [*page.all("input"), *page.all("select")]:
        assert re.search(rf"<label>[^<]+<[^<]*name=\"{control['name']}\"", page.html)
    assert "@media print" in page.html and "default-src 'none'" in page.html
    assert "nan" not in page.text.lower().split()
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_a_runs_page_is_one_file_with_everything_named(two):
    folder, results, page = two
    assert_well_made(page)
    assert (folder / "report.html").stat().st_size < 5e6
    titles = [t for t in page.texts if t.strip()]
    for title in ("What was run", "Measures", "Kinds", "Detector: padim", "Training", "Settings"):
        assert title in titles
    assert "Detector: untrained" not in titles  # a baseline: its curve, not its images
    assert f"{results['padim']['image_auroc']:.3f}" in page.text
    assert len(page.all("dt")) == 11
    for title in ("l_ctr, eq. 3", "accuracy of f_beta, held-back images", "AUROC, fake lesions"):
        assert title in titles
    assert [a["class"] for a in page.all("svg")] == ["roc", "histogram", "curve", "curve", "curve"]


def test_names_of_files_cannot_break_the_page(two):
    _, _, page = two
    assert EVIL not in page.html
    assert all(a["data-name"][2:] == EVIL for a in page.cards())
    assert not page.all("b")


def test_errors_come_first_and_each_verdict_is_that_of_the_threshold(two):
    _, results, page = two
    threshold, shown = results["padim"]["threshold"], page.cards()
    s, labels = scores_of(1), np.arange(N) % 2
    validation = evaluation.validation_split(labels, 0)
    wrong = (s >= threshold) != labels
    errors = [a for a in shown if a["class"] == "card wrong"]
    assert errors == shown[: len(errors)] and len(errors) == (wrong & ~validation).sum() > 2
    assert len(shown) == (~validation).sum()
    recounts = json.loads(re.search(r"application/json[^>]*>(.*?)</script>", page.html, re.S)[1])
    counts = [len(recounts["padim"][word]) for word in ("normal", "abnormal")]
    assert counts == np.bincount(labels[~validation]).tolist()
    words = {("0", 0): "passed", ("0", 1): "false alarm", ("1", 0): "missed", ("1", 1): "found"}
    for card in shown:
        high = int(float(card["data-score"]) >= threshold)
        assert card["data-verdict"] == words[card["data-label"], high]


def test_the_papers_protocol_shows_cards_of_all_images_that_it_measures(tmp_path):
    run(tmp_path, paper=True)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.cards()) == N


def test_each_roc_curve_is_of_its_detectors_own_measured_scores(tmp_path, monkeypatch):
    seen, labels = [], np.arange(N) % 2
    monkeypatch.setattr(charts, "roc_chart", lambda curves, *rest: seen.append(curves) or "")
    run(tmp_path, padim=Detector(scores_of(1)), untrained=Detector(scores_of(2)))
    keep = ~evaluation.validation_split(labels, 0)
    for name, seed in (("padim", 1), ("untrained", 2)):
        want = charts.roc(scores_of(seed)[keep], labels[keep])
        np.testing.assert_array_equal(np.stack(seen[0][name]), np.stack(want))


def test_charts_and_counts_below_them_are_of_the_measured_images(tmp_path, monkeypatch):
    points, groups = [], []
    monkeypatch.setattr(
        charts, "roc_chart", lambda _, point, text: points.append(point) or f"<p>{text}</p>"
    )
    monkeypatch.setattr(
        charts, "histogram", lambda group, _, text: groups.append(group) or f"<p>{text}</p>"
    )
    threshold = run(tmp_path, padim=Detector(scores_of(0)))["padim"]["threshold"]
    text = Page((tmp_path / "report.html").read_text()).text
    s, labels = scores_of(0), np.arange(N) % 2 == 1
    keep = ~evaluation.validation_split(labels, 0)
    normal, abnormal = s[keep & ~labels], s[keep & labels]
    found, passed = (abnormal >= threshold).sum(), (normal < threshold).sum()
    assert (found, passed) == (6, 8)  # nor 4 and 2, the misses and the false alarms
    a, b = len(abnormal), len(normal)
    assert f"sensitivity {found} of {a} ({found / a:.3f}), specificity {passed} of {b} (" in text
    assert points == [pytest.approx((1 - passed / b, found / a))]
    assert f"sensitivity {found / a:.3f} and specificity {passed / b:.3f} at its" in text
    assert {k: sorted(v) for k, v in groups[0].items()} == {
        f"normal ({b})": sorted(normal), f"abnormal ({a})": sorted(abnormal),
    }  # fmt: skip
    medians = (charts.number(float(np.median(part))) for part in (normal, abnormal))
    assert "median {} of the normal images, {} of the abnormal ones".format(*medians) in text


def test_each_measure_of_the_page_stands_under_its_name():
    row = {
        "image_auroc": 0.91, "sensitivity": 0.6, "specificity": 0.7, "accuracy": 0.65, "iou": 0.3,
        "image_auroc_mean_of_map": 0.81, "pixel_auroc": 0.93, "aupro": 0.55, "dice": 0.4,
        "pro": 0.5, "notes": [], "threshold": 1.0,
        "images": dict(zip(ROW_COUNTS, (3, 4, 1, 2), strict=True)),
    }  # fmt: skip
    text = report._measures({"padim": row}, {"padim": row}).content
    assert "Measured on 1 normal and 2 abnormal images; 3 and 4 set the thresholds." in text
    heads, cells = (re.findall(rf"<{tag}[^>]*>([^<]*)</", text) for tag in ('th scope="col"', "td"))
    assert dict(zip(heads[1:], cells, strict=True)) == {
        "AUROC": "0.910", "Sensitivity": "0.600", "Specificity": "0.700", "Accuracy": "0.650",
        "AUROC of the map's mean": "0.810", "pixel AUROC": "0.930", "AUPRO": "0.550",
        "IoU": "0.300", "Dice": "0.400", "Pro": "0.500",
    }  # fmt: skip


def test_what_was_run_tells_how_many_images_of_each_class_there_are():
    samples = [layouts.Sample(Path(f"{k}.png"), int(k > 2), "x") for k in range(9)]
    dataset = layouts.Dataset("MVTec", Path("/set"), (Path("a.png"),) * 5, tuple(samples))
    text = report._what(dataset, {}, {"data": "/set"}, own=True).content
    assert "5 healthy images" in text and "3 normal and 6 abnormal images, 0 masks" in text


@pytest.mark.parametrize(
    ("log", "column", "title", "name"),
    [
        ("log.csv", "spread", "pre-training", "spread of the features"),
        ("log_local.csv", "distance", "pre-training on patches", "distance of the class means"),
        ("log_igd_global.csv", "fake_aupro", "IGD's global model", "AUPRO, fake lesions"),
        ("log_igd_local.csv", "pmsacl", "IGD's local model", "l_PMSACL, eq. 4"),
    ],
)
def test_each_log_and_each_of_its_columns_has_its_title(log, column, title, name, tmp_path):
    (tmp_path / log).write_text(f"epoch,{column}\n1,0.5\n2,0.25\n")
    dataset = layouts.Dataset("one folder", tmp_path, (Path("a.png"),), ())
    report.write_report(tmp_path, dataset, {})
    texts = Page((tmp_path / "report.html").read_text()).texts
    assert [text for text in texts if text in report.LOGS.values()] == [title]
    assert name in texts and f"{name} from 0.5 to 0.25 over 2 rows of the log" in texts


def test_cards_have_image_heat_map_and_outline_and_say_what_they_show(two):
    _, _, page = two
    alts = [a["alt"] for a in page.all("img")]
    assert len(alts) == 3 * len(page.cards())
    assert any("heat map: brightest 3% from the left, 3% down" in alt for alt in alts)
    assert any(re.search("lesion in cyan, 14%; Dice 0", alt) for alt in alts)


def test_without_masks_there_are_no_outlines(tmp_path):
    run(tmp_path, masks=False)
    page = Page((tmp_path / "report.html").read_text())
    assert_well_made(page)
    assert len(page.all("img")) == 2 * len(page.cards()) > 0
    assert "Dice" not in page.text.split("Glossary")[1].split("IoU, Dice")[0]


def test_rows_that_others_add_are_shown_if_they_are_there(tmp_path):
    kinds = {"flat": 0.123, "round": 0.987}
    trivial = {"image_auroc": 0.65, "image_auroc_interval": [0.61, 0.69], "baseline": "16 x 16"}
    fakes: dict = {"image_auroc": 0.71, "aupro": 0.32}
    fakes["untrained"] = {"image_auroc": 0.61, "aupro": 0.22}
    results = run(tmp_path) | {"trivial": trivial, "fake_lesions": fakes}
    results["padim"] |= {
        "kinds": kinds,
        "image_auroc_mean_of_map": 0.456,
        "over_untrained": {"difference": -0.05, "interval": [-0.09, 0.01]},
    }
    validation = evaluation.validation_split(np.arange(N) % 2, 0)
    scores = {"padim": scores_of(1), "f_beta": scores_of(3)}
    results["f_beta"] = results["padim"] | {"threshold": 3.5}
    report.write_report(tmp_path, data_set(tmp_path), results, scores, validation, {})
    page = Page((tmp_path / "report.html").read_text())
    assert_well_made(page)
    for words in (
        "0.650 [0.610, 0.690]", "(16 x 16)", "0.123, ", "0.987, ", "0.456",
        "(untrained): image AUROC 0.710 (0.610), AUPRO 0.320 (0.220).",
        "padim's AUROC differs by -0.050", "-0.090 to +0.010", "f_beta",
    ):  # fmt: skip
        assert words in page.text, words
    assert not page.cards()  # no heat maps: the detector's section has its charts alone
    assert page.all("svg", **{"class": "roc"})


def test_kinds_are_measured_against_all_normal_images(two):
    _, results, page = two
    s, labels = scores_of(1), np.arange(N) % 2 == 1
    keep = ~evaluation.validation_split(labels, 0)
    flat = np.array([sample.kind == "flat" for sample in data_set(Path()).test])
    against = keep & (flat | ~labels)
    found = (s[keep & flat] >= results["padim"]["threshold"]).sum()
    assert f"flat {(keep & flat).sum()} {auroc(s[against], labels[against]):.3f}, " in page.text
    assert f"{auroc(s[against], labels[against]):.3f}, {found} found" in page.text


def test_a_run_that_is_evaluated_on_other_images_says_so(two, tmp_path):
    _, _, page = two
    assert "other images: phantoms" in page.text  # the config's are, the root is another
    assert "say nothing about the method" not in page.text
    (tmp_path / "config.json").write_text('{"data": "/own", "method": "pmsacl"}')
    dataset = layouts.Dataset("MVTec", Path("/own").resolve(), (Path("a.png"),) * 3, ())
    report.write_report(tmp_path, dataset, {})
    assert "Training 3 healthy images" in Page((tmp_path / "report.html").read_text()).text


def test_a_run_of_healthy_images_only_has_a_page(tmp_path):
    tmp_path = tmp_path / "a <b> run"
    tmp_path.mkdir()
    (tmp_path / "log.csv").write_text("epoch,ctr\n1,0.5\n")
    dataset = layouts.Dataset("one folder", tmp_path, (Path("a.png"),) * 3, ())
    (tmp_path / "config.json").write_text(json.dumps({"data": str(tmp_path), "method": "pmsacl"}))
    results = {"init": "random", "seconds": {"pretrain": 2.0}, "data_notes": ["left out: b.png"]}
    report.write_report(tmp_path, dataset, results)
    page = Page((tmp_path / "report.html").read_text())
    assert_well_made(page)
    assert "healthy images only" in page.text and not page.cards()
    assert "left out: b.png" in page.text
    assert "a <b> run: report" in page.text and not page.all("b")
    assert "3 healthy images" in page.text


def test_the_command_makes_the_same_config():
    given = {"data": "a b", "lr": 0.02, "skip_bad": True, "preset": "quick", "detector": "both"}
    config = options.make_config(given | {"method": "simclr"})
    program, file, *words = shlex.split(report.command(vars(config)))
    assert (program, file) == ("python", "pmsacl.py")
    parsed, _ = options.parse(words)
    again = options.make_config(parsed)
    assert vars(again) == vars(config) | {"data": str(Path("a b").resolve())}
    assert report.command(vars(options.make_config({}))) == "python pmsacl.py"


# --- what is chosen, counted and drawn -----------------------------------------------------------


def test_wrong_images_are_chosen_first_then_both_ends():
    scores, labels = np.arange(20.0), np.arange(20) >= 10
    labels[[2, 17]] = True, False
    shown = np.ones(20, bool)
    chosen = cards.choose(scores, labels, 9.5, shown, 8)
    assert chosen == [2, 17, 19, 18, 10, 9, 8, 0]
    assert cards.choose(scores, labels, 9.5, shown, 100)[:2] == [2, 17]
    assert sorted(cards.choose(scores, labels, 9.5, shown, 100)) == list(range(20))
    labels[[3, 16]] = True, False
    assert cards.choose(scores, labels, 9.5, shown, 4)[:2] == [2, 17]  # the worst of two
    shown[2] = False
    assert 2 not in cards.choose(scores, labels, 9.5, shown, 100)
    assert len(cards.choose(scores, labels, 99, shown, 8)) == 8  # all abnormal ones are missed


def test_an_roc_curve_has_the_area_that_is_measured():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200).astype(bool)
    scores = (labels + rng.normal(size=200)).round(1)  # ties
    fpr, tpr = charts.roc(scores, labels)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(scores, labels), abs=1e-12)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-3.2, 18.7), (1e-6, 3e-6), (0.0, 12345.0)])
def test_ticks_are_round_few_and_within(ends):
    values = charts.ticks(*ends)
    assert 2 <= len(values) <= 7
    width = ends[1] - ends[0]
    assert all(ends[0] - 1e-9 * width <= v <= ends[1] + 1e-9 * width for v in values)
    step = values[1] - values[0]
    assert float(f"{step:.0e}") == pytest.approx(step)


def test_equal_scores_can_be_drawn():
    charts.histogram({"normal": np.ones(3), "abnormal": np.ones(2)}, 1.0, "all the same")
    charts.curve_chart("a", [1.0], [0.0], "epoch")


def test_the_slider_gets_every_score_or_even_ranks_of_too_many():
    scores, labels = np.float32(np.arange(7) / 3), np.arange(7) % 2 == 1
    data = recounted(scores, labels, scores[5])
    assert np.float32(data["normal"]).tolist() == scores[~labels].tolist()
    assert data["threshold"] == data["abnormal"][2]  # equal as written, so >= holds
    shown = cards.card_html(cards.Card("a", float(scores[5]), 1, "", "", {}), float(scores[5]))
    assert f'data-score="{data["threshold"]:.9g}"' in shown  # the script judges by it
    controls = slider("padim", float(scores[5]), scores)
    assert controls.count(f' value="{data["threshold"]:.9g}"') == 2
    many = recounted(np.arange(3.0 * SCORES), np.zeros(3 * SCORES, bool), None)
    assert len(many["normal"]) == SCORES and not many["abnormal"]
    assert (many["normal"][0], many["normal"][-1]) == (0, 3 * SCORES - 1)
    new = recounted(scores, None, 1.0)
    assert not new["labelled"] and (len(new["normal"]), len(new["abnormal"])) == (0, 7)
    assert 'min="1" max="5" value="5"' in slider("padim", 5.0, np.array([1.0, 2.0]))  # reachable


@pytest.mark.parametrize(
    ("strong", "words"),
    [
        ("medmix", "Healthy images with 0, 1, ... fake lesions"),
        ("rotation", "Classes 0, 1, ... of"),
    ],
)
def test_the_views_are_named_by_what_makes_their_classes(strong, words, tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "figures" / f"{strong}.png")
    assert words in report._views(tmp_path, {"strong": strong})


# --- new images ----------------------------------------------------------------------------------


KEPT_OUT = healthy.Healthy(np.arange(0.0, 8.0), 6.65, (0.0, 1.0))


def new_images(count: int) -> NewImages:
    judges = {"padim": Judge(5.0, KEPT_OUT, (0.0, 1.0)), "igd": Judge(None, None, (0.0, 1.0))}
    new = NewImages(judges)
    rng = np.random.default_rng(0)
    for k in range(count):
        image = rng.integers(0, 255, (3, SIDE, SIDE), dtype=np.uint8)
        scored = {name: (float((7 * k) % count), rng.random((SIDE, SIDE))) for name in judges}
        words = {name: judges[name].words(score) for name, (score, _) in scored.items()}
        new.add(Path(f"{k}.png"), image, scored, words)
    return new


def test_new_images_have_verdicts_where_there_is_a_threshold(tmp_path):
    new = new_images(10)
    write_score_report(tmp_path, new)
    page = Page((tmp_path / "report_scored.html").read_text())
    assert_well_made(page)
    assert len(page.cards()) == 20
    padim, igd = page.cards()[:10], page.cards()[10:]
    assert [float(a["data-score"]) for a in padim] == list(range(9, -1, -1))
    assert [a["data-verdict"] for a in padim] == ["abnormal"] * 5 + ["normal"] * 5
    assert {a["data-verdict"] for a in igd} == {""}
    assert "5 of 10 (0.500) judged abnormal" in page.text
    assert new.judges["padim"].words(5.0)["verdict"] == "abnormal"  # at the threshold or above
    assert "62% of 8 held-out healthy images lie below it" in page.text
    for score, card in zip(range(9, -1, -1), new.cards("padim"), strict=True):
        assert card.facts == f"above {12.5 * min(score, 8):.1f}% of healthy images"
    assert "above 87.5% of healthy images" in page.text
    assert "padim: scores from 0 to 9, median 4.5" in page.text
    assert "no threshold" in page.text.split("Detector: igd")[-1]


def test_new_images_stand_beside_the_healthy_ones_in_the_histogram(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(charts, "histogram", lambda groups, *_: seen.append(groups) or "")
    new = new_images(10)
    write_score_report(tmp_path, new)
    for groups, healthy_scores in zip(seen, (KEPT_OUT.scores.tolist(), None), strict=True):
        want = {"new images (10)": list(range(10))}
        want |= {} if healthy_scores is None else {"healthy (8)": healthy_scores}
        assert {name: sorted(scores) for name, scores in groups.items()} == want


def test_the_axes_and_the_colour_scale_are_named_at_their_ends():
    roc = charts.roc_chart({"padim": (np.array([0, 1]), np.array([0, 1]))}, (0.5, 0.5), "t")
    bars = charts.histogram({"normal": np.arange(3.0)}, 1.0, "t")
    for svg, across, upwards in (
        (roc, "false alarms: 1 - specificity", "sensitivity"),
        (bars, "score: higher is more abnormal", "share of the images"),
    ):
        assert re.search(r"rotate\(-90[^>]*>([^<]*)<", svg)[1] == upwards
        assert f">{across}<" in svg
    html = cards.cards_html(cards.Gallery([], (0.25, 4.0)), 1.0, "All.")
    assert re.search(r"Heat maps: 0.25 <span[^>]*></span> 4[.]<", html)


def test_of_many_new_images_both_ends_are_kept():
    new = new_images(201)  # 7 k mod 201 takes every value once
    kept = [card.score for card in new.cards("padim")]
    assert kept == [*range(200, 200 - new.most, -1), *range(new.most - 1, -1, -1)]
    assert len(new.scores["padim"]) == 201


def test_score_writes_the_page(tmp_path, capsys):
    mvtec(tmp_path / "data")
    config = options.make_config({"data": "", "out": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    paths = sorted((tmp_path / "data/train/good").glob("*.png"))
    images, _ = data.decode(paths, 64, tmp_path / "cache")
    PaDiM(ResNet18().eval(), channels=4).fit(images).save(tmp_path / "detector.pt")
    assert evaluation.main([str(tmp_path), "--score", str(tmp_path / "data/test/polyp")]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3 and "report_scored.html" in captured.err
    page = Page((tmp_path / "scored/report_scored.html").read_text())
    assert_well_made(page)
    assert len(page.cards()) == 3 and "no threshold" in page.text


# --- in a browser --------------------------------------------------------------------------------


def opened(file: Path, fragment: str, home: Path) -> Page:
    """The page as Chromium has it after its script has run; fails if the script does."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
        "--enable-logging=stderr", f"--user-data-dir={home}", "--dump-dom",
        f"file://{file}{fragment}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout)


browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")


@browser
@pytest.mark.parametrize("value", [None, "a score", 99.0])
def test_the_slider_recounts_in_a_browser(two, tmp_path, value):
    folder, results, page = two
    if value == "a score":  # which then counts as reached
        value = sorted(float(a["data-score"]) for a in page.cards())[7]
    fragment = "" if value is None else f"#threshold={value}"
    page = opened(folder / "report.html", fragment, tmp_path)
    t = results["padim"]["threshold"] if value is None else value
    s, labels = scores_of(1), np.arange(N) % 2
    keep = ~evaluation.validation_split(labels, 0)
    want = confusion(s[keep], labels[keep], float(np.float32(t)))
    match = re.search(
        r"sensitivity (\d+) of (\d+) \(([\d.]+)\), specificity (\d+) of (\d+) \(([\d.]+)\)",
        page.text,
    )
    assert [int(match[2]), int(match[5])] == [labels[keep].sum(), (1 - labels[keep]).sum()]
    assert int(match[1]) / int(match[2]) == pytest.approx(want["sensitivity"])
    assert int(match[4]) / int(match[5]) == pytest.approx(want["specificity"])
    assert match[3] == f"{want['sensitivity']:.3f}" and match[6] == f"{want['specificity']:.3f}"
    shown = page.cards()
    ranks = {"missed": 0, "false alarm": 1}
    order = [ranks.get(card["data-verdict"], 2) for card in shown]
    assert order == sorted(order) and len(shown) == keep.sum()
    for card in shown:
        right = (float(card["data-score"]) >= t) == (card["data-label"] == "1")
        assert card["class"] == ("card right" if right else "card wrong")
    (point,) = page.all("circle", **{"class": "moves"})
    x, y = charts.Plot("", "", (0.0, 1.0), (0.0, 1.0), ("", "")), want
    assert float(point["cx"]) == pytest.approx(x.column(1 - y["specificity"]), abs=0.1)
    assert float(point["cy"]) == pytest.approx(x.row(y["sensitivity"]), abs=0.1)


STEPS = """<script>
var steps = [];
function put(name, value, kind) {
  var field = document.querySelector("[name=" + name + "]");
  field.value = value;
  field.dispatchEvent(new Event(kind || "input"));
}
function look() {  // the cards that can be seen, in their order, and what the page says of them
  var seen = Array.from(document.querySelectorAll(".card")).filter(function (c) {
    return c.offsetParent !== null;
  });
  steps.push({
    cards: seen.map(function (c) { return Object.assign({}, c.dataset); }),
    says: [".recount", ".shown"].map(function (n) {
      return document.querySelector(n).textContent;
    }).join(" ")
  });
}
put("order", "low", "change"); look();
put("order", "name", "change"); look();
put("class", "kind flat"); look();
put("class", ""); put("verdict", "missed"); look();
put("verdict", ""); put("from", "3"); put("to", "4"); look();
put("from", ""); put("to", ""); put("class", "1"); put("threshold", "3.5"); look();
put("exact", "2", "change"); look();
document.querySelector("[name=reset]").click(); look();
var settings = Array.from(document.querySelectorAll("details"));
window.dispatchEvent(new Event("beforeprint"));
steps.push(settings.map(function (part) { return part.open; }));
document.body.dataset.steps = JSON.stringify(steps);
</script></body>"""


@browser
def test_images_are_sorted_and_filtered_in_a_browser(two, tmp_path):
    _, results, page = two
    file = tmp_path / "page.html"
    file.write_text(page.html.replace("</body>", STEPS))
    (body,) = opened(file, "", tmp_path / "home").all("body")
    low, names, flat, missed, within, moved, exact, back, printed = json.loads(body["data-steps"])
    values = [float(card["score"]) for card in low["cards"]]
    assert values == sorted(values) and len(values) == len(page.cards())
    assert [c["name"] for c in names["cards"]] == sorted(a["data-name"] for a in page.cards())
    for step, key, value in ((flat, "kind", "flat"), (missed, "verdict", "missed")):
        want = [a for a in page.cards() if a[f"data-{key}"] == value]
        assert {card[key] for card in step["cards"]} == {value}
        assert len(step["cards"]) == len(want) < len(page.cards())
        assert f"{len(want)} of {len(page.cards())} images are shown" in step["says"]
    want = [a for a in page.cards() if 3 <= float(a["data-score"]) <= 4]
    assert len(within["cards"]) == len(want) > 0
    assert "threshold of 3.5:" in moved["says"] and "threshold of 2:" in exact["says"]
    assert {card["label"] for card in moved["cards"]} == {"1"}
    for card in moved["cards"]:
        assert card["verdict"] == ("found" if float(card["score"]) >= 3.5 else "missed")
    assert f"threshold of {results['padim']['threshold']:.9g}:" in back["says"]
    assert printed == [True]  # all settings are on paper


# --- charts and cards: what stands where ---------------------------------------------------------


def test_the_operating_point_lies_at_its_rates():
    curve = np.array([0, 0.2, 1]), np.array([0, 0.9, 1])
    svg = charts.roc_chart({"a": curve}, (0.2, 0.9), "t")
    plot = charts.Plot("", "", (0.0, 1.0), (0.0, 1.0), ("", ""))
    assert f'cx="{plot.column(0.2):.1f}" cy="{plot.row(0.9):.1f}"' in svg


def test_bars_are_shares_of_their_class_and_a_far_threshold_stands_at_the_edge():
    g = np.random.default_rng(0)
    groups = {"normal": g.normal(size=300), "abnormal": g.normal(size=20)}
    svg = charts.histogram(groups, 99.0, "t")
    assert f'x1="{charts.WIDTH - charts.RIGHT:.1f}"' in svg
    heights = []
    for points in re.findall(r'<polygon points="([^"]+)"', svg):
        y = [float(p.split(",")[1]) for p in points.split()][1:-1:2]
        heights.append(sum(charts.HEIGHT - charts.BOTTOM - v for v in y))
    assert heights[0] == pytest.approx(heights[1], rel=0.02)


def test_a_card_outlines_prediction_and_truth_and_says_where_it_is_brightest(monkeypatch):
    maps, images = corners(), np.zeros((4, 3, 32, 32), np.uint8)
    masks = maps[::-1] > 0
    samples = [layouts.Sample(Path(f"{k}.png"), k % 2, "kind") for k in range(4)]
    row = {"threshold": 0.5, "map_scale": (0.0, 1.0), "pixel_threshold": 1.0}
    outlined = []  # a pixel at the threshold is predicted, too

    def outline(image, mask, colour, side):
        outlined.append((colour, mask))
        return Image.new("RGB", (side, side))

    monkeypatch.setattr(figures, "outlined", outline)
    shown = cards.gallery(images, maps, masks, samples, np.arange(4.0), row, np.zeros(4, bool))
    words = {}
    for card in shown.cards:
        k = int(card.name.split(".")[0])
        words[k] = next(text for text in card.pictures if "brightest" in text)
        for colour, mask in ((figures.YELLOW, maps[k] > 0), (figures.CYAN, masks[k])):
            drawn, region = outlined.pop(0)
            assert drawn == colour and (region == mask).all()
    assert "52% from the left, 2% down" in words[1] and "2% from the left, 52% down" in words[2]
