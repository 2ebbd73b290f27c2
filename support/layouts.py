"""Folder layouts: training images, test images, and the mask that belongs to each.   [P:§4.1]

No image is opened here: decoding and checking them is in data.py.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.folders import EXTENSIONS, how_to_convert, named, refuse, visible, walk

NORMAL = {"good", "normal", "normal_test", "healthy"}
NORMAL_NAMES = f"normal images lie in a folder called {', '.join(sorted(NORMAL))}"
MASKS = {"ground_truth", "anomaly_mask", "mask", "masks", "label", "annotation", "annotations"}
HYPERKVASIR_NORMAL = ("bbps-2-3", "cecum", "ileum")  # [P:§4.1]
HYPERKVASIR_DRAW = (1600, 500, 1000)  # train, test normal, test abnormal        [P:§4.1]
LOOKED_FOR = (
    "train/ and test/ with good/ or normal/ and defect folders (MVTec, BMAD); "
    "train_set/ and test_set/ (Hyper-Kvasir archive); data.json and images/ (MedIAnomaly); "
    "cecum/, ileum/, bbps-2-3/ and segmented images/ and masks/ (HyperKvasir as shipped); "
    "or images directly in the folder"
)


@dataclass(frozen=True)
class Sample:
    """A test image: label 0 normal, 1 abnormal; kind, its folder's name; mask, None if unknown."""

    path: Path
    label: int
    kind: str
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Training images, which are all normal, and test images; layout: the convention's name."""

    layout: str
    root: Path
    train: tuple[Path, ...]
    test: tuple[Sample, ...]

    @property
    def images(self) -> list[Path]:
        """Training and test images."""
        return [*self.train, *(sample.path for sample in self.test)]

    @property
    def labels(self) -> np.ndarray:
        """(N,) bool of the test images: true where abnormal."""
        return np.array([sample.label for sample in self.test], bool)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Training images, normal test images, abnormal ones, and how many of these have a mask."""
        abnormal = sum(sample.label for sample in self.test)
        masks = sum(sample.mask is not None for sample in self.test)
        return len(self.train), len(self.test) - abnormal, abnormal, masks

    @property
    def has_masks(self) -> bool:
        return self.counts[-1] > 0

    def check_test(self) -> None:
        """raises: ValueError if the test images, where there are any, are not two of each class."""
        _, normal, abnormal, _ = self.counts
        if self.test and min(normal, abnormal) < 2:
            kinds = ", ".join(f"{k}/" for k in dict.fromkeys(s.kind for s in self.test))
            raise ValueError(
                f"{self.root}: the test split holds {normal} normal and {abnormal} abnormal "
                "images; the measures need both classes, two images of each or more. Found "
                f"{kinds[:200]}; {NORMAL_NAMES}, all others abnormal ones. To do without measures: "
                "--data with the healthy images' folder, then eval.py RUN --score"
            )


def discover(root: str | Path, *, seed: int = 0, training: bool = True) -> Dataset:
    """Recognise the layout of a folder and list its training and test images, sorted by path.

    MVTec, BMAD, the Hyper-Kvasir archive, train|test/{normal,abnormal}, MedIAnomaly's data.json,
    HyperKvasir as downloaded from its site, or one flat folder (training only). Names of train,
    test, class and mask folders match in any case; hidden files are left out. valid/ (BMAD) is read
    only where test/ is missing.

    root:    folder; no image is opened here.
    training: training images are needed; else ROOT may hold test/ alone, or the folders of test/.
    seed:    of the draw of 1,600 / 500 / 1,000 images from HyperKvasir; unused elsewhere.
    returns: Dataset; its test images may be missing or of one class (see Dataset.check_test).
    raises:  ValueError if no layout fits, no training image is found, a mask has no image, or masks
             lie among the images.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of images")
    readers = [_medianomaly, _splits, _hyperkvasir, _flat]
    for read in readers if training else [*readers, _test_alone]:
        dataset = read(root, seed)
        if dataset is not None:
            break
    else:
        inside = ", ".join(f"{name}/" for name in sorted(_folders(root))[:8])
        found = f"found {inside} but no data set" if inside else "found no images"
        raise ValueError(f"{root}: {found}. {how_to_convert(root)}Looked for {LOOKED_FOR}")
    _refuse_masks_among(dataset.images)
    if training and not dataset.train:
        raise ValueError(
            f"{root}: recognised as {dataset.layout}, but it has no training images. "
            f"{how_to_convert(root)}In train/, {NORMAL_NAMES}"
        )
    return dataset


def _folders(folder: Path) -> dict[str, Path]:
    """The visible subfolders, by lower-case name."""
    return {_key(p.name): p for p in sorted(folder.iterdir()) if visible(p.name) and p.is_dir()}


