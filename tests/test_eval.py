"""eval.py: the protocol, scoring and evaluating, the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import mean_dice
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
import measures
from support import data, figures, healthy, layouts, scoring
from support.readers import ROW_COUNTS
from support.run import read_rows
from support.worth import bootstrapped_aurocs, interval

U64 = 2.0**-53  # one rounding in float64


# --- The protocol --------------------------------------------------------------------------------


@given(st.integers(2, 130), st.integers(2, 130), st.integers(0, 9))
def test_validation_takes_fifty_or_half_of_each_class(normal, abnormal, seed):
    labels = np.random.default_rng(seed).permutation([0] * normal + [1] * abnormal)
    chosen = evaluation.validation_split(labels, seed)
    assert (chosen & (labels == 0)).sum() == min(50, normal // 2)
    assert (chosen & (labels == 1)).sum() == min(50, abnormal // 2)
    assert (chosen == evaluation.validation_split(labels, seed)).all()


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 0, 1], []])
def test_a_test_split_without_two_of_each_class_is_refused(labels):
    with pytest.raises(ValueError, match="two of each"):
        evaluation.protocol(np.zeros(len(labels)), labels, seed=0)


def cases(normal=20, abnormal=24, side=16, seed=0):
    """Scores, labels, maps, masks, known: square lesions, detected better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0] * normal + [1] * abnormal)
    masks = np.zeros((len(labels), side, side), bool)
    for i in np.flatnonzero(labels):
        y, x = rng.integers(0, side - 5, 2)
        masks[i, y : y + 5, x : x + 4] = True
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32)
    return maps.max((1, 2)), labels, maps, masks, np.ones(len(labels), bool)


def test_protocol_measures_the_images_that_set_no_threshold():
    scores, labels, maps, masks, known = cases()
    row = evaluation.protocol(scores, labels, maps, masks, known, seed=3)
    val = evaluation.validation_split(labels, 3)
    assert row["threshold"] == measures.youden_threshold(scores[val], labels[val])
    assert row["image_auroc"] == measures.auroc(scores[~val], labels[~val])
    want = measures.confusion(scores[~val], labels[~val], row["threshold"])
    assert {k: row[k] for k in want} == want
    assert row["images"] == dict(zip(ROW_COUNTS, (10, 12, 10, 12), strict=True))
    tune, rest = (np.flatnonzero(labels & s) for s in (val, ~val))
    assert row["pixel_threshold"] == measures.dice_threshold(maps, masks, tune)[0]
    assert row["dice"] == pytest.approx(mean_dice(maps, masks, rest, row["pixel_threshold"]))
    assert row["iou"] == pytest.approx(
        measures.iou(maps[rest] >= row["pixel_threshold"], masks[rest]).mean()
    )
    best = row["best_possible"]
    assert best["dice"] >= row["dice"]
    assert best["dice"] == pytest.approx(mean_dice(maps, masks, rest, best["threshold"]))
    assert row["pixel_auroc"] == pytest.approx(measures.auroc(maps[~val], masks[~val]), abs=1e-15)
    assert row["aupro"] == pytest.approx(measures.aupro(maps[~val], masks[~val]), abs=1e-14)
    assert row["pro"] == pytest.approx(measures.aupro(maps[rest], masks[rest]), abs=1e-14)
    assert row["iou_sd"] is row["dice_sd"] is row["pro_sd"] is None
    assert any("half of it" in note for note in row["notes"])
    assert any("one group" in note for note in row["notes"])


def test_paper_protocol_measures_every_image_with_the_same_thresholds():
    case = cases()
    row, paper = (evaluation.protocol(*case, seed=3, paper_protocol=p) for p in (False, True))
    assert paper["threshold"] == row["threshold"]
    assert paper["pixel_threshold"] == row["pixel_threshold"]
    assert paper["image_auroc"] == measures.auroc(case[0], case[1])
    assert paper["aupro"] == pytest.approx(measures.aupro(case[2], case[3]), abs=1e-14)
    assert paper["images"]["test_abnormal"] == 24
    assert any("set the thresholds are measured" in note for note in paper["notes"])


