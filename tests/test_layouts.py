"""layouts.py: each layout, the matching of masks, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import lesion, mvtec, picture

from support import data, datasets, layouts


def test_mvtec(tmp_path):
    dataset = layouts.discover(mvtec(tmp_path))
    assert dataset.layout == "MVTec" and dataset.has_masks and len(dataset.train) == 3
    assert [(s.kind, s.label) for s in dataset.test] == [("good", 0)] * 3 + [("polyp", 1)] * 3
    assert [s.mask and s.mask.name for s in dataset.test[3:]] == [f"{i}_mask.png" for i in range(3)]
    assert all(s.mask is None for s in dataset.test[:3])
    dataset.check_test()


def test_masks_match_by_stem_and_never_by_order(tmp_path):
    mvtec(tmp_path)
    (tmp_path / "ground_truth/polyp/0_mask.png").unlink()
    (tmp_path / "ground_truth/polyp/2_mask.png").rename(tmp_path / "ground_truth/polyp/2.png")
    masks = [s.mask for s in layouts.discover(tmp_path).test if s.label]
    assert [m and m.name for m in masks] == [None, "1_mask.png", "2.png"]


def test_one_defect_with_masks_and_one_without(tmp_path):
    mvtec(tmp_path)
    picture(tmp_path / "test/bleeding/0.jpg")
    dataset = layouts.discover(tmp_path)
    masks, known = data.decode_masks(dataset.test, 32, tmp_path / "cache")
    by_kind = {s.kind: bool(k) for s, k in zip(dataset.test, known, strict=True)}
    assert by_kind == {"good": True, "polyp": True, "bleeding": False}
    assert masks.shape == (7, 32, 32) and not masks[~known].any()


@pytest.mark.parametrize("level", ["", "img/"])
@pytest.mark.parametrize("name", ["anomaly_mask", "label"])
def test_bmad(tmp_path, level, name):
    picture(tmp_path / "train/good/a.png")
    picture(tmp_path / "valid/good/img/v.png")
    picture(tmp_path / f"test/good/{level}g.png")
    lesion(tmp_path / f"test/good/{name}/g.png", value=0)
    picture(tmp_path / f"test/Ungood/{level}u.png")
    lesion(tmp_path / f"test/Ungood/{name}/u.png")
    dataset = layouts.discover(tmp_path)
    assert dataset.layout == "BMAD" and len(dataset.train) == 1
    assert {(s.path.name, s.label, s.mask is not None) for s in dataset.test} == {
        ("g.png", 0, False),
        ("u.png", 1, True),
    }


def test_healthy_images_in_folders_of_patients_train(tmp_path):
    for name in ("a/1.png", "b/1.png", "2.png"):
        picture(tmp_path / "train/good" / name)
    dataset = layouts.discover(tmp_path)
    assert [str(p.relative_to(tmp_path / "train/good")) for p in dataset.train] == [
        "2.png", "a/1.png", "b/1.png",
    ]  # fmt: skip


def test_bmad_without_test_reads_valid(tmp_path):
    picture(tmp_path / "train/good/a.png")
    picture(tmp_path / "valid/good/img/g.png")
    picture(tmp_path / "valid/Ungood/img/u.png")
    assert sorted(s.label for s in layouts.discover(tmp_path).test) == [0, 1]


def test_hyper_kvasir_archive(tmp_path):
    picture(tmp_path / "train_set/a.jpg")
    picture(tmp_path / "test_set/normal_test/b.jpg")
    picture(tmp_path / "test_set/abnormal_test/c.jpg")
    lesion(tmp_path / "test_set/masks/c.png")
    dataset = layouts.discover(tmp_path)
    assert dataset.layout == "Hyper-Kvasir archive"
    assert sorted((s.label, s.mask is not None) for s in dataset.test) == [(0, False), (1, True)]


def test_a_folder_is_counted_against_the_papers_data_sets(tmp_path, capsys, monkeypatch):
    for i in range(3):
        picture(tmp_path / f"train_set/a{i}.jpg")
    picture(tmp_path / "test_set/normal_test/b.jpg")
    picture(tmp_path / "test_set/abnormal_test/c.jpg")
    picture(tmp_path / "test_set/abnormal_test/d.jpg")
    lesion(tmp_path / "test_set/masks/c.png")
    assert datasets.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: Hyper-Kvasir archive"
    assert lines[2].split() == ["here", "3", "1", "2", "1"]
    assert lines[3].split() == ["Hyper-Kvasir", "1,600", "500", "1,000", "1,000"]
    assert [line.split() for line in lines[4:7]] == [
        ["LAG", "2,343", "800", "1,711", "1,711"],
        ["Liu", "et", "al.", "13,250", "677", "290", "0"],
        ["Covid-X", "13,794", "200", "200", "0"],
    ]
    apart = "training -1,597; test, normal -499; test, abnormal -998; masks -999"
    assert lines[-1] == f"nearest: Hyper-Kvasir, apart from {apart}"
    monkeypatch.setitem(datasets.PAPER, "LAG", (3, 1, 2, 1))
    assert datasets.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "these are LAG's numbers"


@pytest.mark.parametrize(
    "name", "ground_truth anomaly_mask mask masks label annotation annotations Masks".split()
)
def test_a_folder_of_masks_beside_the_images_goes_by_many_names(name, tmp_path):
    """Under a name that is not known, masks would be measured as abnormal images."""
    picture(tmp_path / "train/good/a.png")
    picture(tmp_path / "test/good/b.png")
    picture(tmp_path / "test/polyp/img/c.png")
    mask = lesion(tmp_path / "test/polyp" / name / "c.png")
    test = layouts.discover(tmp_path).test
    assert [(s.path.name, s.label, s.mask) for s in test] == [
        ("b.png", 0, None),
        ("c.png", 1, mask),
    ]


def test_train_test_normal_abnormal_in_any_case(tmp_path):
    picture(tmp_path / "Train/Normal/a.PNG", format="PNG")
    picture(tmp_path / "Train/Abnormal/x.png")
    picture(tmp_path / "Test/NORMAL/b.png")
    picture(tmp_path / "Test/ABNORMAL/c.png")
    dataset = layouts.discover(tmp_path)
    assert dataset.layout == "train|test/{normal,abnormal}" and not dataset.has_masks
    assert [p.name for p in dataset.train] == ["a.PNG"]
    assert sorted(s.label for s in dataset.test) == [0, 1]


def test_medianomaly(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"images/{name}.png")
    lesion(tmp_path / "masks/d.png")
    lesion(tmp_path / "masks/b.png", value=0)  # of a normal image: no mask
    lists = {"train": {"0": ["a.png"]}, "test": {"0": ["b.png"], "1": ["c.png", "d.png"]}}
    (tmp_path / "data.json").write_text(json.dumps(lists))
    dataset = layouts.discover(tmp_path)
    assert dataset.layout == "MedIAnomaly" and [p.name for p in dataset.train] == ["a.png"]
    assert [(s.kind, s.label, s.mask is not None) for s in dataset.test] == [
        ("normal", 0, False),
        ("abnormal", 1, False),
        ("abnormal", 1, True),
    ]


def test_a_mask_may_be_marked_in_capitals(tmp_path):
    mvtec(tmp_path)
    masks = tmp_path / "ground_truth/polyp"
    (masks / "0_mask.png").rename(masks / "0_MASK.png")
    assert [s.mask and s.mask.stem[0] for s in layouts.discover(tmp_path).test[3:]] == list("012")


def kvasir(root: Path, normal: int = 2166, polyps: int = 1000) -> Path:
    lower = root / "labeled-images/lower-gi-tract"
    folders = [lower / "anatomical-landmarks/cecum", lower / "anatomical-landmarks/ileum"]
    folders.append(lower / "quality-of-mucosal-views/bbps-2-3")
    segmented = root / "segmented-images"
    for folder in [*folders, segmented / "images", segmented / "masks"]:
        folder.mkdir(parents=True)
    for i in range(normal):
        (folders[i % 3] / f"n{i}.jpg").touch()
    for i in range(polyps):
        (segmented / f"images/p{i}.jpg").touch()
        (segmented / f"masks/p{i}.jpg").touch()
    (lower / "pathological-findings/polyps").mkdir(parents=True)
    (lower / "pathological-findings/polyps/x.jpg").touch()
    return root


def test_hyperkvasir_as_shipped_draws_the_papers_sizes(tmp_path):
    kvasir(tmp_path, polyps=1003)
    dataset = layouts.discover(tmp_path, seed=3)
    train, test = set(dataset.train), {s.path for s in dataset.test}
    assert dataset.layout == "HyperKvasir" and not train & test
    assert (len(train), sum(s.label == 0 for s in dataset.test)) == (1600, 500)
    lesions = [s for s in dataset.test if s.label]
    assert len(lesions) == 1000 and all(s.mask and s.mask.stem == s.path.stem for s in lesions)
    assert layouts.discover(tmp_path, seed=3) == dataset
    other = layouts.discover(tmp_path, seed=4)
    assert other.train != dataset.train and [s for s in other.test if s.label] != lesions


def test_hyperkvasir_that_is_incomplete(tmp_path):
    with pytest.raises(ValueError, match="found 12 and 5"):
        layouts.discover(kvasir(tmp_path, normal=12, polyps=5))


def test_one_folder(tmp_path):
    names = [f"{7 * i % 40:02d}.{'jpg' if i % 2 else 'png'}" for i in range(40)]
    for name in names:
        (tmp_path / name).touch()
    dataset = layouts.discover(tmp_path)
    assert [p.name for p in dataset.train] == sorted(names) and dataset.test == ()
    dataset.check_test()  # nothing to measure is no mistake


def test_images_of_every_usual_ending_are_found(tmp_path):
    endings = "png jpg jpeg jpe jfif bmp tif tiff webp gif ppm pgm jp2 PNG Jpeg".split()
    for k, ending in enumerate(endings):
        (tmp_path / f"{k:02d}.{ending}").touch()
    found = layouts.discover(tmp_path).train
    assert [path.name for path in found] == [f"{k:02d}.{e}" for k, e in enumerate(endings)]


def test_symlinks_uppercase_and_hidden_files(tmp_path):
    store, root = tmp_path / "store", tmp_path / "root"
    picture(store / "deep/x.JPG", format="JPEG")
    (root / "train").mkdir(parents=True)
    (root / "train/good").symlink_to(store / "deep", target_is_directory=True)
    picture(store / "y.png")
    (store / "deep/link.PNG").symlink_to(store / "y.png")
    for name in (".hidden.png", "._x.JPG", "Thumbs.db", "desktop.ini", "notes.txt"):
        (store / "deep" / name).write_text("no image")
    (store / "deep/.cache").mkdir()
    picture(store / "deep/.cache/z.png")
    picture(store / "deep/__MACOSX/z.png")
    dataset = layouts.discover(root)
    assert [p.name for p in dataset.train] == ["link.PNG", "x.JPG"]
    assert data.decode(dataset.train, 32, tmp_path / "cache")[0].shape == (2, 3, 32, 32)


# ----------------------------------------------------------------------- mistakes of layout


def test_nothing_to_find(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        layouts.discover(tmp_path / "missing")
    with pytest.raises(ValueError, match="found no images. Looked for"):
        layouts.discover(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="found other/"):
        layouts.discover(tmp_path)


def test_test_images_without_a_label(tmp_path):
    picture(tmp_path / "train/good/a.png")
    picture(tmp_path / "test/b.png")
    with pytest.raises(ValueError, match="no label"):
        layouts.discover(tmp_path)


@pytest.mark.parametrize("name", ["ground_truth/polyp/9.png", "ground_truth/ulcer/0.png"])
def test_a_mask_without_an_image(tmp_path, name):
    mvtec(tmp_path)
    lesion(tmp_path / name)
    with pytest.raises(ValueError, match=f"without an image.*{name}"):
        layouts.discover(tmp_path)


def test_one_mask_for_two_images(tmp_path):
    mvtec(tmp_path)
    lesion(tmp_path / "masks/7.png")
    for kind in ("polyp", "ulcer"):
        picture(tmp_path / f"test/{kind}/7.png")
    with pytest.raises(ValueError, match="masks/7.png: .*polyp/7.png or of .*ulcer/7.png"):
        layouts.discover(tmp_path)


@pytest.mark.parametrize("name", ["x_mask.png", "x_Mask_1.png"])
@pytest.mark.parametrize("folder", ["set/test/polyp", "set/train/good", "set/test/good", "flat"])
def test_a_mask_beside_its_image_is_no_image(tmp_path, folder, name):
    mvtec(tmp_path / "set")
    image, root = picture(tmp_path / folder / "x.png"), tmp_path / folder.split("/")[0]
    lesion(tmp_path / folder / name)
    with pytest.raises(ValueError, match=f"1 files look like masks .*{name}: move them to"):
        layouts.discover(root)
    image.unlink()
    layouts.discover(root)  # a name like any other


def test_two_masks_for_one_image(tmp_path):
    mvtec(tmp_path)
    lesion(tmp_path / "ground_truth/polyp/0.png")
    with pytest.raises(ValueError, match="two masks"):
        layouts.discover(tmp_path)
