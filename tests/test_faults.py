"""Faults: whatever is wrong, one line that names it; nothing lost, nothing wrong in silence.

Each table below is a list of faults, and each row is one of them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, lesion, mvtec, picture
from PIL import Image
from test_training import Toy
from torch.utils._pytree import tree_leaves

import eval as evaluation
import experiments
import pmsacl
from detectors import PaDiM
from encoder import ResNet18
from support import (
    cache,
    checks,
    claim,
    data,
    datasets,
    depth,
    folders,
    job,
    layouts,
    options,
    readers,
    run,
    training,
)
from support import progress as shown
from support.versions import versions

S = 32
LONGEST = run.LONGEST + 1


def line_of(error: BaseException) -> str:
    """What a program says of it: one line of bounded length."""
    line = run.one_line("x", error)
    assert line.endswith("\n") and line.count("\n") == 1 and len(line) <= LONGEST
    assert "Traceback" not in line
    return line


# --- options -----------------------------------------------------------------------------------

FIELDS = {field.name: field for field in dataclasses.fields(options.Config)}
OF_FLOATS = ["nan", "inf", "-inf", "1e300", "-1e-9", "x", "", "0,5"]
OF_INTEGERS = ["-1", "99999999999999999999", "1e3", "1.5", "x", "", "nan"]
WORDS = ["method", "features", "centres", "aug_head", "strong", "weak", "detector", "local"]
BAD_OPTIONS = [
    *((name, v) for name, f in FIELDS.items() if isinstance(f.default, float) for v in OF_FLOATS),
    *((name, v) for name, f in FIELDS.items() if type(f.default) is int for v in OF_INTEGERS),
    *((name, v) for name in WORDS for v in ("nonsense", "")),
    *(("positive_scale", v) for v in ("nan", "inf", "-1e300", "Kappa", "")),
    *(
        ("lesion_area", v)
        for v in ("", "0.1", "0.2,0.1", "nan,1", "0,0.1", "1e-300,1", "a,b", "1,2")
    ),
    *(("window", v) for v in ("1", "1,1", "2,1", "nan,1", "0,inf", "a,b", "1,2,3", "-1e308,1e308")),
    *(("terms", v) for v in ("", "ctr,", "pmsacl ctr", "CTR", "ctr,con")),
    *(("tau", v) for v in ("1e-30", "0", "1e9")),
    *(("image_size", v) for v in ("131072", "0", "33", "16")),
    *(("device", v) for v in ("gpu", "", "cuda:x", "tpu")),
    *(("preset", v) for v in ("fast", "Quick")),
    ("data", ""),
    ("out", ""),
    ("igd_warmup", "1.5"),
    ("crop_area", "2"),
    ("momentum", "1"),
    ("batch_size", "1"),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_an_impossible_value_is_refused_with_its_options_name(name, value, tmp_path, capsys):
    option = f"--{name.replace('_', '-')}"
    out = [] if name == "out" else ["--out", str(tmp_path / "run")]
    status = job.main([f"{option}={value}", *out]) if is_parsed(option, value) else 2
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and len(error) <= LONGEST, error
    assert option in error and not (tmp_path / "run").exists()


def is_parsed(option: str, value: str) -> bool:
    """Whether argparse takes it; what it refuses, it refuses with exit status 2."""
    try:
        options.parse([f"{option}={value}"])
    except SystemExit as ended:
        assert ended.code == 2
        return False
    return True


def test_places_that_exclude_one_another(tmp_path):
    root = mvtec(tmp_path / "data")
    for out in (root, root / "runs/x", root / "train"):
        with pytest.raises(ValueError, match="--out"):
            options.resolve({"data": str(root), "out": str(out)}, None)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="--resume .* leave out --out"):
        options.resolve({"out": str(tmp_path / "other")}, str(tmp_path / "run"))


def test_a_complaint_is_cut_and_stays_one_line():
    line = run.one_line("pmsacl.py", "a\nb " * 9000)
    assert line.count("\n") == 1 and len(line) <= LONGEST and line.endswith("(cut)\n")


# --- files of a run ------------------------------------------------------------------------------

BROKEN_JSON = [
    b"", b"{", b"[]", b"1", b"null", b'"text"', b"{}", b"\xff\xfe", b"\x00" * 40, b"[" * 99999,
    b'{"image_size": 64', b'{"seed": 0}', b"NaN", b'{"image_size": 64, "seed": 0}',
]  # fmt: skip
OTHER_TYPES = {
    str: [None, 3, ["x"]], int: [None, "64", 64.5, True], float: [None, "0.1", [0.1]],
    bool: [None, "yes", 1],
}  # fmt: skip
BAD_CONFIGS = [
    *((name, value) for name, f in FIELDS.items() for value in OTHER_TYPES[type(f.default)][:2]),
    *(("image_size", v) for v in (64.5, True, 0, 100, 10**9, -64, [64], {})),
    *(("tau", v) for v in (0, -1, math.nan, math.inf, [0.1])),
    *(("seed", v) for v in (-1, 2**64, 1.5)),
    *(("values_shown", v) for v in ([], [1], "0,1", [0, "1"], [0, math.nan], [1, 1], {"low": 0})),
]


def good_config() -> dict:
    return dataclasses.asdict(options.make_config({"data": "x"})) | versions("cpu")


@pytest.mark.parametrize(("name", "value"), BAD_CONFIGS)
def test_a_config_with_an_impossible_value_is_named(name, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(good_config()))
    assert readers.read_config(tmp_path)["image_size"] == 256
    (tmp_path / "config.json").write_text(json.dumps(good_config() | {name: value}))
    with pytest.raises(ValueError, match="config.json") as caught:
        readers.read_config(tmp_path)
    assert name.replace("_", "-") in line_of(caught.value).replace("_", "-")


@pytest.mark.parametrize("content", BROKEN_JSON, ids=range(len(BROKEN_JSON)))
def test_a_broken_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json") as caught:
        options.resolve({}, str(tmp_path))
    line_of(caught.value)


ROW = {
    **dict.fromkeys(readers.ROW_NUMBERS, 0.5), "notes": [], "map_scale": [0, 1],
    "image_auroc_interval": [0.4, 0.6],
    "images": dict.fromkeys(readers.ROW_COUNTS, 3),
}  # fmt: skip
BAD_ROWS = [
    *((name, v) for name in readers.ROW_NUMBERS[1:] for v in (None, "0.5", math.nan, math.inf)),
    *(("images", v) for v in (None, {}, 3, [1])),
    *(("map_scale", v) for v in (None, [1], [0, math.nan], "0 1")),
    ("image_auroc_interval", [0.4]),
    ("notes", None),
    ("notes", "none"),
    ("image_auroc", "high"),
]


@pytest.mark.parametrize(("name", "value"), BAD_ROWS)
def test_a_broken_row_of_results_is_named(name, value, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"padim": ROW}))
    assert readers.read_results(tmp_path)["padim"] == ROW
    (tmp_path / "results.json").write_text(json.dumps({"padim": ROW | {name: value}}))
    with pytest.raises(ValueError, match=f"results.json: padim has no usable {name}") as caught:
        readers.read_results(tmp_path)
    line_of(caught.value)


def test_a_row_of_an_older_version_is_left_out(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"a": ROW, "b": {"image_auroc": 0.5}}))
    assert readers.read_results(tmp_path) == {"a": ROW}
    assert "left out: the row b" in capsys.readouterr().err


class Wide(Toy):
    """A toy with a tensor whose bytes can be flipped."""

    def __init__(self):
        super().__init__()
        self.wide = torch.arange(300.0)

    def state_dict(self):
        return super().state_dict() | {"wide": self.wide}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.wide = state["wide"]


@pytest.mark.parametrize("part", range(40))
def test_a_flipped_bit_in_a_checkpoint_is_noticed(part, tmp_path):
    toy, path = Wide(), tmp_path / "c.pt"
    training.save(toy, path, {}, [])
    content = bytearray(path.read_bytes())
    at = part * len(content) // 40 + 7
    content[at] ^= 1 << part % 8
    path.write_bytes(content)
    other = Wide()
    other.wide = torch.zeros(300)
    try:
        training.load(other, path)
    except ValueError as error:
        assert "c.pt" in line_of(error)
    else:  # a byte that fills up the file or is of no weight
        assert torch.equal(other.wide, toy.wide) and other.step_done == 0


@pytest.fixture(scope="module")
def pretraining() -> pmsacl.Pretraining:
    config = options.make_config({
        "data": "x", "preset": "quick", "image_size": 32, "batch_size": 4, "classes": 2,
        "epochs": 2, "init": "random",
    })  # fmt: skip
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 32, 32), np.uint8)
    begun = pmsacl.Pretraining(images, config)
    begun.begin()
    begun.update(begun.losses())
    return begun


BAD_STATES = [
    ("step_done", -1), ("step_done", 10**9), ("step_done", "1"), ("step_done", None),
    ("total", 7), ("c", None), ("encoder", {}), ("encoder", None),
    ("encoder", [1]), ("optimiser", {}), ("optimiser", {"state": {}, "param_groups": []}),
    ("sums", None), ("log", None), ("log", [1]), ("sums", {"ctr": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_STATES)
def test_a_checkpoint_that_does_not_fit_is_named(name, value, pretraining, tmp_path, monkeypatch):
    state = pretraining.state_dict() | {"format": training.FORMAT, "sums": {}, "log": []}
    for broken in (state | {name: value}, {k: v for k, v in state.items() if k != name}):
        monkeypatch.setattr(training, "read_saved", lambda *_, broken=broken: broken)
        begun = copy.copy(pretraining)
        with pytest.raises(ValueError, match="c.pt: ") as caught:
            training.load(begun, tmp_path / "c.pt")
        line_of(caught.value)


def test_a_checkpoint_with_a_nan_is_named(pretraining, tmp_path, monkeypatch):
    state = copy.deepcopy(pretraining.state_dict())
    state |= {"format": training.FORMAT, "sums": {}, "log": []}
    state["encoder"]["head.0.bias"][3] = math.nan
    monkeypatch.setattr(training, "read_saved", lambda *_: state)
    with pytest.raises(ValueError, match="c.pt: .*not finite"):
        training.load(copy.copy(pretraining), tmp_path / "c.pt")


@pytest.fixture(scope="module")
def detector_state(tmp_path_factory) -> dict:
    images = np.random.default_rng(0).integers(0, 255, (6, 3, 32, 32), np.uint8)
    path = tmp_path_factory.mktemp("detector") / "detector.pt"
    PaDiM(ResNet18(), channels=6).fit(images).save(path)
    return torch.load(path, weights_only=True)


BAD_DETECTORS = [
    *(("size", v) for v in (None, "32", 0, -32, 64, 10**9, 32.0)),
    *(("kind", v) for v in (None, "PaDiM", 3, ["padim"], {})),
    *(("channels", v) for v in (None, torch.zeros(0), torch.tensor([1, 2]), "x")),
    *(("mean", v) for v in (None, torch.zeros(3), torch.full((64, 6), math.nan))),
    *(("whitening", v) for v in (None, torch.zeros(64, 5), torch.full((64, 21), math.inf))),
    *(("backbone", v) for v in (None, {}, [1])),
    *(("eps", v) for v in (None, -1.0, math.nan)),
    *(("sigma", v) for v in ("wide", math.inf)),
]


@pytest.mark.parametrize(("name", "value"), BAD_DETECTORS)
def test_a_detector_that_does_not_fit_is_named(name, value, detector_state, tmp_path, monkeypatch):
    without = {key: part for key, part in detector_state.items() if key != name}
    for broken in (without, without | {name: value}):  # as read: writing 45 MB takes a second
        monkeypatch.setattr(evaluation, "read_saved", lambda *_, broken=broken: broken)
        with pytest.raises(ValueError, match="d.pt: ") as caught:
            evaluation.load(tmp_path / "d.pt")
        line_of(caught.value)


def test_a_nan_in_a_part_that_does_not_score_is_noticed(detector_state, tmp_path):
    broken = copy.deepcopy(detector_state)
    broken["backbone"]["fc.bias"][0] = math.nan
    torch.save(broken, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="d.pt: .*not finite"):
        evaluation.load(tmp_path / "d.pt")


NO_TORCH_FILES = [b"", b"PK\x03\x04", b"hello", b"\x80\x02." * 9, b"\x00" * 5000, b"PK\x05\x06" * 9]
torch.save(torch.zeros(9999), written := io.BytesIO())
NO_TORCH_FILES.append(written.getvalue()[:5000])  # cut there, torch's reader has an OSError


@pytest.mark.parametrize("content", NO_TORCH_FILES, ids=range(len(NO_TORCH_FILES)))
def test_what_is_no_torch_file_is_named(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt: no detector, or a damaged one"):
        run.read_saved(tmp_path / "x.pt", "detector", "cpu")


def test_pipes_folders_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            run.read_saved(path, "checkpoint", "cpu")
        with pytest.raises(ValueError, match="not a regular file"):
            data.read_image(path, S)


@pytest.mark.parametrize("part", range(12))
def test_a_flipped_bit_in_the_cache_is_noticed_and_decoded_again(part, tmp_path, capsys):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    want = np.array(data.decode(paths, S, tmp_path / "cache")[0])
    (rows,) = (tmp_path / "cache").glob("*.u8")
    content = bytearray(rows.read_bytes())
    content[part * len(content) // 12] ^= 1 << part % 8
    rows.write_bytes(content)
    assert (data.decode(paths, S, tmp_path / "cache")[0] == want).all()
    assert "its content has changed; decoding again" in capsys.readouterr().err
    rows.write_bytes(b"short")
    assert (data.decode(paths, S, tmp_path / "cache")[0] == want).all()


BROKEN_MARKERS = [
    None, b"", b"{", b"[]", b"{}", b'{"unreadable": []}', b'{"unreadable": {"x": "y"}, "crc32": 0}',
    b'{"unreadable": {"99": "y"}, "crc32": 0}', b'{"unreadable": {}}', b"[" * 99999,
]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN_MARKERS, ids=range(len(BROKEN_MARKERS)))
def test_a_broken_index_of_the_cache_is_made_again(content, tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    want = np.array(data.decode(paths, S, tmp_path / "cache")[0])
    (marker,) = (tmp_path / "cache").glob("*.json")
    marker.unlink()  # as after a kill between the two files
    if content is not None:
        marker.write_bytes(content)
    assert (data.decode(paths, S, tmp_path / "cache")[0] == want).all()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "c.pt"
    run.save_atomically({"w": torch.zeros(10)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError):
            run.save_atomically({"w": torch.zeros(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    config = options.make_config({"data": "x", "detector": "both"})
    needed = checks.disk_needed(config, 1000, 100, 100)
    assert needed > 3 * 256**2 * 1100
    usage = shutil.disk_usage(tmp_path)._replace(free=int(needed) - 1)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="--out .*GB are free"):
        checks.check_disk(config, tmp_path / "run/x", (1000, 100, 100))
    checks.check_disk(config, tmp_path / "run/x", (999, 100, 100))
    assert not (tmp_path / "run").exists()


# --- images and folders ------------------------------------------------------------------------


def png(**changes) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        content, **{"format": "PNG"} | changes
    )
    return content.getvalue()


BAD_IMAGES = [
    ("empty.png", b""), ("text.png", b"hello"), ("html.jpg", b"<html></html>"),
    ("zeros.tif", b"\x00" * 4000), ("scan.dcm", b"\x00" * 128 + b"DICM" + b"\x00" * 400),
    ("brain.nii", b"\x5c\x01" + b"\x00" * 400), ("brain.nii.gz", b"\x1f\x8b" + b"\x00" * 40),
    ("a.npy", b"\x93NUMPY" + b"\x00" * 99), ("a.mha", b"ObjectType = Image\n"),
    ("a.heic", b"\x00\x00\x00\x18ftypheic"), ("bad\nname.png", b"x"), ("tab\t.png", b"x"),
    *((f"cut{k}.png", png()[: k * len(png()) // 12]) for k in range(1, 12)),
    *((f"cut{k}.jpg", png(format="JPEG")[: k * len(png(format="JPEG")) // 8]) for k in range(1, 8)),
]  # fmt: skip
CONVERTED = {"dcm": "DICOM", "nii": "NIfTI", "gz": "NIfTI", "npy": "NumPy", "mha": "volume"}


@pytest.mark.parametrize(("name", "content"), BAD_IMAGES, ids=[name for name, _ in BAD_IMAGES])
def test_an_unreadable_image_is_named(name, content, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    good = picture(tmp_path / "good.png")
    with pytest.raises(ValueError, match="(?s)1 of 2 files.*--skip-bad") as caught:
        data.decode([good, tmp_path / name], S, tmp_path / "cache")
    assert name.split("\n")[0].split("\t")[0] in line_of(caught.value)
    assert CONVERTED.get(name.rpartition(".")[2], "") in line_of(caught.value)
    left: list[str] = []
    images, kept = data.decode(
        [good, tmp_path / name], S, tmp_path / "cache", skip_bad=True, left_out=left
    )
    assert len(images) == 1 and kept.tolist() == [0] and len(left) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_a_full_disk_names_the_cache(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(28, "No space left on device")

    good = picture(tmp_path / "good.png")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.u8'"):
        data.decode([good], S, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_many_unreadable_images_are_a_bounded_complaint(tmp_path, capsys):
    bad = [tmp_path / f"{'x' * 60}{i}.png" for i in range(60)]
    for path in bad:
        path.write_bytes(b"x")
    good = picture(tmp_path / "good.png")
    with pytest.raises(ValueError, match="60 of 61 files.*and 50 more") as caught:
        data.decode([good, *bad], S, tmp_path / "cache")
    line_of(caught.value)
    left: list[str] = []
    data.decode([good, *bad], S, tmp_path / "cache", skip_bad=True, left_out=left)
    assert len(left) == 60 and capsys.readouterr().err.count("\n") == 21


def float_tiff(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.float32)).save(path)
    return path


@pytest.mark.parametrize("value", [-1.0, -1024.0, math.inf, -math.inf, math.nan])
def test_values_without_a_meaning_need_a_window(value, tmp_path):
    values = np.linspace(0, 300, 1600).reshape(40, 40)
    good = float_tiff(tmp_path / "good.tif", values)
    values[3, 4] = value
    bad = float_tiff(tmp_path / "bad.tif", values)
    with pytest.raises(ValueError, match="bad.tif: holds .* values.*--window LOW,HIGH"):
        depth.window_of_set([good, bad], "")
    with pytest.raises(ValueError, match="bad.tif: .*--window LOW,HIGH"):
        data.read_image(bad, S)
    window = depth.window_of_set([good, bad], "-100,300")
    assert window == (-100, 300)
    image = data.read_image(bad, S, window)
    assert 60 < image[0, 0, 0] < 70 and image[0, -1, -1] > 250


def test_one_bright_pixel_changes_no_other(tmp_path, capsys):
    deep = np.full((40, 40), 200, np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    deep[0, 0] = 4000
    Image.fromarray(deep).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png", picture(tmp_path / "c.png")]
    window = depth.window_of_set(paths, "")
    assert window == (0, 4095) and "2 images of more than 8 bits" in capsys.readouterr().err
    images, _ = data.decode(paths, S, tmp_path / "cache", window=window)
    assert images[0, 0, 20, 20] == images[1, 0, 20, 20] == round(200 / 4095 * 255)
    assert (images[2] == data.read_image(paths[2], S)).all()
    wide, _ = data.decode(paths, S, tmp_path / "cache", window=(0, 400))
    assert wide[0, 0, 20, 20] == 128  # another window, another cache
    assert depth.window_of_set([paths[2]], "") is None
    cut = tmp_path / "cut.png"  # its header says that it is deep; the rest is for the decoding
    cut.write_bytes(paths[1].read_bytes()[:60])
    assert depth.window_of_set([*paths, cut], "") == window
    assert depth.window_of_set([cut], "") is None


def test_images_of_both_depths_or_of_another_depth_than_the_runs_are_said(tmp_path, capsys):
    Image.fromarray(np.full((40, 40), 200, np.uint16)).save(tmp_path / "deep.png")
    deep, flat = tmp_path / "deep.png", picture(tmp_path / "flat.png")
    for paths, saved, said in (
        ([deep, flat], None, "warning: 1 of 2 images have more than 8 bits, such as .*deep.png"),
        (
            [flat],
            {"values_shown": [0, 4095]},
            "the run's images have more than 8, but these have 8 bits",
        ),
        ([deep], {"values_shown": None}, "the run's images have 8 bits, but these have more"),
    ):
        depth.window_of_set(paths, "", saved)
        got = capsys.readouterr().err
        assert re.search(said, got) and ("--window" in got) == (saved is None), got
    given = {"values_shown": [0, 4095], "window": "0,4095"}  # whatever the images then were
    for paths, saved in (
        ([deep], None), ([flat], {"values_shown": None}), ([flat], {}), ([flat], given),
    ):  # fmt: skip
        depth.window_of_set(paths, "", saved)
        assert "warning" not in capsys.readouterr().err


BROKEN_LISTS = [
    "", "[]", "null", "3", '"x"', "{}", '{"train": []}', '{"train": {"0": "a.png"}}',
    '{"train": {"0": [1]}}', '{"train": {"0": [null]}, "test": {}}',
    '{"train": {"0": ["a.png"]}, "test": []}', '{"train": {"0": ["a.png"]}}',
    '{"train": {"0": ["a.png"]}, "test": {"0": "b"}}', '{"train": {"0": [""]}, "test": {}}',
    '{"train": {"0": ["a.png"]}, "test": {"2": ["a.png"]}}',
    '{"train": {"0": ["no.png"]}, "test": {}}', '{"train": {"0": ["a\\u0000.png"]}, "test": {}}',
    '{"train": {"0": [["a.png"]]}, "test": {}}', "[" * 99999,
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_LISTS, ids=range(len(BROKEN_LISTS)))
def test_a_broken_data_json_is_named(text, tmp_path):
    picture(tmp_path / "images/a.png")
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match="data.json") as caught:
        layouts.discover(tmp_path)
    line_of(caught.value)


UNKNOWN_NAMES = ["negative", "normals", "ok", "control", "no_finding", "class0", "0", "Gut"]


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
def test_the_names_of_normal_folders_are_listed(name, tmp_path):
    root = mvtec(tmp_path / "a")
    (root / "test/good").rename(root / "test" / name)
    with pytest.raises(ValueError, match=f"Found .*{name}/.*good, healthy, normal") as caught:
        layouts.discover(root).check_test()
    line_of(caught.value)
    root = mvtec(tmp_path / "b")
    (root / "train/good").rename(root / "train" / name)
    with pytest.raises(ValueError, match="no training images.*good, healthy, normal"):
        layouts.discover(root)


@pytest.mark.parametrize(("normal", "abnormal"), [(0, 3), (1, 3), (3, 1), (3, 0), (1, 1)])
def test_two_test_images_of_each_class_are_needed(normal, abnormal, tmp_path):
    root = mvtec(tmp_path)
    shutil.rmtree(root / "ground_truth")
    for folder, count in (("good", normal), ("polyp", abnormal)):
        for path in sorted((root / "test" / folder).iterdir())[count:]:
            path.unlink()
    with pytest.raises(ValueError, match=f"{normal} normal and {abnormal} abnormal.*two images"):
        layouts.discover(root).check_test()


@pytest.mark.parametrize("ending", ["dcm", "DCM", "nii", "nii.gz", "mha", "nrrd", "npy", "heic"])
def test_other_kinds_of_files_are_named_with_a_way_to_convert_them(ending, tmp_path):
    (tmp_path / f"scan.{ending}").write_bytes(b"x")
    with pytest.raises(ValueError, match="1 .* files are not read: write PNG files first, by"):
        layouts.discover(tmp_path)
    root = mvtec(tmp_path / "set")
    (root / f"train/good/scan.{ending}").write_bytes(b"x")
    assert "write PNG files first" in " ".join(checks.check_unused(layouts.discover(root)))


def test_links_that_go_round_count_once(tmp_path):
    root = mvtec(tmp_path)
    (root / "train/good/loop").symlink_to(root / "train/good", target_is_directory=True)
    (root / "train/good/up").symlink_to(root, target_is_directory=True)
    (root / "test/polyp/loop").symlink_to(".", target_is_directory=True)
    found = layouts.discover(root)
    assert [path.name for path in found.train] == ["0.png", "1.png", "2.png"]
    assert len(found.test) == 6


def test_a_whole_disk_is_no_data_set(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}/{i}").mkdir(parents=True)
    assert len(list(folders.walk(tmp_path, most=25))) == 25
    with pytest.raises(ValueError, match="more than 24 folders; name the data set"):
        list(folders.walk(tmp_path, most=24))


def test_what_is_not_used_is_said(tmp_path, monkeypatch):
    root = mvtec(tmp_path)
    picture(root / "test/stray.png")
    picture(root / "train/polyp/x.png")
    picture(root / "train/beside.png")
    notes = " ".join(checks.check_unused(layouts.discover(root)))
    assert "3 images are not used: 1 in test/, 1 in train/, 1 in train/polyp/" in notes
    scan, closed = os.scandir, str(root / "test/polyp")

    def refused(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=f"{closed}: this folder cannot be read"):
        layouts.discover(root)
    dataset = layouts.Dataset("MVTec", root, (), ())
    assert f"cannot be read: {closed}" in " ".join(checks.check_unused(dataset))


def test_accents_are_the_same_however_they_are_stored(tmp_path):
    composed = unicodedata.normalize("NFC", "pólyp")
    apart = unicodedata.normalize("NFD", "pólyp")
    assert composed != apart
    for i in range(2):
        picture(tmp_path / f"train/good/{i}.png", i)
        picture(tmp_path / f"test/good/{i}.png", 5 + i)
        picture(tmp_path / f"test/{composed}/{composed}{i}.png", 8 + i)
        lesion(tmp_path / f"ground_truth/{apart}/{apart}{i}_mask.png")
    assert all(s.mask for s in layouts.discover(tmp_path).test if s.label)
    other = tmp_path / "list"
    picture(other / f"images/{apart}.png")
    (other / "data.json").write_text(json.dumps({"train": {"0": [f"{composed}.png"]}, "test": {}}))
    assert layouts.discover(other).train[0].is_file()


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory, detector_state) -> Path:
    """Runs, images and what is neither; nothing below may change anything here."""
    root = tmp_path_factory.mktemp("places")
    (root / "run/figures").mkdir(parents=True)
    (root / "run/figures/x.png").touch()
    (root / "run/config.json").write_text(json.dumps(good_config() | {"image_size": S}))
    torch.save(detector_state, root / "run/detector.pt")
    for name in ("no-detector", "no-config", "bad-results", "bad-detector", "pipe-detector"):
        shutil.copytree(root / "run", root / name)
    (root / "no-detector/detector.pt").unlink()
    (root / "no-config/config.json").unlink()
    (root / "bad-results/results.json").write_text("{")
    (root / "bad-detector/detector_igd.pt").write_bytes(b"x")
    (root / "pipe-detector/detector.pt").unlink()
    os.mkfifo(root / "pipe-detector/detector.pt")
    for i in range(3):
        picture(root / f"new/{i}.png", i)
        picture(root / f"healthy/{i}.png", i)
    shutil.copytree(mvtec(root / "set"), root / "no-masks")
    shutil.rmtree(root / "no-masks/ground_truth")
    mask = next(mvtec(root / "bad-mask").rglob("ground_truth/*/*.png"))
    mask.write_bytes(b"x")
    shutil.copytree(root / "no-masks", root / "one-class")
    shutil.rmtree(root / "one-class/test/good")
    picture(root / "few/0.png")
    for name in ("bad", "cut", "piped", "all-bad"):
        (root / name).mkdir()
        if name != "all-bad":
            picture(root / name / "good.png")
    (root / "bad/x.png").write_bytes(b"x")
    (root / "cut/x.png").write_bytes(png()[:900])
    os.mkfifo(root / "piped/x.png")
    for i in range(40):
        (root / f"all-bad/{i}.png").write_bytes(b"x")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "nowhere").symlink_to("is-not-there")
    float_tiff(root / "negative.tif", np.full((40, 40), -5.0))
    Image.new("1", (15_000, 15_000)).save(root / "huge.png")
    picture(root / "tiny.png", size=(4, 40))
    torch.save({"conv1.weight": torch.zeros(1)}, root / "other.pt")
    (root / "nan").mkdir()
    weights = ResNet18().state_dict() | {"fc.bias": torch.full((1000,), math.nan)}
    torch.save(weights, root / "nan/encoder.pt")
    for name, text in SETTINGS.items():
        (root / f"{name}.txt").write_text(text)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return root


SETTINGS = {
    "none": "# nothing\n", "twice": "a --lr 0.1\na --lr 0.2\n", "option": "--lr 0.1\n",
    "quote": 'a "x\n', "unknown": "a --nope 1\n", "word": "a --lr high\n", "range": "a --lr -1\n",
    "out": "a --out x\n", "seed": "a --seed 3\n", "resume": "a --resume\n", "words": "a b\n",
    "long": "a --lr 0.1 " + "x" * 9000 + "\n", "plan": "a --dry-run\n",
    "row": "nobody --lr 0.1\n", "method": "PMSACL --method nope\n", "comma": "a --detector igd,\n",
    "help": "a --help\n", "short": "a --epoch 3\n", "share": "a --healthy-share 2\n",
    "window": "a --window 3\n",
}  # fmt: skip
NO_RUN = "no finished run here, it has no config.json"
UNUSABLE = "1 of {} files cannot be used: {}.*--skip-bad"
BAD_SCORINGS = [
    ("", "required: RUN"),
    *((f"{run} --score new", f"{run}: {NO_RUN}") for run in ("nothing", "file", "empty", "pipe")),
    *((f"{run} --score new", NO_RUN) for run in ("no-config", "loop", "new")),
    ("no-detector --score new", "no finished run here; pmsacl.py --resume finishes it"),
    ("bad-results --score new", "results.json: damaged"),
    ("bad-detector --score new", "detector_igd.pt: no detector, or a damaged one"),
    ("pipe-detector --score new", "detector.pt: not a regular file"),
    ("run --score", "--score: expected at least one argument"),
    ("run --score ''", "--score: is empty"),
    ("'' --score new", "RUN: is empty"),
    *((f"run --score {p}", "no such file or") for p in ("x.png", "new/*", "nowhere", "loop")),
    ("run --score new x.png", "x.png: no such file or folder"),
    ("run --score empty", "empty: no images in this folder"),
    ("run --score new run/empty empty", "no such file or folder"),
    ("run --score pipe", UNUSABLE.format(1, "pipe: not a regular file")),
    ("run --score /dev/zero", UNUSABLE.format(1, "/dev/zero: not a regular file")),
    ("run --score piped", UNUSABLE.format(2, "piped/x.png: not a regular file")),
    ("run --score file", UNUSABLE.format(1, "file: not an image")),
    ("run --score bad", UNUSABLE.format(2, "bad/x.png: not an image")),
    ("run --score bad --out a/b", UNUSABLE.format(2, "bad/x.png: not an image")),
    ("run --score cut", UNUSABLE.format(1, "cut/x.png: ")),
    ("run --score cut --out empty", UNUSABLE.format(1, "cut/x.png: ")),
    ("run --score cut --out a/b --json", UNUSABLE.format(1, "cut/x.png: ")),
    ("run --score tiny.png", UNUSABLE.format(1, "tiny.png: 4 x 40 pixels")),
    ("run --score huge.png", UNUSABLE.format(1, "huge.png: of more than 178 million pixels")),
    ("run --score all-bad", "40 of 40 files cannot be used: .*and 30 more"),
    ("run --score all-bad --skip-bad", "40 of 40 files cannot be used: .*and 30 more"),
    ("run --score negative.tif", "holds negative values.*the run knows images of 8 bits only"),
    *((f"run --score new --out {out}", "lies among the images") for out in ("new", "new/a/b")),
    ("run --score new/0.png new --out new/a", "lies among the images"),
    *((f"run --score new --out {out}", "is not empty") for out in ("run", "run/figures", "set")),
    ("run --score new --out run/figures/a", "lies among the run's own files"),
    ("run --score new --out run/cache/a", "lies among the run's own files"),
    *((f"run --score new --out {out}", f"{out}: cannot be made") for out in (
        "file", "file/a", "pipe", "nowhere", "loop", "/proc/a", "/dev/null", "run/detector.pt",
    )),
    (f"run --score new --out {'a' * 300}", "a: File name too long"),
    ("run --score new --out ''", "--out: is empty"),
    ("run --score new --out", "--out: expected one argument"),
    ("run --json", "--json go with --score"),
    ("run --out a", "--out and --json go with --score"),
    ("run --score new --data set", "goes with neither --data"),
    ("run --score new --paper-protocol", "nor --paper-protocol"),
    *((f"run --score new --batch-size {n}", "--batch-size") for n in ("0", "-1", "x", "1.5", "")),
    *((f"run --score new --device {d}", "--device must be") for d in ("gpu", "cuda:x", "''")),
    ("run --score new --window 0,1", "unrecognized arguments: --window"),
    ("run new", "unrecognized arguments: new"),
    ("run", "x: the images of run are not there; --data names their place"),
    ("run --data ''", "--data: is empty"),
    *((f"run --data {p}", f"{p}: no such folder") for p in ("x", "file", "pipe", "loop")),
    ("run --data bad-mask", "files cannot be used: .*ground_truth"),
    ("run --data healthy", "without test images: nothing to measure"),
    ("run --data empty", "found no images"),
    ("run --data set/test/good", "without test images: nothing to measure"),
]  # fmt: skip
QUICK = "--data healthy --out a --preset quick --image-size 32 --init random"
BAD_RUNS = [
    *((f"{QUICK} --encoder {p}", "--encoder .*no encoder.pt here") for p in (
        "nothing", "file", "empty", "pipe", "loop", "run", "other.pt",
    )),
    *((f"{QUICK} --init {p}", f"--init .*/{p}: ") for p in ("x", "empty", "pipe", "file")),
    (f"{QUICK} --init other.pt", "--init .*/other.pt: no state dict"),
    (f"{QUICK} --encoder nan", "--encoder .*nan: encoder.pt: some weights are infinite or NaN"),
    (f"{QUICK} --init nan/encoder.pt", "--init .*nan/encoder.pt: some weights are infinite or NaN"),
    *((f"{QUICK} --init {p}", f"--init .*/{p}") for p in ("loop", "run/config.json")),
    (f"{QUICK} --init nowhere", "--init .*/is-not-there"),
    *((f"{QUICK} --detector {names}", "--detector must be both, or some of padim") for names in (
        ",", "padim,", ",padim", "padim,padim", "PaDiM", "both,dae", "padim;dae", "untrained",
        "'padim, dae'", "f_beta",
    )),
    *((f"{QUICK} --healthy-share {v}", "--healthy-share") for v in ("10%", "''", "0.51", "-1")),
    *((f"{QUICK} --window {v}", "--window must be two numbers") for v in (
        "5", "5,5", "5,1", "-5,-9", "-5", "a,b", "1;2", "'1 2'", "0,1e400", "1,,2",
    )),
    *((f"{QUICK} --lr 0 --window {v}", "--lr must be") for v in ("-160,240", "-.5,.5")),
    (f"{QUICK} --resume ''", "--resume: is empty"),
    (f"{QUICK} --terms aug,aug", "--terms must be .* some of .*, each once"),
    (QUICK.replace("healthy", "bad-mask"), "files cannot be used: .*ground_truth"),
    (QUICK.replace("healthy", "one-class"), "one-class: .*both classes"),
    (QUICK.replace("healthy", "few"), "1 healthy images are too few"),
    ("--data loop --out a", "loop: no such folder"),
    ("--data empty --out a", "empty: found no images"),
    (f"{QUICK} --nonsense 1", "unrecognized arguments: --nonsense"),
    *((f"{words}--out file/a", "--out file") for words in ("", "--data set ")),
    ("--data set --out loop/a", "--out .*loop"),
    ("--resume loop", "--resume loop: no run"),
]  # fmt: skip
BAD_TABLES = [
    ("", "nothing to do: name a --table, a --figure or a --sweep"),
    *((f"--table {n}", "argument --table") for n in ("", "0", "11", "x", "1.5", "1,2")),
    *((f"--figure {n}", "argument --figure") for n in ("", "0", "8", "x")),
    *((f"--table 9 --data {p}", "no such folder of images") for p in ("x", "file", "pipe", "loop")),
    ("--table 9 --data ''", "--data: is empty"),
    ("--table 9 --data empty", "found no images"),
    ("--table 9 --data healthy", "no test images to measure on"),
    ("--figure 3 --data healthy", "no test images to measure on"),
    ("--table 7 --data no-masks", "no masks, which --table 7 measures with"),
    *((f"--table 9 --data set --seeds {n}", "--seeds") for n in ("0", "-1", "x", "''", "9999999")),
    *((f"--table 9 --data set {o}", "--seeds N runs") for o in ("--seed 3", "--resume")),
    ("--table 9 --data set --dry-run", "--dry-run goes with pmsacl.py alone"),
    ("--table 9 --data set --nope", "unrecognized arguments: --nope"),
    ("--table 9 --data set --image-size 33", "--image-size must be"),
    ("--table 9 --data set --healthy-share 2", "--healthy-share must be"),
    ("--table 9 --data set --window 1", "--window must be"),
    ("--table 9 --data set --detector padim,", "--detector must be"),
    ("--table 9 --data set --preset fast", "--preset must be"),
    ("--table 9 --data set --encoder run", "--encoder .*no encoder.pt here"),
    ("--table 9 --data set --init other.pt", "--init .*other.pt: no state dict"),
    *((f"--table 9 --data set --out {o}", "lies in --data") for o in ("set", "set/a", "set/a/b")),
    *((f"--table 9 --data set --out {o}", "cannot be made") for o in ("file", "file/a", "/proc/a")),
    ("--table 9 --data set --out ''", "--out: is empty"),
    *((f"--figure 1 --run {p}", "no run here, there is no config.json") for p in (
        "x", "file", "empty", "pipe", "loop", "no-config",
    )),
    ("--figure 1 --run ''", "--run: is empty"),
    ("--run run", "--run goes with|nothing to do"),
    ("--table 9 --run run", "--run goes with --figure 1 to 5"),
    ("--figure 6 --run run", "--run goes with --figure 1 to 5"),
    ("--figure 1 --run run --lr 0.1", "has its own settings: leave out --lr"),
    ("--figure 1 --run run --data set", "has its own settings: leave out --data"),
    ("--figure 2 --show", "--show prints tables"),
    ("--sweep ''", "--sweep: is empty"),
    *((f"--sweep {p}", f"{p}") for p in ("x", "empty", "pipe", "loop", "nowhere", "/dev/zero")),
    ("--sweep binary.txt", "binary.txt: not a text file"),
    ("--sweep none.txt", "none.txt: no settings"),
    *((f"--sweep {name}.txt", f"{name}.txt, line {said}") for name, said in (
        ("twice", "2: a is there twice"), ("option", "1: --lr is an option"), ("quote", "1: "),
        ("unknown", "1: unrecognized arguments: --nope 1"), ("word", "1: argument --lr: invalid"),
        *((name, "1: no --resume") for name in ("out", "seed", "resume")), ("words", "1: "),
        ("long", "1: "), ("help", "1: "), ("plan", "1: "), ("short", "1: "),
    )),
    *((f"--sweep {name}.txt", said) for name, said in (
        ("range", "range, row a: --lr"),
        ("comma", "comma, row a: --detector"), ("share", "share, row a: --healthy-share"),
        ("window", "window, row a: --window"),
    )),
    ("--table 5 --rows ''", "--rows: is empty"),
    *((f"--table 5 --rows {p}", f"{p}") for p in ("x", "empty", "pipe", "loop", "/dev/zero")),
    ("--table 5 --rows none.txt", "none.txt: no settings"),
    ("--table 5 --rows binary.txt", "binary.txt: not a text file"),
    ("--table 5 --rows row.txt", "no row is called nobody"),
    ("--table 5 --rows method.txt", "table 5, row PMSACL: --method must be"),
]  # fmt: skip
BAD_COUNTS = [
    ("", "required: DIR"), ("''", "DIR: is empty"), ("set set", "unrecognized arguments: set"),
    *((p, f"{p}: no such folder of images") for p in ("x", "file", "pipe", "loop", "nowhere")),
    ("empty", "found no images"), ("run/figures --nope", "unrecognized arguments: --nope"),
]  # fmt: skip
COMMANDS = {
    evaluation.main: BAD_SCORINGS, job.main: BAD_RUNS, experiments.main: BAD_TABLES,
    datasets.main: BAD_COUNTS,
}  # fmt: skip
load_once = functools.cache(evaluation.load)  # half a second each time
BAD_COMMANDS = [(main, *row) for main, rows in COMMANDS.items() for row in rows]
NAMES = [f"{main.__module__} {words[:60]}" for main, words, _ in BAD_COMMANDS]


@pytest.mark.parametrize(("main", "words", "said"), BAD_COMMANDS, ids=NAMES)
def test_a_bad_command_ends_in_one_line_and_changes_nothing(
    main, words, said, places, monkeypatch, capsys
):
    monkeypatch.chdir(places)
    monkeypatch.setattr(evaluation, "load", load_once)
    before = state_of(places)
    try:
        status = main(shlex.split(words))
    except SystemExit as ended:  # argparse
        status = ended.code
    out, error = capsys.readouterr()
    *notes, last = error.splitlines()
    assert status == 2 and out == "" and len(last) <= LONGEST and len(notes) <= 4, error
    assert re.search(said, last), last
    assert state_of(places) == before


def state_of(root: Path) -> dict[Path, int]:
    """All that is there, with the times of what is no folder."""
    return {path: path.is_dir() or path.lstat().st_mtime_ns for path in root.rglob("*")}


# --- content -----------------------------------------------------------------------------------

COPIES = [
    ("train/good/0.png", "test/good/x.png", "test images that also train (1)"),
    ("train/good/0.png", "test/polyp/x.png", "test images that also train (1)"),
    ("test/good/0.png", "test/polyp/x.png", "images with both labels (1)"),
    ("test/polyp/0.jpg", "test/good/x.jpg", "images with both labels (1)"),
]


@pytest.mark.parametrize(("source", "target", "said"), COPIES)
@pytest.mark.parametrize("link", [False, True])
def test_the_same_image_in_two_sets_is_refused(source, target, said, link, tmp_path):
    root = mvtec(tmp_path)
    assert checks.check_content(layouts.discover(root), allow=False) == []
    (root / target).hardlink_to(root / source) if link else shutil.copy(
        root / source, root / target
    )
    with pytest.raises(ValueError, match=f"{re.escape(said)}: .*--allow-duplicates") as caught:
        checks.check_content(layouts.discover(root), allow=False)
    assert Path(source).name in line_of(caught.value) and Path(target).name in str(caught.value)
    assert said in checks.check_content(layouts.discover(root), allow=True)[0]


def test_images_that_trained_another_runs_encoder_are_found(tmp_path, capsys):
    """By --encoder, and by eval.py on another data set, whose own training images do not matter."""
    root, run = mvtec(tmp_path / "data"), tmp_path / "run"
    found = layouts.discover(root)
    elsewhere = mvtec(tmp_path / "other") / "train/good"
    assert checks.check_content(found, [*elsewhere.iterdir()], allow=False) == []  # copies train
    shutil.copy(root / "test/good/1.png", elsewhere / "leak.png")
    said = r"test images that also train \(1\): .*1.png = .*leak.png"
    with pytest.raises(ValueError, match=said):
        checks.check_content(found, [*elsewhere.iterdir()], allow=False)
    run.mkdir()
    (run / "config.json").write_text(json.dumps(good_config() | {"data": str(elsewhere)}))
    assert checks.trained_on(run) == tuple(sorted(elsewhere.iterdir()))
    assert "also train (1)" in checks.of_other(run, found)[0] in capsys.readouterr().err
    shutil.rmtree(elsewhere)
    assert checks.trained_on(run) == () and checks.of_other(run, found) == []


def test_a_file_listed_twice_is_refused_and_a_copy_in_its_class_said(tmp_path):
    root = mvtec(tmp_path)
    shutil.copy(root / "train/good/0.png", root / "train/good/copy.png")
    assert (
        "images with copies in their class (1)"
        in checks.check_content(layouts.discover(root), allow=False)[0]
    )
    (root / "train/good/again.png").symlink_to(root / "train/good/1.png")
    with pytest.raises(ValueError, match=r"files listed twice \(1\): .*again.png"):
        checks.check_content(layouts.discover(root), allow=False)


@pytest.mark.parametrize("value", [0, 255])
def test_masks_need_both_kinds_of_pixels(value, tmp_path):
    found = layouts.discover(mvtec(tmp_path))
    masks = np.zeros((6, S, S), np.uint8)
    masks[3:] = value > 0
    known = np.ones(6, bool)
    with pytest.raises(ValueError, match="all 3 masks hold .*0_mask.png"):
        checks.check_masks(found.test, masks, known)
    masks[4, :, : S // 2] = 1
    masks[4, :, S // 2 :] = 0
    assert "2 masks hold" in checks.check_masks(found.test, masks, known)[0]


# --- a folder belongs to one process -------------------------------------------------------------


def test_a_live_run_is_refused_and_nothing_of_it_is_touched(tmp_path, capsys):
    folder = tmp_path / "run"
    root = mvtec(tmp_path / "data")
    with claim.claimed(lambda: ("config", folder)):
        (folder / "config.json").write_text(json.dumps(good_config() | {"data": str(root)}))
        before = sorted(folder.iterdir())
        assert job.main(["--resume", str(folder)]) == 2
        assert f"belongs to process {os.getpid()}" in capsys.readouterr().err
        assert job.main(["--data", str(root), "--out", str(folder)]) == 2
        assert "exists; add --resume" in capsys.readouterr().err
        assert sorted(folder.iterdir()) == before
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("pid", [2**22 + 5, os.getpid(), "x", None])
def test_the_lock_of_a_process_that_was_killed_is_taken_over(pid, tmp_path):
    (tmp_path / claim.LOCK).write_text(json.dumps(claim._self() | {"pid": pid}))
    held = claim.Claim(tmp_path)
    assert claim.holder(tmp_path / claim.LOCK) == claim._self()
    held.release()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00" * 9, "null"])
@pytest.mark.parametrize("system", [True, False])
def test_a_lock_that_is_cut_short_is_nobodys(text, system, tmp_path, monkeypatch):
    if not system:
        monkeypatch.setattr(claim, "_system_lock", lambda file: None)
    (tmp_path / claim.LOCK).write_text(text)
    claim.Claim(tmp_path).release()


@pytest.mark.parametrize("system", [True, False])
def test_a_lock_of_another_host_or_of_this_process_stands(system, tmp_path, monkeypatch):
    (tmp_path / claim.LOCK).write_text(json.dumps(claim._self() | {"host": "elsewhere"}))
    if not system:
        monkeypatch.setattr(claim, "_system_lock", lambda file: None)
    with pytest.raises(ValueError, match="on elsewhere; if that has ended, delete .*run.lock"):
        claim.Claim(tmp_path)
    (tmp_path / claim.LOCK).unlink()
    held = claim.Claim(tmp_path)
    why = "which is running" if system else "if that has ended, delete"
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .*{why}"):
        claim.Claim(tmp_path)
    if system:
        (tmp_path / claim.LOCK).write_text("")  # its holder has not written yet
        with pytest.raises(ValueError, match="belongs to another process, which is running"):
            claim.Claim(tmp_path)
    held.release()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory: 9 GB")]
)
def test_a_file_is_not_called_damaged_for_lack_of_memory(error, tmp_path, monkeypatch):
    (tmp_path / "x.pt").touch()
    (tmp_path / "encoder.pt").touch()

    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    for read in (
        lambda: run.read_saved(tmp_path / "x.pt", "checkpoint", "cpu"),
        lambda: training.load(Toy(), tmp_path / "x.pt"),
        lambda: training.start_weights(ResNet18(), str(tmp_path / "x.pt")),
        lambda: training.encoder_of(tmp_path, "encoder.pt", "cpu"),
    ):
        with pytest.raises(type(error)) as caught:
            read()
        assert caught.value is error


def test_the_start_weights_of_patches_are_tried_while_they_are_needed(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    training.check_start("", str(tmp_path / "gone.pt"), tmp_path)
    with pytest.raises(ValueError, match="--init .*gone.pt: No such file"):
        training.check_start("", str(tmp_path / "gone.pt"), tmp_path, local=True)
    (tmp_path / "checkpoint_local.pt").touch()
    training.check_start("", str(tmp_path / "gone.pt"), tmp_path, local=True)


def test_cleaning_up_leaves_what_this_process_did_not_make(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/of-another-run").touch()
    with pytest.raises(ValueError), claim.claimed(lambda: (0, tmp_path)):
        (tmp_path / "config.json").touch()
        (tmp_path / "the-users.txt").touch()
        raise ValueError
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "cache", "of-another-run", "the-users.txt",
    ]  # fmt: skip
    with pytest.raises(ValueError), claim.claimed(lambda: (0, tmp_path / "new")):
        (tmp_path / "new/figures").mkdir()
        raise ValueError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("begun", [True, False])
def test_an_error_keeps_a_run_that_can_be_resumed_and_no_other(begun, tmp_path):
    made = ["config.json", "encoder.pt", "log_dae.csv", "detector_dae.pt", "report.html"]
    made += ["checkpoint_dae.pt"] * begun  # of a detector; the pre-training may have none
    with pytest.raises(FloatingPointError), claim.claimed(lambda: (0, tmp_path / "new")):
        for name in made:
            (tmp_path / "new" / name).touch()
        raise FloatingPointError
    left = sorted(path.name for path in tmp_path.glob("new/*"))
    assert left == (sorted(made) if begun else [])


# --- signals -------------------------------------------------------------------------------------


class Signalled(Toy):
    """Receives a signal in its third step."""

    number = signal.SIGTERM

    def update(self, terms):
        if self.step_done == 2:
            os.kill(os.getpid(), self.number)
        super().update(terms)


def test_a_signal_in_the_last_step_is_heard(tmp_path):
    toy = Signalled()
    toy.total = 3
    with claim.signals(), pytest.raises(KeyboardInterrupt):
        training.train(toy, tmp_path / "c.pt", tmp_path / "log.csv")
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step_done"] == 3


@pytest.mark.parametrize("number", claim.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_training_after_its_step_with_a_checkpoint(number, tmp_path):
    toy = Signalled()
    toy.number = number
    before = signal.signal(number, signal.SIG_DFL)  # ignored where the tests run in the background
    try:
        with claim.signals(), pytest.raises(KeyboardInterrupt):
            training.train(toy, tmp_path / "c.pt", tmp_path / "log.csv")
    finally:
        signal.signal(number, before)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step_done"] == 3
    again, whole = Toy(), Toy()
    training.train(again, tmp_path / "c.pt", tmp_path / "log.csv")
    training.train(whole, tmp_path / "whole.pt", tmp_path / "whole.csv")
    assert torch.equal(again.w, whole.w)


def test_a_second_signal_ends_it_at_once(tmp_path):
    class Twice(Signalled):
        def update(self, terms):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    with claim.signals(), pytest.raises(KeyboardInterrupt):
        training.train(Twice(), tmp_path / "c.pt", tmp_path / "log.csv")
    assert not (tmp_path / "c.pt").exists()


def test_a_signal_while_a_line_is_printed_is_heard(monkeypatch):
    class Signals(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not asked():
                os.kill(os.getpid(), signal.SIGINT)
            return len(data)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = io.TextIOWrapper(io.BufferedWriter(Signals()))
    try:
        with claim.signals(), claim.deferred(together=False) as asked:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stderr", stream)
                shown.notify("a line of progress")
            assert asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with claim.signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


PHASES = {
    "decoding": (cache, "ahead"),
    "centres": (pmsacl, "class_centres"),
    "training": (pmsacl.Pretraining, "update"),
    "fitting": (PaDiM, "embeddings"),
    "evaluating": (evaluation, "protocol"),
    "writing": (evaluation, "write_scores"),
}


def test_a_run_that_sigterm_ends_in_each_phase_goes_on_as_if_nothing_had_happened(
    phantoms, finished, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    arguments = ["--data", str(phantoms), "--out", str(folder), *TINY]

    def go_on() -> int:
        return job.main([*arguments, *["--resume"] * (folder / "config.json").exists()])

    def left_over() -> list[Path]:
        return [p for p in folder.rglob("*") if ".part" in p.name or p.suffix == ".lock"]

    for phase, (where, name) in PHASES.items():
        original = getattr(where, name)

        def interrupted(*args, original=original, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            assert go_on() == 130, phase
        assert folder.exists() == (folder / "config.json").exists() == (phase != "decoding")
        assert not left_over(), phase
    assert go_on() == 0 and not left_over()
    for name in ("encoder.pt", "detector.pt"):
        one, two = (torch.load(f / name, weights_only=True) for f in (finished, folder))
        pairs = zip(tree_leaves(one), tree_leaves(two), strict=True)
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)
    assert (finished / "scores.csv").read_text() == (folder / "scores.csv").read_text()


# --- the screen and the locale -------------------------------------------------------------------


class Gone:
    """A screen whose reader has gone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, _text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return False