def test_images_without_a_mask_are_left_out_of_the_pixel_measures():
    scores, labels, maps, masks, known = cases()
    some = np.flatnonzero(labels)[::3]
    known[some] = False
    masks[some] = False
    spoilt = maps.copy()
    spoilt[some] = 99  # would count as false alarms
    rows = [evaluation.protocol(scores, labels, m, masks, known, seed=0) for m in (maps, spoilt)]
    assert rows[0] == rows[1]
    assert any("8 abnormal images have no mask" in note for note in rows[0]["notes"])
    none = evaluation.protocol(scores, labels, maps, masks, labels == 0, seed=0)
    assert "aupro" not in none and any("Too few masks" in note for note in none["notes"])
    assert "aupro" not in evaluation.protocol(scores, labels, maps, None, None, seed=0)


def test_there_are_the_papers_five_groups_of_a_hundred():
    assert (evaluation.VALIDATION, evaluation.GROUPS, evaluation.GROUP_SIZE) == (50, 5, 100)
    assert [len(group) for group in evaluation.abnormal_groups(np.arange(950), 0)] == [100] * 5


def test_groups_of_abnormal_images(monkeypatch):
    for name, size in (("GROUPS", 5), ("GROUP_SIZE", 10)):
        monkeypatch.setattr(evaluation, name, size)
    disjoint = evaluation.abnormal_groups(np.arange(100, 150), 0)  # just enough
    assert [len(g) for g in disjoint] == [10] * 5
    assert sorted(np.concatenate(disjoint)) == list(range(100, 150))
    shared = evaluation.abnormal_groups(np.arange(12), 0)
    assert [len(set(g.tolist())) for g in shared] == [10] * 5
    assert len(evaluation.abnormal_groups(np.arange(10), 0)) == 1


def test_iou_dice_and_pro_are_means_over_the_groups(monkeypatch):
    for name, size in (("VALIDATION", 4), ("GROUPS", 5), ("GROUP_SIZE", 4)):
        monkeypatch.setattr(evaluation, name, size)
    _, labels, maps, masks, _ = case = cases()
    row = evaluation.protocol(*case, seed=0)
    val = evaluation.validation_split(labels, 0)
    assert val.sum() == 8
    groups = evaluation.abnormal_groups(np.flatnonzero(labels & ~val), 0)
    ious = [measures.iou(maps[g] >= row["pixel_threshold"], masks[g]).mean() for g in groups]
    dices = [mean_dice(maps, masks, g, row["pixel_threshold"]) for g in groups]
    pros = [measures.aupro(maps[g], masks[g]) for g in groups]
    for name, values in (("iou", ious), ("dice", dices), ("pro", pros)):
        assert len(values) == 5 and row[name] == pytest.approx(np.mean(values))
        assert row[f"{name}_sd"] == pytest.approx(np.std(values, ddof=1))


# --- Scoring, evaluation and the command line ----------------------------------------------------


class Padim:
    """A stand-in with the interface of a detector: redness is abnormal."""

    calls: list[int] = []

    def score(self, images):
        x = torch.as_tensor(np.asarray(images)).float() / 255
        self.calls.append(len(x))
        maps = x[:, 0] - x[:, 1]
        return maps, maps.flatten(1).amax(1)


class Igd(Padim):
    def score(self, images):
        maps, _ = super().score(images)
        return maps, maps.flatten(1).mean(1)


