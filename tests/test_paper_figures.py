"""Fig. 1 to 5 of the paper, of a run and without one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import generator
from PIL import Image

import experiments
import pmsacl
from support import figures, job, paper_figures, phantom
from support.options import make_config
from support.run import read_rows

OPTIONS = (
    "--image-size 32 --batch-size 4 --epochs 1 --classes 3 --init random --detector both "
    "--igd-epochs 1 --igd-width 1 --igd-batch-size 4"
).split()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, Path]:
    """The folder in which experiments.py drew all five, and the run that it made for them."""
    root = tmp_path_factory.mktemp("figures")
    phantom.draw(root / "colon", train=8, good=6, abnormal=6, size=32)
    command = ["--figure", "1", "2", "3", "4", "5", "--data", str(root / "colon")]
    assert experiments.main([*command, *OPTIONS, "--out", str(root / "out")]) == 0
    [run] = (root / "out").glob("colon-pmsacl-*")
    return root / "out", run


def shown(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(-1).sum())


def test_each_picture_has_the_colours_of_its_legend(drawn):
    out, run = drawn
    names = [f"figure{k}-{run.name}.png" for k in (1, 3, 4, 5)] + ["figure2-colon-medmix.png"]
    assert sorted(file.name for file in out.glob("*.png")) == sorted(names)
    swatch = paper_figures.TEXT**2  # pixels, once in the legend
    for k in (3, 4):
        pixels = shown(out / f"figure{k}-{run.name}.png")
        assert all(count(pixels, colour) > swatch for colour in (figures.CYAN, figures.YELLOW))
        assert count(pixels, figures.GREEN) + count(pixels, figures.RED) > 3 * swatch
        for end in figures.heat_colours(np.array([0.0, 1.0])).tolist():  # the colour bar's
            assert count(pixels, tuple(end)) >= paper_figures.TEXT
    assert count(shown(out / "figure2-colon-medmix.png"), figures.YELLOW) > 2 * swatch
    first = shown(out / f"figure1-{run.name}.png").reshape(-1, 3)
    for colour in ((11, 79, 158), (230, 159, 0), (0, 158, 115)):  # frames of three classes
        assert (first == colour).all(-1).sum() > 1000


def test_frames_of_figure_5_are_the_verdicts_of_the_run(drawn):
    out, run = drawn
    row = json.loads((run / "results.json").read_text())["igd"]
    lines = read_rows(run / "scores.csv")
    right = [ln["igd_predicted"] == ln["label"] for ln in lines if ln["split"] == "test"]
    pixels = shown(out / f"figure5-{run.name}.png")  # six images, all that are measured
    swatch = (paper_figures.TEXT + 1) ** 2
    green, red = (count(pixels, c) - swatch for c in (figures.GREEN, figures.RED))
    assert len(right) == 6 and row["accuracy"] == pytest.approx(np.mean(right))
    assert abs(green / (green + red) - np.mean(right)) < 0.05  # captions differ in length


def test_a_finished_run_is_drawn_from_its_folder(drawn, tmp_path, capsys):
    out, run = drawn
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    assert not list(run.glob("checkpoint*.pt"))  # they go when a run of experiments.py is finished
    command = ["--run", str(run), "--out", str(tmp_path)]
    assert experiments.main(["--figure", "4", "1", *command]) == 0
    assert str(tmp_path / f"figure4-{run.name}.png") in capsys.readouterr().out
    for k in (1, 4):
        name = f"figure{k}-{run.name}.png"
        assert (shown(tmp_path / name) == shown(out / name)).all()
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}


def test_figure_1_shows_images_that_the_run_has_held_back(tmp_path):
    phantom.draw(tmp_path / "colon", train=24, good=2, abnormal=2, size=32)
    seen, begin = [], pmsacl.Pretraining.begin

    def noted(training):
        seen.append((training.pixels[np.sort(training.watched)], training.total))
        begin(training)

    options = ["--image-size", "32", "--batch-size", "4", "--epochs", "1", "--init", "random"]
    command = ["--data", str(tmp_path / "colon"), "--out", str(tmp_path / "run"), *options]
    with mock.patch.object(pmsacl.Pretraining, "begin", noted):
        assert job.main(command) == 0  # which holds out ten of the images for percentiles
    training = paper_figures.trained(paper_figures.Run.of(tmp_path / "run"))
    [(watched, total)] = seen
    assert len(training.pixels) == 14 and training.total == total
    assert (training.pixels[np.sort(training.watched)] == watched).all()


def test_pictures_are_of_a_run_that_holds_no_image_out_as_tables_are(drawn):
    config = json.loads((drawn[1] / "config.json").read_text())
    assert config["healthy_share"] == 0
    args = argparse.Namespace(figure=[3], run=None, out=drawn[0], keep=False)
    with mock.patch.object(experiments, "finished", side_effect=ValueError) as wanted:
        with pytest.raises(ValueError):
            next(experiments.pictures(args, {"image_size": 64}))
    assert (wanted.call_args[0][0].image_size, wanted.call_args[0][0].healthy_share) == (64, 0)


def test_what_is_drawn_of_an_image_is_its_own(drawn):
    run = paper_figures.Run.of(drawn[1])
    assert dataclasses.replace(run, window=(1.0, 9.0)).how()["window"] == (1.0, 9.0)
    dataset, images, masks, _ = run.test_images()
    d = paper_figures.detections(run, "padim")
    at = [dataset.test.index(sample) for sample in d.dataset.test]
    assert len(at) == 6 and (d.images == images[at]).all() and (d.masks == masks[at]).all()
    wraps = figures.localisation_figure
    with mock.patch.object(figures, "localisation_figure", wraps=wraps) as localisation:
        paper_figures.draw(3, drawn[1])
    shown, _, outlines, samples = localisation.call_args.args[:4]
    at = [dataset.test.index(sample) for sample in samples]
    assert (shown == images[at]).all() and (outlines == masks[at]).all()
    with (
        mock.patch.object(figures, "image_grid", wraps=figures.image_grid) as grid,
        mock.patch.object(paper_figures, "framed", wraps=paper_figures.framed) as framed,
    ):
        paper_figures.draw(5, drawn[1])
    verdicts = [call.args[3].split(" ", 1)[1] for call in framed.call_args_list]
    in_first = set(verdicts[: len(grid.call_args.args[0][0])])
    assert in_first <= set(figures.VERDICTS[0]) and grid.call_args.kwargs["rows"][0] == "normal"


def damaged(run: Path, root: Path, change: str) -> Path:
    """A copy of the run that lacks something."""
    folder = Path(shutil.copytree(run, root / "copy", ignore=shutil.ignore_patterns("cache")))
    config = json.loads((folder / "config.json").read_text())
    if change == "no encoder":
        (folder / "detector_f_beta.pt").unlink()
    elif change == "another run's encoder":
        (folder / "config.json").write_text(json.dumps(config | {"encoder": "runs/other"}))
    elif change == "no IGD":
        (folder / "detector_igd.pt").unlink()
    elif change == "no results":
        (folder / "results.json").unlink()
    elif change == "other images":
        text = (folder / "scores.csv").read_text().splitlines(keepends=True)
        (folder / "scores.csv").write_text("".join(text[:-1]))
    return folder


@pytest.mark.parametrize(
    ("figure", "change", "named"),
    [
        ("1", "no encoder", "no detector_f_beta.pt or checkpoint.pt"),
        ("1", "another run's encoder", "name runs/other"),
        ("4", "no IGD", "lacks igd; pmsacl.py --resume finishes it"),
        ("5", "no results", "no detections of igd .* nothing was measured in it"),
        ("3", "other images", "scores.csv is of other images"),
    ],
)
def test_what_a_run_lacks_is_said_in_one_line(figure, change, named, drawn, tmp_path):
    folder = damaged(drawn[1], tmp_path, change)
    with pytest.raises(ValueError, match=named) as error:
        paper_figures.draw(int(figure), folder)
    assert str(folder) in str(error.value)


def test_figure_2_needs_healthy_images_alone(tmp_path):
    phantom.draw(tmp_path / "set", train=4, good=2, abnormal=2, size=32)
    healthy = tmp_path / "set/train/good"
    (healthy / "0000.png").write_bytes(b"x")  # the first of those that are drawn
    command = ["--figure", "2", "--data", str(healthy), "--image-size", "32"]
    assert experiments.main([*command, "--out", str(tmp_path / "no")]) == 2
    assert experiments.main([*command, "--skip-bad", "--out", str(tmp_path / "out")]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["figure2-good-medmix.png"]
    assert experiments.main(["--figure", "5", *command[2:], "--out", str(tmp_path / "no")]) == 2


@pytest.mark.parametrize("strong", ["medmix", "rotation"])
def test_every_class_is_a_column_of_figure_2(strong):
    config = make_config({"data": "x", "image_size": 32, "strong": strong, "init": "random"})
    x = (torch.rand(5, 3, 32, 32, generator=generator()) * 255).byte().numpy()
    with mock.patch.object(figures, "outlined", wraps=figures.outlined) as outlined:
        picture = paper_figures.views_figure(x, config, "a set")
    calls = [call.args[:2] for call in outlined.call_args_list]  # image by image, class by class
    for k, (view, mask) in enumerate(calls):
        assert not ((view != calls[k - k % 4][0]).any(0) & (mask == 0)).any()  # but there
    side, rows = paper_figures.SIDE + 6, 2 if strong == "medmix" else 1
    assert picture.width == 4 * side + 6
    assert picture.height - rows * paper_figures.EXAMPLES * side < 8 * paper_figures.TEXT
    assert len(set(paper_figures.class_names(config))) == 4


def test_the_principal_axes_are_those_of_the_most_variance():
    flat = torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64)).Q[:2]
    axes, share = paper_figures.principal_axes(flat @ turn + 3)
    assert share == pytest.approx(1, abs=1e-6)
    assert torch.allclose(torch.pdist(axes), torch.pdist(flat))
    assert axes[:, 0].var() >= axes[:, 1].var()
    noise = torch.randn(500, 20, generator=generator(2))
    assert paper_figures.principal_axes(noise)[1] == pytest.approx(0.1, abs=0.05)