def test_a_reader_that_has_gone_ends_nothing(monkeypatch, tmp_path):
    with open(tmp_path / "screen", "wb") as screen:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(shown.sys, name, Gone(screen.fileno()))
        shown.notify("hello")
        shown.show("hello")
        assert list(shown.progress(range(3), 3, "reading")) == [0, 1, 2]
        assert shown.complain("x", "y") == 2


def test_names_that_are_no_utf8_survive(tmp_path):
    try:
        picture(tmp_path / "data/train/good/a.png")
        name = os.fsdecode(b"caf\xe9.png")
        shutil.copy(tmp_path / "data/train/good/a.png", tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    images, _ = data.decode([tmp_path / name], S, tmp_path / "cache")
    assert len(images) == 1
    run.write_file(tmp_path / "x.md", run.encoded(name))
    assert (tmp_path / "x.md").read_bytes() == b"caf\xe9.png"
    assert run.read_text(tmp_path / "x.md") == name


def test_another_number_of_threads_is_said(capsys):
    checks.check_threads({"threads": str(torch.get_num_threads())})
    assert capsys.readouterr().err == ""
    checks.check_threads({"threads": "77"})
    assert "begun with 77 threads" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_writes_nothing(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert job.main(["--data", str(phantoms), "--dry-run", "--detector", "padim,dae", *TINY]) == 0
    text = capsys.readouterr().out
    assert re.search("dae: [0-9]+ steps of 16 images", text), text
    assert "16 healthy training images, 6 normal and 6 abnormal test images, 6 masks" in text
    for part in ("pmsacl: 6 steps of 4 images", "time: about", "memory: about", "disk: up to"):
        assert part in text, text
    assert not any(tmp_path.iterdir())


def test_what_is_to_blame_is_named(pretraining, tmp_path):
    begun = copy.copy(pretraining)
    begun.step_done = 0
    assert "not to blame" in training._remedy(begun, tmp_path / "c.pt", begun.step_done)
    begun.step_done = begun.total - 1
    assert begun.rate < begun.start_rate / 2  # the rate that failed is that of the beginning
    said = training._remedy(begun, tmp_path / "c.pt", begun.step_done)
    assert f"lower --lr ({begun.start_rate:g})" in said
    begun.config = dataclasses.replace(begun.config, weight_decay=1.0)
    begun.start_rate = 1000.0
    assert "lower --weight-decay (1)" in training._remedy(begun, tmp_path / "c.pt", begun.step_done)