def make_set(root, normal=6, abnormal=6, side=32):
    """An MVTec folder: grey-green images, red squares as lesions, noise."""
    rng = np.random.default_rng(0)

    def image(lesion):
        x = rng.normal(120, 10, (side, side, 3))
        mask = np.zeros((side, side), bool)
        if lesion:
            y, z = rng.integers(2, side - 12, 2)
            mask[y : y + 9, z : z + 8] = True
            x[mask] += (70, -40, -40)
        return np.clip(x, 0, 255).astype(np.uint8), mask

    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    for k in range(2):
        Image.fromarray(image(False)[0]).save(root / f"train/good/{k}.png")
    for k in range(normal):
        Image.fromarray(image(False)[0]).save(root / f"test/good/{k}.png")
    for k in range(abnormal):
        x, mask = image(True)
        Image.fromarray(x).save(root / f"test/spot/{k}.png")
        Image.fromarray(mask).save(root / f"ground_truth/spot/{k}_mask.png")
    return root


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with two detectors, not evaluated yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    root = make_set(tmp_path / "set")
    config = {"image_size": 32, "seed": 1, "data": str(root)}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("detector.pt", "detector_igd.pt"):
        (folder / name).touch()
    monkeypatch.setattr(
        evaluation, "load", lambda path, device: (Igd if "igd" in path.name else Padim)()
    )
    monkeypatch.setattr(evaluation, "KINDS", {"padim": Padim, "igd": Igd})
    return folder


def refused(capsys, *arguments):
    """The one line that a mistake prints; checks the exit status, 2."""
    status = evaluation.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1, (status, out, err)
    return err


def test_load_refuses_files_of_another_kind(tmp_path):
    torch.save({"kind": "magic"}, tmp_path / "magic.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, named in (("magic", "unknown kind 'magic'"), ("list", "not a detector file")):
        with pytest.raises(ValueError, match=f"{name}.pt: .*{named}"):
            evaluation.load(tmp_path / f"{name}.pt", "cpu")
    with pytest.raises(FileNotFoundError, match="none.pt"):
        evaluation.load(tmp_path / "none.pt", "cpu")


def test_score_set_does_not_depend_on_the_batch(monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (7, 3, 32, 32), np.uint8)
    Padim.calls = []
    one, two = (scoring.score_set(Padim(), images, batch=batch) for batch in (3, 7))
    assert Padim.calls == [3, 3, 1, 7]
    assert all((a == b).all() and a.dtype == np.float32 for a, b in zip(one, two, strict=True))
    assert (one[0] == Padim().score(images)[1].numpy()).all()

    monkeypatch.setattr(scoring, "MAPS_IN_MEMORY", 7 * 32 * 32 - 1)
    scores, maps = scoring.score_set(Padim(), images, batch=3)
    assert isinstance(maps, np.memmap) and (maps == one[1]).all() and (scores == one[0]).all()

    blind = SimpleNamespace(score=lambda x: (None, Padim().score(x)[1]))
    assert scoring.score_set(blind, images)[1] is None
    for part in (0, 1):  # a single number of the maps, or of the scores
        outputs = Padim().score(images[:3])
        outputs[part].view(-1)[-1] = math.nan
        broken = SimpleNamespace(score=lambda _, outputs=outputs: outputs)
        with pytest.raises(ValueError, match="not finite in images 0 to 2"):
            scoring.score_set(broken, images, batch=3)


def test_evaluate_a_run_writes_all_that_a_run_holds(run, capsys):
    old = {"untrained": {"image_auroc": 0.5}, "init": "random", "seconds": {"fit": 2}}
    (run / "results.json").write_text(json.dumps(old))
    assert evaluation.main([str(run), "--batch-size", "5"]) == 0
    out, err = capsys.readouterr()
    assert "left out: the row untrained" in err  # it says nothing about its data
    assert out == (run / "results.md").read_text()
    stored = json.loads((run / "results.json").read_text())
    assert set(stored) == {"padim", "igd", "init", "seconds", "healthy"}
    assert stored["seconds"]["fit"] == 2 and stored["seconds"]["evaluate"] > 0
    assert stored["padim"]["image_auroc"] == 1.0 and stored["padim"]["aupro"] > 0.95
    assert sorted(p.name for p in (run / "figures").iterdir()) == [
        "localisation_igd.png",
        "localisation_padim.png",
    ]
    rows = read_rows(run / "scores.csv")
    assert len(rows) == 12 and {r["split"] for r in rows} == {"validation", "test"}
    assert [r["label"] for r in rows] == [str(int(r["kind"] == "spot")) for r in rows]
    for r in rows:
        above = float(r["padim_score"]) >= stored["padim"]["threshold"]
        assert r["padim_predicted"] == str(int(above)) and Path(r["path"]).is_file()
    stored["untrained"] = stored["padim"]
    (run / "results.json").write_text(json.dumps(stored))
    assert evaluation.main([str(run)]) == 0  # the same data: the row stays
    assert "untrained" in json.loads((run / "results.json").read_text())
    assert evaluation.main([str(run), "--paper-protocol"]) == 0
    assert "untrained" in json.loads((run / "results.json").read_text())  # the run's stay
    stored = json.loads((run / "eval-paper-protocol" / "results.json").read_text())
    assert "untrained" not in stored and stored["igd"]["images"]["test_normal"] == 6
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"paper_protocol": True}))
    assert evaluation.main([str(run)]) == 0  # the run's own protocol, also without the flag
    assert json.loads((run / "results.json").read_text())["igd"]["images"]["test_normal"] == 6


