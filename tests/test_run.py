"""The main job as a user runs it: a run folder, resume, mistakes; and several processes."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import eval as evaluation
import pmsacl
from baselines import cutpaste, steps
from detectors import PaDiM
from encoder import Encoder, ResNet18, seeded
from support import dryrun, job, layouts, options, phantom, run
from support.features import draw_features
from support.run import read_rows
from support.versions import versions


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, True),
        ({"epochs": 499}, False),
        ({"encoder": "RUN"}, False),
        ({"method": "none"}, False),
    ],
)
def test_many_epochs_on_a_cpu_are_announced_before_the_training(
    settings, told, tmp_path, monkeypatch, capsys
):
    class Begun(Exception):
        pass

    def begin(*_):
        raise Begun

    images = SimpleNamespace(pixels=None, notes=())
    for name, value in (("prepare", images), ("plan", ""), ("near_duplicates_note", [])):
        monkeypatch.setattr(job, name, lambda *_, value=value: value)
    monkeypatch.setattr(job, "pretrained", begin)
    with pytest.raises(Begun):
        job.main_job(options.Config(**{"device": "cpu", "epochs": 500, **settings}), tmp_path)
    assert ("--preset quick" in capsys.readouterr().err) == told


def test_near_duplicates_are_told_and_stand_in_the_results(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "near_duplicates", lambda train, test: [(1, 2)])
    given = ["--data", str(phantoms), "--out", str(tmp_path / "r"), "--method", "none", *TINY]
    assert job.main(given) == 0
    dataset = layouts.discover(phantoms)
    note = "test images that are nearly the same as a training image (1), such as "
    note += f"{dataset.test[1].path} and {dataset.train[2]}: the results may be optimistic"
    assert f"warning: {note}" in " ".join(capsys.readouterr().err.split())
    assert note in json.loads((tmp_path / "r" / "results.json").read_text())["data_notes"]
    assert note in (tmp_path / "r" / "results.md").read_text()


def test_a_run_folder_holds_what_the_design_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json", "checkpoint.pt", "encoder.pt", "detector.pt", "results.json", "results.md",
        "scores.csv", "log.csv", "figures",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".partial")]
    config = json.loads((finished / "config.json").read_text())
    assert config["alpha"] == options.Config.alpha and config["torch"] == torch.__version__
    results = json.loads((finished / "results.json").read_text())
    for row in ("padim", "untrained"):
        assert 0 <= results[row]["image_auroc"] <= 1 and 0 <= results[row]["aupro"] <= 1
        assert {"sensitivity", "specificity", "accuracy", "threshold", "iou", "dice"} <= set(
            results[row]
        )
    assert results["init"] == "random"
    phases = {"images", "pretrain", "figures", "fake_lesions", "padim", "f_beta", "untrained"}
    phases |= {"evaluate"}
    assert results["seconds"].keys() == phases and min(results["seconds"].values()) > 0
    assert results["config"]["classes"] == 2
    log = read_rows(finished / "log.csv")
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert {"ctr", "pmsacl", "aug", "lr", "spread", "distance", "accuracy"} <= set(log[0])
    figures = {path.name for path in (finished / "figures").iterdir()}
    assert {"medmix.png", "localisation_padim.png", "localisation_untrained.png"} <= figures


def test_weights_load_without_pickle_and_into_a_plain_resnet18(finished):
    ResNet18().load_state_dict(torch.load(finished / "encoder.pt", weights_only=True))
    saved = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert saved["step_done"] == saved["total"] == 6 and saved["c"].shape == (2, 128)
    detector = evaluation.load(finished / "detector.pt")
    maps, scores = detector.score(np.zeros((1, 3, 32, 32), np.uint8))
    assert maps.shape == (1, 32, 32) and scores.shape == (1,)


def test_the_untrained_row_is_the_start_network_and_the_trained_one_is_not(finished):
    start = ResNet18(seeded(0, 2)).state_dict()
    end = torch.load(finished / "encoder.pt", weights_only=True)
    assert not torch.equal(start["conv1.weight"], end["conv1.weight"])
    assert torch.equal(start["fc.weight"], end["fc.weight"])  # PMSACL never touches it


def test_detectors_and_figures_have_the_trained_encoder(finished, tmp_path):
    """Or all results would be those of random weights."""
    encoder = torch.load(finished / "checkpoint.pt", weights_only=True)["encoder"]
    backbone = torch.load(finished / "encoder.pt", weights_only=True)
    padim = torch.load(finished / "detector.pt", weights_only=True)["backbone"]
    f_beta = torch.load(finished / "detector_f_beta.pt", weights_only=True)["encoder"]
    assert f_beta.keys() == encoder.keys() and padim.keys() == backbone.keys()
    for name, value in backbone.items():
        assert torch.equal(value, padim[name]) and torch.equal(value, encoder[f"backbone.{name}"])
    assert all(torch.equal(value, f_beta[name]) for name, value in encoder.items())

    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    saved = json.loads((finished / "config.json").read_text())
    config = options.Config(**{k: saved[k] for k in options.Config.__dataclass_fields__})
    images = job.prepare(config, tmp_path / "run")
    trained = evaluation.load(finished / "detector_f_beta.pt", config.device).encoder
    draw_features(trained, images.train, images.test, images.dataset, config, tmp_path)
    drawn = [folder / "figures" / "features.png" for folder in (tmp_path, finished)]
    assert drawn[0].read_bytes() == drawn[1].read_bytes()


def test_a_killed_and_resumed_run_ends_with_the_same_weights(phantoms, finished, tmp_path):
    folder = tmp_path / "killed"
    slow = "import pmsacl, sys, time, torch; from support import job;" \
        "torch.use_deterministic_algorithms(True, warn_only=True);" \
        "torch.backends.cudnn.allow_tf32 = False;" \
        f"pmsacl.WATCHED_VIEWS = {pmsacl.WATCHED_VIEWS};" \
        "pmsacl.train.__kwdefaults__['save_every'] = 0.0;" \
        "update = pmsacl.Pretraining.update;" \
        "pmsacl.Pretraining.update = lambda t, terms: (time.sleep(0.3), update(t, terms))[1];" \
        "sys.exit(job.main(sys.argv[1:]))"  # fmt: skip
    arguments = ["--data", str(phantoms), "--out", str(folder), *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(folder / "checkpoint.pt", weights_only=True)["step_done"]
    assert 0 < stopped_at < 6 and not (folder / "results.json").exists()

    assert job.main([*arguments, "--resume"]) == 0
    for name in ("encoder.pt", "checkpoint.pt"):
        one = torch.load(finished / name, weights_only=True)
        two = torch.load(folder / name, weights_only=True)
        one, two = one.get("encoder", one), two.get("encoder", two)
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert (folder / "scores.csv").read_text().replace(str(folder), "") == (
        finished / "scores.csv"
    ).read_text().replace(str(finished), "")
    logs = [[{k: v for k, v in row.items() if k != "images_per_second"}
             for row in read_rows(each / "log.csv")] for each in (folder, finished)]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_run_that_is_evaluated_again_keeps_what_it_knew(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = json.loads((folder / "results.json").read_text())
    assert evaluation.main([str(folder)]) == 0
    captured = capsys.readouterr()
    assert "left out" not in captured.err and "Fake lesions in healthy images" in captured.out
    after = json.loads((folder / "results.json").read_text())
    assert after["fake_lesions"] == before["fake_lesions"]
    assert {"padim", "untrained", "trivial", "f_beta"} <= set(after)
    assert "Without heat maps, so not in this table: f_beta, trivial." in captured.out
    assert after["padim"]["image_auroc"] == before["padim"]["image_auroc"]
    rows = [read_rows(place / "scores.csv") for place in (finished, folder)]
    assert [sorted(row.items()) for row in rows[0]] == [sorted(row.items()) for row in rows[1]]


def test_resume_takes_the_options_of_the_run_and_refuses_others(finished, capsys):
    assert job.main(["--resume", str(finished), "--alpha", "5"]) == 2
    assert "--alpha 2.0, not 5.0" in capsys.readouterr().err


def test_resume_finds_images_by_another_path_or_in_another_place(
    phantoms, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(phantoms, tmp_path / "set")
    assert job.main(["--data", "./set", "--out", "run", *TINY, "--method", "random"]) == 0
    assert job.main(["--data", str(tmp_path / "set"), "--resume", "run"]) == 0
    shutil.copytree(phantoms, tmp_path / "other")
    assert job.main(["--data", "other", "--resume", "run"]) == 2  # is another set
    (tmp_path / "set").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    folder = str(tmp_path / "run")
    assert job.main(["--resume", folder]) == 2
    assert f"{tmp_path / 'set'}: the images of {folder} are not there" in capsys.readouterr().err
    assert evaluation.main([folder]) == 2
    assert "are not there; --data names their place" in capsys.readouterr().err
    shutil.copytree(tmp_path / "moved", tmp_path / "another")
    (tmp_path / "another/train/good/0000.png").rename(tmp_path / "another/train/good/x.png")
    assert job.main(["--data", "../another", "--resume", folder]) == 2
    assert f"another: not the images that {folder} was begun with" in capsys.readouterr().err
    assert job.main(["--data", "../moved", "--resume", folder]) == 0
    assert job.main(["--resume", folder]) == 0
    (tmp_path / "moved/train/good/0000.png").rename(tmp_path / "moved/train/good/x.png")
    assert job.main(["--resume", folder]) == 2  # the same place, other images
    assert f"moved: not the images that {folder} was begun with" in capsys.readouterr().err


def test_resume_takes_no_folder_that_is_no_run(phantoms, tmp_path, monkeypatch, capsys):
    shutil.copytree(phantoms / "train/good", tmp_path / "pictures")
    before = sorted((tmp_path / "pictures").iterdir())
    for arguments in (["--resume"], ["--data", str(phantoms), "--resume"]):
        assert job.main([*arguments, str(tmp_path / "pictures")]) == 2
        assert "pictures: no run, it has no config.json" in capsys.readouterr().err
    assert job.main(["--resume", str(tmp_path / "nowhere")]) == 2
    monkeypatch.chdir(tmp_path)
    assert job.main(["--resume"]) == 2  # no phantoms are drawn for it
    assert "--resume runs/phantom: no run" in capsys.readouterr().err
    assert sorted((tmp_path / "pictures").iterdir()) == before
    assert not (tmp_path / "nowhere").exists()


def test_a_run_is_never_written_over(phantoms, finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert job.main(["--data", str(phantoms), "--out", str(finished), *TINY]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


def test_runs_without_a_name_get_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options.default_folder("/x/kvasir", newest=False) == Path("runs/kvasir")
    Path("runs/kvasir").mkdir(parents=True)
    assert options.default_folder("/x/kvasir", newest=False) == Path("runs/kvasir-2")
    Path("runs/kvasir-2").mkdir()
    assert options.default_folder("/x/kvasir", newest=True) == Path("runs/kvasir-2")
    assert options.default_folder("", newest=True) == Path("runs/phantom")


def test_presets_give_way_to_options(tmp_path):
    config, _ = options.resolve(
        {"preset": "quick", "epochs": 3, "out": str(tmp_path / "r"), "data": "x"}, None
    )
    assert (config.epochs, config.image_size, config.init) == (3, 64, "auto")
    config, _ = options.resolve({"out": str(tmp_path / "r")}, None)
    assert (config.preset, config.init) == ("quick", "random")  # the phantoms
    config, _ = options.resolve({"out": str(tmp_path / "r"), "data": "x"}, None)
    assert (config.preset, config.epochs, config.image_size) == ("paper", 2000, 256)


def test_igd_shares_the_pre_training_and_resumes(phantoms, tmp_path):
    folder = tmp_path / "both"
    options = "--detector both --local yes --image-size 64 --igd-epochs 1 --epochs 1".split()
    options += "--igd-local-epochs 1 --igd-width 4".split()
    arguments = ["--data", str(phantoms), "--out", str(folder), *TINY, *options]
    assert job.main(arguments) == 0
    results = json.loads((folder / "results.json").read_text())
    assert {"padim", "igd", "untrained"} <= set(results)
    for name in ("checkpoint_local.pt", "encoder_local.pt", "log_local.csv", "log_igd_global.csv",
                 "log_igd_local.csv", "figures/reconstruction_igd.png"):  # fmt: skip
        assert (folder / name).exists(), name
    local, whole = (read_rows(folder / name)[0] for name in ("log_local.csv", "log.csv"))
    assert "pos" in local and "pos" not in whole
    first = torch.load(folder / "detector_igd.pt", weights_only=True)["models"]
    (folder / "detector_igd.pt").unlink()
    assert job.main([*arguments, "--resume"]) == 0  # from checkpoint_igd.pt, already trained
    again = torch.load(folder / "detector_igd.pt", weights_only=True)["models"]
    for part, weights in first.items():
        assert all(torch.equal(v, again[part][k]) for k, v in weights.items())


def test_random_trains_nothing_and_its_detector_is_the_untrained_one(phantoms, tmp_path):
    folder = tmp_path / "run"
    arguments = "--method random --epochs 3 --image-size 32 --batch-size 4 --seed 3".split()
    arguments += ["--paper-protocol", "--data", str(phantoms), "--out", str(folder)]
    assert job.main(arguments) == 0
    saved = torch.load(folder / "encoder.pt", weights_only=True)
    assert torch.equal(saved["conv1.weight"], ResNet18(seeded(3, 2)).conv1.weight)
    channels = evaluation.load(folder / "detector.pt").channels
    assert torch.equal(channels, PaDiM(ResNet18(), seed=3).channels)
    results = json.loads((folder / "results.json").read_text())
    assert {"seed": 3, "paper_protocol": True}.items() <= results["padim"]["data"].items()
    assert results["padim"]["image_auroc"] == results["untrained"]["image_auroc"]


def test_a_run_shows_all_its_deep_images_in_one_range(tmp_path, monkeypatch):
    """One that holds training and test images, whose seed draws them; config.json keeps it."""
    for folder, value in (("train/good", 200), ("test/good", 300), ("test/polyp", 4000)):
        for k in range(2):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            deep = np.full((40, 40), value + k, np.uint16)
            Image.fromarray(deep).save(tmp_path / f"set/{folder}/{k}.png")
    seeds, discover = [], layouts.discover

    def noted(root, *, seed=None):
        seeds.append(seed)
        return discover(root, seed=seed)

    monkeypatch.setattr(layouts, "discover", noted)
    config = options.make_config(
        {"data": str(tmp_path / "set"), "seed": 3, "init": "random", "image_size": 32}
    )
    (tmp_path / "run").mkdir()
    images = job.prepare(config, tmp_path / "run")
    assert seeds == [3]
    shown = [x[0, 0, 0] for x in (*images.train, *images.test)]
    assert shown == [round(255 * v / 4095) for v in (200, 201, 300, 301, 4000, 4001)]
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["values_shown"] == [0, 4095]


def test_each_model_of_igd_begins_with_the_encoder_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "train", lambda *_: None)
    encoders = [Encoder(generator=seeded(k)) for k in range(2)]
    given = {"data": "x", "init": "random", "image_size": 64, "local": "yes", "detector": "igd"}
    config = options.make_config(given | {"igd_width": 2, "device": "cpu"})
    images = SimpleNamespace(pixels=np.zeros((2, 3, 64, 64), np.uint8))
    igd = job.fit_igd(encoders[0], encoders[1], images, config, tmp_path)
    assert list(igd.models) == ["global", "local"]
    for model, encoder in zip(igd.models.values(), encoders, strict=True):
        assert torch.equal(model.backbone.conv1.weight, encoder.backbone.conv1.weight)
    assert list(job.fit_igd(encoders[0], None, images, config, tmp_path).models) == ["global"]


def test_the_plan_and_the_dry_run_count_each_class(tmp_path, monkeypatch, capsys):
    phantom.draw(tmp_path / "set", train=5, good=3, abnormal=4, size=32)
    config = options.make_config({"data": str(tmp_path / "set"), "init": "random", "device": "cpu"})
    monkeypatch.setattr(dryrun, "_trainings", lambda *_: ())
    dryrun.dry_run(config, tmp_path / "run")
    counts = "5 healthy training images, {}3 normal and 4 abnormal test images, 4 masks"
    assert counts.format("") in capsys.readouterr().out
    images = SimpleNamespace(dataset=layouts.discover(tmp_path / "set"), healthy=())
    held = "0 healthy ones held out (--healthy-share), "
    assert counts.format(held) in job.plan(config, images, tmp_path / "run")


def test_the_dry_run_has_the_steps_of_the_compared_detectors_without_their_passes():
    settings = {"data": "x", "encoder": "y", "detector": "cutpaste", "image_size": 64}
    config = options.make_config(settings | {"init": "random", "device": "cpu"})
    with mock.patch.object(steps, "unit", wraps=steps.unit) as read:
        for training in dryrun._trainings(config, 1600):
            assert training.total >= cutpaste.STEPS > training.total - training.steps
    assert read.call_count <= 2  # batches of the Gaussians


def test_fake_lesions_are_looked_for_with_the_encoder_and_with_the_untrained_network(monkeypatch):
    seen = []

    def found(backbone, images, *, seed):
        seen.append((backbone.conv1.weight, images, seed))
        return {"image_auroc": 0.9 - 0.1 * len(seen), "aupro": 0.5}

    monkeypatch.setattr(job, "fake_lesions", found)
    config = options.make_config({"data": "x", "init": "random", "seed": 3, "device": "cpu"})
    encoder, images = Encoder(generator=seeded(9)), SimpleNamespace(pixels="pixels")
    fakes = job.watch_fake_lesions(encoder, images, config)
    weights, pixels, seeds = zip(*seen, strict=True)
    assert pixels == ("pixels", "pixels") and seeds == (3, 3)
    assert torch.equal(weights[0], encoder.backbone.conv1.weight)
    assert torch.equal(weights[1], ResNet18(seeded(3, 2)).conv1.weight)
    assert fakes["image_auroc"] == 0.8 and fakes["untrained"]["image_auroc"] == 0.7


# --- mistakes ----------------------------------------------------------------------------------


def test_all_unreadable_files_are_named_and_can_be_skipped(tmp_path, phantoms, capsys):
    root = Path(shutil.copytree(phantoms, tmp_path / "data"))
    (root / "train/good/text.png").write_text("not an image")
    whole = root / "train/good/cut.jpg"
    Image.new("RGB", (64, 64), "red").save(whole)
    whole.write_bytes(whole.read_bytes()[:300])
    command = ["--data", str(root), "--out", str(tmp_path / "run"), *TINY, "--method", "random"]
    assert job.main(command) == 2 and not (tmp_path / "run").exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(name in line for name in ("text.png", "cut.jpg", "--skip-bad"))
    assert job.main([*command, "--skip-bad"]) == 0
    assert "text.png" in (tmp_path / "run/results.md").read_text()
    other = Path(shutil.copytree(phantoms, tmp_path / "other"))
    (other / "test/good/broken.png").write_text("not an image")
    (root / "test/good/torn.png").write_text("not an image")
    assert evaluation.main([str(tmp_path / "run"), "--skip-bad"]) == 0
    text = (tmp_path / "run/results.md").read_text()
    assert "torn.png" in text and text.count("text.png") == 1
    arguments = [str(tmp_path / "run"), "--data", str(other), "--skip-bad"]
    assert evaluation.main(arguments) == 0
    assert "broken.png" in next(tmp_path.glob("run/eval-*/results.md")).read_text()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.pick_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(run, "ranks", lambda: (0, 2))
    assert run.pick_device("cuda:1") == "cuda" and run.pick_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="3 processes here, but 2 GPU.s.: --nproc-per-node 2, or"):
        run.pick_device("auto")
    assert run.pick_device("cpu") == "cpu"


def test_the_command_of_a_shell_ends_with_one_line_and_its_exit_status(tmp_path):
    arguments = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "pmsacl.py"), *arguments], capture_output=True, text=True
    )
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("pmsacl.py: ") and "nowhere" in line


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_program_reuses_the_memory_that_it_freed():
    code = "import resource; from support.progress import as_program\n" \
        "def main():\n" \
        "    for _ in range(4):\n" \
        "        bytes(1) * 2**26\n" \
        "        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n" \
        "    return 0\n" \
        "main(), as_program(main)"  # fmt: skip
    lines = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).splitlines()
    faults = np.diff([int(line) for line in lines])  # pages that were got anew
    pages = 2**26 // resource.getpagesize()
    assert (faults[:3] > 0.9 * pages).all() and (faults[4:] < 0.1 * pages).all()


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(phantoms, tmp_path, capsys):
    folder = tmp_path / "run"
    more = "--lr 1000 --epochs 9 --features raw".split()
    assert job.main(["--data", str(phantoms), "--out", str(folder), *TINY, *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is not finite" in error and "lower --lr (" in error
    assert not (folder / "results.json").exists()


def test_a_run_on_the_cpu_names_the_cpu_also_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    assert versions("cuda")["processor"] == "a GPU" != versions("cpu")["processor"]
