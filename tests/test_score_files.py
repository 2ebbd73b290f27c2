"""eval.py RUN --score: lines, scores.csv, overlays, where they go, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import threading

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_tables import ROW

import eval as evaluation
from support import cache, score_files
from support.healthy import Healthy
from support.run import read_rows


class Bright:
    """A stand-in with the interface of a detector: brightness is abnormal."""

    healthy: Healthy | None = Healthy(np.array([0.1, 0.3, 0.5, 0.9]), 0.8, (0.2, 0.6))

    def score(self, images):
        maps = torch.as_tensor(np.asarray(images)).float().mean(1) / 255
        return maps, maps.flatten(1).mean(1)


class Blind(Bright):
    """Without heat maps, and no healthy images were held out of its training."""

    healthy = None

    def score(self, images):
        return None, 1 - super().score(images)[1]


def grey(path, value, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a detector that has healthy scores, and one that has not."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"image_size": 32, "seed": 0, "data": ""}')
    for name in ("detector.pt", "detector_f_beta.pt"):
        (folder / name).touch()
    monkeypatch.setitem(evaluation.KINDS, "bright", Bright)
    monkeypatch.setitem(evaluation.KINDS, "blind", Blind)
    monkeypatch.setattr(
        evaluation, "load", lambda path, device: (Blind if "f_beta" in path.name else Bright)()
    )
    return folder


@pytest.fixture
def new(tmp_path):
    """Images of different brightness, in two folders."""
    for name, value in (("a.png", 255), ("b.png", 51), ("inside/a.png", 102), (".hid.png", 0)):
        grey(tmp_path / "new" / name, value)
    return tmp_path / "new"


def rows_of(folder):
    return read_rows(folder / "scores.csv")


def test_scores_percentiles_verdicts_and_overlays(run, new, capsys):
    assert evaluation.main([str(run), "--score", str(new), "--batch-size", "2"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert [c[0] for c in lines] == [str(new / n) for n in ("a.png", "b.png", "inside/a.png")]
    assert lines[0][1:] == ["bright", "1", "100.0%", "abnormal", "blind", "0", "-", "-"]
    assert lines[1][1:4] == ["bright", "0.2", "25.0%"] and lines[2][1:4] == [
        "bright", "0.4", "50.0%",
    ]  # fmt: skip
    assert "blind: no healthy images were held out" in err and "no verdict" in err
    rows = rows_of(run / "scored")
    assert [r["path"] for r in rows] == [c[0] for c in lines]
    assert [float(r["bright_percentile"]) for r in rows] == [100, 25, 50]
    assert {r["bright_threshold"] for r in rows} == {"0.8"}
    assert [r["bright_verdict"] for r in rows] == ["abnormal", "normal", "normal"]
    assert {r["blind_verdict"] + r["blind_percentile"] for r in rows} == {""}
    overlays = sorted(
        str(p.relative_to(run / "scored/overlays")) for p in run.rglob("*.jpg") if p.is_file()
    )
    assert overlays == ["bright/a.png.jpg", "bright/b.png.jpg", "bright/inside/a.png.jpg"]
    with Image.open(run / "scored/overlays/bright/b.png.jpg") as overlay:
        assert overlay.height == 30 and overlay.width > 40
        assert np.abs(np.asarray(overlay)[15, 20] - [20, 20, 22]).max() < 16  # dark: 0.2
    with Image.open(run / "scored/overlays/bright/inside/a.png.jpg") as overlay:
        assert np.asarray(overlay)[15, 20, 0] > 120  # 0.4, the middle of the healthy images' scale
    assert not list(new.rglob("*.jpg")) and (run / "scored/report_scored.html").is_file()
    assert evaluation.main([str(run), "--score", str(new / "a.png")]) == 0
    assert len(rows_of(run / "scored-2")) == 1 and len(rows_of(run / "scored")) == 3


def test_the_runs_own_threshold_goes_before_that_of_healthy_images(run, new, capsys):
    row = ROW | {"threshold": 0.3, "map_scale": [0.0, 1.0]}
    (run / "results.json").write_text(json.dumps({"bright": row}))
    assert evaluation.main([str(run), "--score", str(new), "--json"]) == 0
    items = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of_bright = [item["detectors"]["bright"] for item in items]
    assert [b["verdict"] for b in of_bright] == ["abnormal", "normal", "abnormal"]
    assert {b["threshold"] for b in of_bright} == {0.3} and of_bright[0]["percentile"] == 100
    assert items[0]["detectors"]["blind"]["percentile"] is None
    with Image.open(run / "scored/overlays/bright/b.png.jpg") as overlay:
        assert np.asarray(overlay)[15, 20, 2] > 60  # 0.2 is violet on the run's scale, 0 to 1


def test_a_score_is_written_with_the_digits_that_its_verdict_depends_on():
    score = float(np.float32(0.7654321))
    assert np.float32(score_files._cell(score)) == np.float32(0.7654321)
    assert [score_files._cell(value) for value in (None, "normal", 0.5)] == ["", "normal", "0.5"]


def test_deep_new_images_are_shown_in_the_window_of_the_run(run, tmp_path):
    config = {"image_size": 32, "seed": 0, "data": "", "values_shown": [0, 1000]}
    (run / "config.json").write_text(json.dumps(config))
    Image.fromarray(np.full((32, 32), 400, np.uint16)).save(tmp_path / "deep.png")
    assert evaluation.main([str(run), "--score", str(tmp_path / "deep.png")]) == 0
    assert float(rows_of(run / "scored")[0]["bright_score"]) == pytest.approx(0.4, abs=0.01)


NAMES = ["tab\t.png", "line\nbreak.png", "car\rriage.png", 'quote".png', "comma,.png", "ü.png"]


def test_no_name_breaks_a_line_or_a_row(run, tmp_path, capsys):
    for name in NAMES:
        grey(tmp_path / "odd" / name, 100)
    try:
        grey(tmp_path / "odd" / os.fsdecode(b"caf\xe9.png"), 100)
    except OSError:
        pass  # a file system of UTF-8 names only
    wanted = sorted(p.name for p in (tmp_path / "odd").iterdir())
    assert evaluation.main([str(run), "--score", str(tmp_path / "odd")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(wanted) and {line.count("\t") for line in lines} == {8}
    assert sorted(os.path.basename(r["path"]) for r in rows_of(run / "scored")) == wanted
    assert evaluation.main([str(run), "--score", str(tmp_path / "odd"), "--json"]) == 0
    items = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(os.path.basename(item["path"]) for item in items) == wanted


def cut(path):
    """A file whose beginning is an image's."""
    picture(path, size=(300, 300))
    path.write_bytes(path.read_bytes()[:-900])
    return path