def test_evaluate_without_masks_skips_the_pixel_measures(run, tmp_path):
    (tmp_path / "set" / "ground_truth").rename(tmp_path / "elsewhere")
    assert evaluation.main([str(run)]) == 0
    row = json.loads((run / "results.json").read_text())["padim"]
    assert "image_auroc" in row and "aupro" not in row and "iou" not in row
    assert "IoU" not in (run / "results.md").read_text()


def test_another_data_set_leaves_the_run_as_it_is(run, tmp_path, capsys):
    assert evaluation.main([str(run)]) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    other = make_set(tmp_path / "other", normal=8)
    shutil.rmtree(other / "train")  # test images only
    assert evaluation.main([str(run), "--data", str(other)]) == 0
    assert before == {p: p.read_bytes() for p in before}
    made = run / "eval-other"
    stored = json.loads((made / "results.json").read_text())
    assert stored["padim"]["data"]["root"] == str(other)
    assert stored["padim"]["images"]["test_normal"] == 4
    written = {"results.md", "scores.csv", "report.html", "figures", "cache"}
    assert written < {p.name for p in made.iterdir()}
    shutil.copytree(other, tmp_path / "b/other")
    assert evaluation.main([str(run), "--data", str(tmp_path / "b/other")]) == 0
    assert (run / "eval-other-2/results.json").exists()
    assert stored == json.loads((made / "results.json").read_text())
    kinds = tmp_path / "kinds"
    (other / "test").rename(kinds)
    assert evaluation.main([str(run), "--data", str(kinds)]) == 0  # folders of kinds, no test/
    capsys.readouterr()
    assert "no data set" in refused(capsys, run, "--data", tmp_path / "b")


def test_scores_of_healthy_images_give_percentiles_and_measures(run, tmp_path, monkeypatch):
    of_padim = healthy.Healthy(np.array([0.1, 0.2, 0.3, 0.4]), 0.39, (0.0, 1.0))
    monkeypatch.setattr(Padim, "healthy", of_padim, raising=False)
    (run / "detector_igd.pt").unlink()
    assert evaluation.main([str(run)]) == 0
    stored = json.loads((run / "results.json").read_text())
    rows = read_rows(run / "scores.csv")
    for row in rows:
        below = sum(float(row["padim_score"]) > s for s in (0.1, 0.2, 0.3, 0.4))
        assert float(row["padim_percentile"]) == 25 * below
    tested = [r for r in rows if r["split"] == "test"]
    high = [float(r["padim_score"]) >= 0.39 for r in tested]
    found = [h for h, r in zip(high, tested, strict=True) if r["label"] == "1"]
    [of_padim] = stored["healthy"].values()
    assert of_padim["images"] == 4 and of_padim["sensitivity"] == np.mean(found)
    assert "of 4 held-out healthy images is 0.39" in (run / "results.md").read_text()


def test_mistakes_take_one_line_and_write_nothing(run, tmp_path, capsys):
    assert evaluation.main([str(run)]) == 0
    capsys.readouterr()
    stamps = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/the-users.partial").touch()
    assert "no finished run here" in refused(capsys, tmp_path / "empty")
    assert (tmp_path / "empty/the-users.partial").exists()
    for folder in ("test", "ground_truth"):
        for path in (tmp_path / "set" / folder / "spot").iterdir():
            path.unlink()
    assert "both classes" in refused(capsys, run, "--data", tmp_path / "set")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == stamps