def _key(name: str) -> str:
    """A name for comparisons: macOS stores accents as separate characters, others do not."""
    return _composed(name).lower()


def stem(path: Path) -> str:
    """What an image and its mask share."""
    return _composed(path.stem)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _images(folder: Path, *, deep: bool = False) -> list[Path]:
    """Image files by their endings, sorted; deep: also in subfolders, but not in those of masks."""
    paths: list[Path] = []
    for parent, folders, files in walk(folder, refuse):
        paths += [parent / name for name in files]
        folders[:] = [f for f in folders if deep and f.lower() not in MASKS]
    return sorted(path for path in paths if path.suffix.lower() in EXTENSIONS)


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Masks by their image's stem: `000.png` and `000_mask.png` are both masks of `000.*`."""
    masks: dict[str, Path] = {}
    for path in paths:
        of = stem(path)[:-5] if stem(path).lower().endswith("_mask") else stem(path)
        if of in masks:
            raise ValueError(f"two masks for one image: {masks[of]} and {path}; keep one")
        masks[of] = path
    return masks


def _refuse_orphans(masks: Iterable[Path], used: set[Path]) -> None:
    """raises: ValueError if there are masks that no image has used."""
    if orphans := [p for p in masks if p not in used]:
        raise ValueError(
            f"masks without an image of the same name: {named(orphans)}; name each like its image, "
            "or NAME_mask, or add the images to the test folder"
        )


def _refuse_masks_among(images: Iterable[Path]) -> None:
    """raises: ValueError if NAME_mask or NAME_mask_1 lies beside an image NAME: it would be one."""
    there = {(path.parent, stem(path).lower()): path for path in images}
    names = ((key, re.fullmatch(r"(.+)_mask(_\d+)?", key[1])) for key in there)
    masks = [there[key] for key, name in names if name and (key[0], name[1]) in there]
    if masks:
        raise ValueError(
            f"{len(masks)} files look like masks of the images beside them, such as {masks[0]}: "
            "move them to ground_truth/<folder of the image>/, and those of healthy images away"
        )


def _samples(root: Path, test: Path, kinds: dict[str, list[Path]]) -> tuple[Sample, ...]:
    """Test images with their masks, which are matched by stem and never by sorted order.

    Masks of kind K lie in ROOT/ground_truth/K, TEST/K/anomaly_mask, or, for all the kinds
    together, in ROOT/masks or TEST/masks (each under any of the names in MASKS).

    kinds:   the images of each folder name.
    raises:  ValueError if a mask belongs to no image, or to two.
    """
    parents = [root] if test == root else [root, test]
    holders = [f for parent in parents for name, f in _folders(parent).items() if name in MASKS]
    shared = _by_stem(path for folder in holders for path in _images(folder))
    used: set[Path] = set()
    image_of: dict[Path, Path] = {}  # the abnormal image of each mask
    samples = []
    for kind, paths in kinds.items():
        label = int(kind.lower() not in NORMAL)
        inside = _folders(test / kind) if (test / kind).is_dir() else {}
        folders = [f for name, f in inside.items() if name in MASKS]
        folders += [f for h in holders for name, f in _folders(h).items() if name == _key(kind)]
        of_kind = _by_stem(p for f in folders for p in _images(f, deep=True)) if label else {}
        for path in paths:
            mask = of_kind.get(stem(path)) or shared.get(stem(path))
            if mask:
                used.add(mask)
            if mask and label:
                if mask in image_of:
                    raise ValueError(
                        f"{mask}: is it of {image_of[mask]} or of {path}? rename one of them"
                    )
                image_of[mask] = path
            samples.append(Sample(path, label, kind, mask if label else None))
        _refuse_orphans(of_kind.values(), used)
    known = NORMAL | {_key(kind) for kind in kinds}
    strays = [f for h in holders for name, f in _folders(h).items() if name not in known]
    _refuse_orphans([*shared.values(), *(p for f in strays for p in _images(f))], used)
    return tuple(samples)


def _splits(root: Path, _seed: int) -> Dataset | None:
    """train/ and test/ with one folder for each kind: MVTec, BMAD, the authors' archive."""
    folders = _folders(root)
    train = folders.get("train") or folders.get("train_set")
    test = folders.get("test") or folders.get("test_set") or folders.get("valid")
    if train is None:
        return None
    normal = [f for name, f in _folders(train).items() if name in NORMAL]
    healthy = [p for f in normal for p in _images(f, deep=True)] if normal else _images(train)
    if test is None:
        return Dataset("train folder", root, tuple(healthy), ())
    layout, samples = _test_split(root, test)
    if train.name.lower() == "train_set":
        layout = "Hyper-Kvasir archive"
    return Dataset(layout, root, tuple(healthy), samples)


