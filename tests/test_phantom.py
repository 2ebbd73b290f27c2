"""phantom.py: the folder, what it depends on, lesions that can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from support import data, layouts, phantom


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_phantom_is_an_mvtec_folder_with_masks(tmp_path):
    phantom.draw(tmp_path / "p", train=4, good=3, abnormal=6, size=64, seed=1)
    dataset = layouts.discover(tmp_path / "p")
    assert dataset.layout == "MVTec" and (len(dataset.train), len(dataset.test)) == (4, 9)
    dataset.check_test()
    masks, known = data.decode_masks(dataset.test, 64, tmp_path / "c")
    area = masks.reshape(9, -1).mean(1)
    assert known.all() and not area[:3].any()
    assert (area[3:] > 0.005).all() and (area[3:] < 0.6).all()
    images, _ = data.decode([s.path for s in dataset.test], 64, tmp_path / "c")
    assert (images.reshape(9, -1).std(1) > 10).all()
    assert len({bytes(i) for i in images}) == 9


def test_phantom_depends_on_its_seed_alone(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        phantom.draw(tmp_path / name, train=2, good=1, abnormal=2, size=32, seed=seed)
    phantom.draw(tmp_path / "more", train=3, good=2, abnormal=2, size=32, seed=0)
    a, b, c, more = (files(tmp_path / name) for name in ("a", "b", "c", "more"))
    assert a == b
    images = [n for n in a if n.endswith(".png")]
    assert all(a[n] != c[n] for n in images) and all(a[n] == more[n] for n in images)


def test_phantom_lesions_change_the_picture_where_the_mask_is(tmp_path):
    """Contrast across the outline, in grey levels."""
    contrast = []
    for i in range(12):
        image, mask = phantom._colonoscopy(64, np.random.default_rng([0, 2, i]), lesions=True)
        inside = mask > 0
        grown = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(5))) > 0
        ring = grown & ~inside
        gap = image[inside].mean(0) - image[ring].mean(0)
        contrast.append(np.abs(gap).max())
    assert np.median(contrast) > 8  # visible
    assert np.median(contrast) < 90  # and not a sticker


def test_phantom_is_left_alone_when_it_is_there_and_never_overwrites(tmp_path):
    root = tmp_path / "deep/p"
    phantom.draw(root, train=1, good=1, abnormal=1, size=32)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    phantom.draw(root, train=1, good=1, abnormal=1, size=32)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    with pytest.raises(ValueError, match="something else"):
        phantom.draw(root, train=1, good=1, abnormal=1, size=32, seed=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").touch()
    with pytest.raises(ValueError, match="something else"):
        phantom.draw(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    phantom.draw(tmp_path / "empty", train=1, good=0, abnormal=0, size=32)
    assert len(layouts.discover(tmp_path / "empty").train) == 1


def test_no_half_written_phantom(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phantom, "_lesion", stop)
        phantom.draw(tmp_path / "p", train=1, good=1, abnormal=1, size=32)
    assert not any(tmp_path.iterdir())
    (tmp_path / ".p.part").mkdir()  # as a killed run leaves it
    phantom.draw(tmp_path / "p", train=1, good=1, abnormal=1, size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("wrong", [{"train": 0}, {"good": -1}, {"size": 16}])
def test_phantom_refuses_impossible_numbers(tmp_path, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        phantom.draw(tmp_path / "p", **wrong)