def refused(capsys, *arguments):
    assert evaluation.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("eval.py: ") and "Traceback" not in err
    return err


def test_a_fault_leaves_nothing_behind(run, new, tmp_path, capsys, monkeypatch):
    before = sorted(run.rglob("*"))
    assert "cut.png" in refused(capsys, run, "--score", new, cut(tmp_path / "cut.png"))
    for value in (math.nan, math.inf):
        with monkeypatch.context() as patch:
            patch.setattr(Blind, "score", lambda self, x, v=value: (None, torch.full((len(x),), v)))
            assert "not finite in" in refused(capsys, run, "--score", new)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_files.Output, "draw", full)
    monkeypatch.setattr(evaluation, "load", lambda path, device: Bright())
    assert "No space left" in refused(capsys, run, "--score", new)
    assert sorted(run.rglob("*")) == before


def test_skip_bad_scores_the_others_and_names_what_it_left_out(run, new, tmp_path, capsys):
    (new / "text.png").write_text("no image")
    cut(new / "z.png")
    assert evaluation.main([str(run), "--score", str(new), "--skip-bad"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and err.count("left out: ") == 2
    named = (run / "scored/left_out.txt").read_text()
    assert "text.png" in named and "z.png" in named and len(rows_of(run / "scored")) == 3


def test_an_interruption_keeps_what_was_scored(run, new, capsys, monkeypatch):
    original, calls = Bright.score, []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(Bright, "score", interrupted)
    monkeypatch.setattr(evaluation, "load", lambda path, device: Bright())
    (run / "detector_f_beta.pt").unlink()
    (new / "0.png").write_text("no image")
    command = [str(run), "--score", str(new), "--batch-size", "2", "--skip-bad"]
    assert evaluation.main(command) == 130
    said = capsys.readouterr().err
    assert "has what was scored until then" in said and "start over" not in said
    assert "0.png" in (run / "scored/left_out.txt").read_text()
    assert len(rows_of(run / "scored")) == 2 and (run / "scored/report_scored.html").exists()
    assert not list(run.rglob("*.partial"))


def test_an_interruption_before_the_first_score_leaves_nothing(run, new, capsys, monkeypatch):
    def interrupted(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bright, "score", interrupted)
    assert evaluation.main([str(run), "--score", str(new)]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said and "was scored until then" not in said
    assert not (run / "scored").exists()


def test_overlays_of_paths_with_dots_stay_in_their_folder(run, new):
    files = [str(new / "inside/../../new/a.png"), str(new / "inside/a.png")]
    assert evaluation.main([str(run), "--score", *files]) == 0
    drawn = {str(p.relative_to(run / "scored")) for p in run.glob("scored/**/*.jpg")}
    assert drawn == {"overlays/bright/a.png.jpg", "overlays/bright/inside/a.png.jpg"}


def test_hidden_folders_are_not_scored_and_unreadable_ones_are_named(run, new, monkeypatch):
    for folder in (".thumbs", "__MACOSX"):
        grey(new / folder / "x.png", 9)
    grey(new / "scored/overlays/x.jpg", 9)  # of an earlier scoring
    (new / "scored/report_scored.html").touch()
    for name in "edc":
        grey(new / f"{name}.png", 9)
    grey(new / "Masks/a.png", 9)
    files = score_files.image_files([new, new / "inside/../e.png"])
    assert len(files) == 6 and files == sorted(files)
    assert score_files.image_files([new / "Masks"]) == [new / "Masks/a.png"]

    def walk(folder, failed):
        failed(PermissionError(13, "Permission denied", str(folder / "secret")))
        yield folder, [], ["a.png"]

    monkeypatch.setattr(score_files, "walk", walk)
    with pytest.raises(ValueError, match="secret: this folder cannot be read"):
        score_files.image_files([new])


def test_two_scorings_at_once_get_a_folder_each(run, new):
    threads = [
        threading.Thread(target=evaluation.main, args=([str(run), "--score", str(new)],))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(rows_of(run / name)) for name in ("scored", "scored-2")] == [3, 3]


def test_without_any_scale_the_first_new_images_set_it(run, new, monkeypatch):
    monkeypatch.setattr(Bright, "healthy", None)
    assert evaluation.main([str(run), "--score", str(new)]) == 0
    with Image.open(run / "scored/overlays/bright/a.png.jpg") as overlay:
        assert np.asarray(overlay)[15, 20, 1] > 200  # the brightest of three, not of itself alone


def test_files_are_read_ahead_and_not_all_at_once():
    begun = []
    pairs = cache.ahead(lambda x: begun.append(x) or -x, range(1000))
    assert next(pairs) == (0, 0) and len(begun) <= cache.AHEAD + 1
    assert [value for _, value in pairs] == [-x for x in range(1, 1000)]