def test_the_split_and_the_groups_depend_on_the_seed(monkeypatch):
    labels = np.arange(40) % 2
    one, two = (evaluation.validation_split(labels, seed) for seed in (0, 1))
    assert (one != two).any()
    for name, size in (("GROUPS", 3), ("GROUP_SIZE", 10)):
        monkeypatch.setattr(evaluation, name, size)
    for count in (12, 40):  # shared and disjoint groups
        one, two = (np.stack(evaluation.abnormal_groups(np.arange(count), s)) for s in (0, 1))
        assert (np.sort(one) != np.sort(two)).any()


def test_localisation_counts_ties_as_abnormal_and_has_the_groups_best_threshold():
    _, labels, maps, masks, _ = cases()
    maps, lesions = (3 * maps).round(), np.flatnonzero(labels)  # few levels: scores at thresholds
    groups = [lesions[4:8], lesions[6:10]]  # two images count twice
    row = evaluation.localisation(maps, masks, lesions[:4], groups, np.arange(len(labels)))
    best, grouped = row["best_possible"], np.concatenate(groups)
    assert best["threshold"] == measures.dice_threshold(maps, masks, grouped)[0]
    assert best["threshold"] != row["pixel_threshold"]
    for of, t in ((row, row["pixel_threshold"]), (best, best["threshold"])):
        assert of["iou"] == pytest.approx(measures.iou(maps[grouped] >= t, masks[grouped]).mean())
        assert of["dice"] == pytest.approx(measures.dice(maps[grouped] >= t, masks[grouped]).mean())


@pytest.mark.parametrize("paper", [False, True])
def test_what_evaluate_adds_is_measured_on_the_test_images(tmp_path, monkeypatch, paper):
    dataset = layouts.discover(make_set(tmp_path / "set"))
    labels, rng = dataset.labels, np.random.default_rng(1)
    images = rng.integers(0, 255, (12, 3, 32, 32), np.uint8)  # noise: every subset scores otherwise
    monkeypatch.setattr(Padim, "healthy", healthy.Healthy(np.zeros(1), 0.98, None), raising=False)
    scores, maps = scoring.score_set(Padim(), images)
    row = evaluation.evaluate(
        tmp_path, dataset, {"padim": Padim()}, images,
        seed=3, paper_protocol=paper, baselines={"size": rng.random(12), "score": scores},
    )  # fmt: skip
    test = ~evaluation.validation_split(labels, 3) | paper
    mean = measures.auroc(maps.mean(axis=(1, 2))[test], labels[test])
    assert row["padim"]["image_auroc_mean_of_map"] == mean
    assert row["padim"]["map_scale"] == figures.map_scale(maps, labels) != figures.map_scale(maps)
    want = measures.confusion(scores[test], labels[test], 0.98)
    assert {k: row["healthy"]["padim"][k] for k in want} == want
    [drawn] = bootstrapped_aurocs([scores[test]], labels[test], 3)
    assert row["padim"]["image_auroc_interval"] == interval(drawn)
    best = measures.auroc(scores[test], labels[test])
    assert row["trivial"]["baselines"]["score"] == row["padim"]["image_auroc"] == best


def test_a_run_is_evaluated_with_its_own_seed(run):
    assert evaluation.main([str(run)]) == 0
    rows = read_rows(run / "scores.csv")
    labels = [int(row["label"]) for row in rows]
    one, other = (evaluation.validation_split(labels, seed) for seed in (1, 0))
    assert [row["split"] == "validation" for row in rows] == one.tolist() != other.tolist()


# --- a run is measured again as it was -----------------------------------------------------------

HOW = {"paper_protocol": False, "skip_bad": False, "batch": 4, "device": "cpu"}