def _test_split(root: Path, test: Path) -> tuple[str, tuple[Sample, ...]]:
    """The test images, a folder for each kind, and the layout's name."""
    inside = {f.name: f for name, f in _folders(test).items() if name not in MASKS}
    if not inside and _images(test):
        raise ValueError(f"{test}: its images lie in no good/ or <defect>/ folder, so no label")
    kinds = {name: _images(f, deep=True) for name, f in inside.items()}
    if any(k.lower() == "ungood" or "img" in _folders(f) for k, f in inside.items()):
        layout = "BMAD"
    elif {k.lower() for k in kinds} <= {"normal", "abnormal"}:
        layout = "train|test/{normal,abnormal}"
    else:
        layout = "MVTec"
    return layout, _samples(root, test, kinds)


def _test_alone(root: Path, _seed: int) -> Dataset | None:
    """ROOT/test, or ROOT itself, with a folder for each kind, and no training images."""
    folders = _folders(root)
    test = (
        folders.get("test") or folders.get("test_set") or (root if NORMAL & set(folders) else None)
    )
    if test is None:
        return None
    layout, samples = _test_split(root, test)
    return Dataset(f"{layout}, test images only", root, (), samples)


def _medianomaly(root: Path, _seed: int) -> Dataset | None:
    """data.json: {"train": {"0": [names]}, "test": {"0": [names], "1": [names]}}; images/."""
    listing, folder = root / "data.json", root / "images"
    if not (listing.is_file() and folder.is_dir()):
        return None
    try:
        lists = json.loads(listing.read_bytes())
        train = _listed(lists["train"]["0"], folder)
        kinds = {
            kind: _listed(lists["test"].get(key, []), folder)
            for key, kind in (("0", "normal"), ("1", "abnormal"))
        }
        if lists["test"].keys() - {"0", "1"}:
            raise ValueError("a third class")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'{listing}: expected {{"train": {{"0": [...]}}, "test": {{"0": [...], "1": [...]}}}}'
        ) from error
    missing = [str(p) for p in [*train, *kinds["normal"], *kinds["abnormal"]] if not p.is_file()]
    if missing:
        raise ValueError(f"{listing}: {len(missing)} listed files are missing, first {missing[0]}")
    return Dataset("MedIAnomaly", root, tuple(train), _samples(root, root, kinds))


def _listed(names: Any, folder: Path) -> list[Path]:
    """The files of a list of names, however their accents are written there and on the disk."""
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip("/\0") for n in names):
        raise TypeError("no list of names")
    paths = [folder / name.replace("\0", "?") for name in names]
    if all(path.is_file() for path in paths):
        return paths
    there = {_composed(str(path)): path for path in _images(folder, deep=True)}
    return [path if path.is_file() else there.get(_composed(str(path)), path) for path in paths]


def _hyperkvasir(root: Path, seed: int) -> Dataset | None:
    """labeled-images/…/{cecum,ileum,bbps-2-3} and segmented-images/{images,masks}.   [P:§4.1]

    The paper's subset is unpublished, so 1,600 / 500 normal and 1,000 abnormal images are drawn.
    """
    folders = [parent for parent, _, _ in walk(root)]
    normal = [p for f in folders if f.name in HYPERKVASIR_NORMAL for p in _images(f)]
    segmented = [f for f in folders if f.name == "images" and (f.parent / "masks").is_dir()]
    if not normal or not segmented:
        return None
    masks = _by_stem(p for f in segmented for p in _images(f.parent / "masks"))
    abnormal = [p for f in segmented for p in _images(f)]
    _refuse_orphans(masks.values(), {masks[stem(p)] for p in abnormal if stem(p) in masks})
    train, good, lesions = HYPERKVASIR_DRAW
    if len(normal) < train + good or len(abnormal) < lesions:
        raise ValueError(
            f"{root}: HyperKvasir needs {train + good} normal and {lesions} segmented images, "
            f"found {len(normal)} and {len(abnormal)}; unpack labeled-images and segmented-images"
        )
    rng = np.random.default_rng(seed)
    drawn = [normal[i] for i in rng.permutation(len(normal))[: train + good]]
    polyps = [abnormal[i] for i in sorted(rng.permutation(len(abnormal))[:lesions])]
    test = [Sample(path, 0, path.parent.name) for path in sorted(drawn[train:])]
    test += [Sample(path, 1, "polyp", masks.get(stem(path))) for path in polyps]
    return Dataset("HyperKvasir", root, tuple(sorted(drawn[:train])), tuple(test))


def _flat(root: Path, _seed: int) -> Dataset | None:
    """Images directly in the folder, all of them for training."""
    images = _images(root)
    return Dataset("one folder", root, tuple(images), ()) if images else None