def changed(run, **values):
    config = json.loads((run / "config.json").read_text()) | values
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_is_measured_with_its_own_range_of_values(run, tmp_path, monkeypatch):
    for k, file in enumerate(sorted((tmp_path / "set/test").rglob("*.png"))):
        Image.fromarray(np.full((32, 32), 100 * (k + 1), np.uint16)).save(file)
    changed(run, values_shown=[0, 65535])
    seen = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **_: seen.append(np.array(a[3])))
    evaluation.evaluate_run(run, None, **HOW)
    want = [round(255 * 100 * (k + 1) / 65535) for k in range(12)]
    assert seen[0][:, 0, 0, 0].tolist() == want


def test_a_run_that_lacks_a_detector_is_not_measured(run, capsys):
    changed(run, detector="padim,dae")
    assert evaluation.main([str(run)]) == 2
    assert "lacks dae; pmsacl.py --resume finishes it" in capsys.readouterr().err
    assert not (run / "results.json").exists()


def test_a_detector_that_is_measured_again_is_still_compared_with_random_weights(run):
    assert evaluation.main([str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    over = {"difference": 0.1, "interval": [0.05, 0.2]}
    results |= {"untrained": dict(results["padim"]), "note": "of before"}
    results["padim"] |= {"image_auroc": 2.0, "over_untrained": over}
    (run / "results.json").write_text(json.dumps(results))
    assert evaluation.main([str(run)]) == 0
    again = json.loads((run / "results.json").read_text())
    assert again["padim"]["over_untrained"] == over and again["padim"]["image_auroc"] <= 1
    assert again["untrained"] == results["untrained"] and again["note"] == "of before"


def test_a_run_is_measured_on_the_images_that_its_seed_draws(run, monkeypatch):
    seeds, discover = [], layouts.discover

    def noted(root, *, seed, training):
        seeds.append(seed)
        return discover(root, seed=seed, training=training)

    monkeypatch.setattr(layouts, "discover", noted)
    evaluation.evaluate_run(run, None, **HOW)
    assert seeds == [1]


def test_another_protocols_results_name_the_runs_pre_training(run):
    assert evaluation.main([str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"config": {"method": "ccd"}}))
    assert evaluation.main([str(run), "--paper-protocol"]) == 0
    other = json.loads((run / "eval-paper-protocol" / "results.json").read_text())
    assert other["config"] == {"method": "ccd"}  # it decides which row of the paper stands there


def test_the_report_counts_the_images_that_trained(run, tmp_path):
    for k in range(2, 24):
        shutil.copy(tmp_path / "set/train/good/0.png", tmp_path / f"set/train/good/{k}.png")
    changed(run, healthy_share=0.5)
    assert evaluation.main([str(run)]) == 0
    assert "12 healthy images" in (run / "report.html").read_text()


def test_groups_that_share_images_are_told(monkeypatch):
    for name, size in (("VALIDATION", 4), ("GROUPS", 5), ("GROUP_SIZE", 4)):
        monkeypatch.setattr(evaluation, name, size)
    notes = {n: evaluation.protocol(*cases(abnormal=n), seed=0)["notes"] for n in (23, 24)}
    shared = {n: any("share some" in note for note in of) for n, of in notes.items()}
    assert shared == {23: True, 24: False}  # 4 of them set the thresholds


@pytest.mark.parametrize("paper_protocol", [False, True])
def test_figures_show_measured_images_with_a_known_mask(paper_protocol, tmp_path, monkeypatch):
    dataset = layouts.discover(make_set(tmp_path / "set"))
    images, masks, known = data.decode_test(dataset, 32, tmp_path / "cache")[1:]
    known, seen = known.copy(), []
    known[7] = known[9] = False

    def chosen(scores, labels, usable):
        seen.append(usable.copy())
        return [0]

    monkeypatch.setattr(figures, "choose_cases", chosen)
    evaluation.evaluate(
        tmp_path, dataset, {"padim": Padim()}, images, masks, known,
        seed=3, paper_protocol=paper_protocol,
    )  # fmt: skip
    validation = evaluation.validation_split(dataset.labels, 3)
    assert validation[known].any() and (seen[0] == (~validation & known)).all()
