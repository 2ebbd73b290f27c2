"""Decoding and checking images and masks, and the cache of what was decoded.   [P:§4.1]

Which images there are is in layouts.py.

N images, S pixels a side. Images are uint8 (3, S, S) RGB, masks uint8 or bool (S, S), 1 = lesion.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.layouts import Dataset, Sample
from support.progress import progress

Files = tuple[Path, ...]  # what one row of a cache is read from: an image, or a mask and its image

MIN_SIZE = 32  # pixels a side asked for: one patch of the local encoder
MIN_SIDE = 8  # pixels of a file's shorter side: below that it is an icon, not an image
CACHE_VERSION = 1  # part of every cache's name; increase it when decoding changes


# --- single images -------------------------------------------------------------------------------


def _load(path: Path) -> Image.Image:
    """The first frame, decoded to its last byte and turned upright as EXIF says."""
    try:
        with Image.open(path) as image:
            image.load()  # a truncated file raises here
            upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # pillow's readers raise SyntaxError, struct.error, EOFError, …
        raise ValueError(f"{path}: {error}") from error
    if min(upright.size) < MIN_SIDE:
        w, h = upright.size
        raise ValueError(f"{path}: {w} x {h} pixels; the shorter side must have {MIN_SIDE}")
    return upright


def check_size(size: int) -> None:
    """raises: ValueError if images of `size` pixels a side are too small for the networks."""
    if size < MIN_SIZE:
        raise ValueError(f"image size {size}: must be at least {MIN_SIZE} pixels, a patch")


def _unit_range(values: np.ndarray, ranges: Sequence[int]) -> np.ndarray:
    """values / the smallest of `ranges` that holds the largest of them, in [0, 1]; float32."""
    values = np.nan_to_num(values.astype(np.float32))
    top = float(values.max())
    return np.clip(values / next((r for r in ranges if top <= r), top), 0, 1)


def _rgb(image: Image.Image, behind: str = "white") -> Image.Image:
    """8 bits of red, green and blue; transparent parts show the colour behind them."""
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits, always grey
        ranges = (1, 255, 4095, 65535) if image.mode == "F" else (255, 4095, 65535)
        grey = _unit_range(np.asarray(image), ranges)
        return Image.fromarray(np.round(255 * grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, behind), rgba).convert("RGB")
    return image.convert("RGB")


def read_image(path: str | Path, size: int) -> np.ndarray:
    """Read an image as a viewer shows it, resized to a square with antialiasing.

    Grey, palette and CMYK images become RGB; transparent parts show white, as on a page; EXIF
    orientation is applied; only the first of several frames is read. Files of more than 8 bits are
    scaled by their range: 8, 12 or 16 bits, the smallest that holds the largest value.

    path:    any file that pillow reads.
    size:    S, pixels a side, at least 32; a smaller image is enlarged.
    returns: uint8 (3, S, S).
    raises:  ValueError, naming the file, if it is no image, is truncated, or is under 8 pixels.
    """
    check_size(size)
    image = _rgb(_load(Path(path))).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def read_mask(path: str | Path, size: int, *, image: str | Path | None = None) -> np.ndarray:
    """Read a lesion mask: binarised at half of its range, then resized by nearest neighbour.

    The range is 1, 255 or 65535, the smallest that holds the largest value, so that masks of
    {0, 1} and {0, 255} both work; of a coloured mask the brightest channel is taken.

    size:    S, pixels a side.
    image:   the image that it belongs to, which must have the same size; None: not compared.
    returns: bool (S, S), True in the lesion.
    raises:  ValueError, naming the file, if it cannot be read, has another size than its image,
             or holds only values below half (class numbers such as 2).
    """
    check_size(size)
    mask = _load(Path(path))
    if image is not None:
        with Image.open(image) as other:  # the header only
            turned = other.getexif().get(0x0112, 1) >= 5  # EXIF orientation: width is height
            shape = other.size[::-1] if turned else other.size
        if mask.size != shape:
            (w, h), (iw, ih) = mask.size, shape
            raise ValueError(f"{path}: mask of {w} x {h} pixels for an image of {iw} x {ih}")
    if mask.mode in ("P", "CMYK") or mask.has_transparency_data:
        mask = _rgb(mask, "black")
    values = np.asarray(mask)
    values = values.max(axis=2) if values.ndim == 3 else values
    inside = _unit_range(values, (1, 255, 65535)) > 0.5 if values.any() else values > 0
    if values.any() and not inside.any():
        raise ValueError(f"{path}: no value above half, largest {values.max()}; write 0 and 255")
    small = Image.fromarray(inside.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(small).astype(bool)


# --- data sets -----------------------------------------------------------------------------------


def decode(
    paths: Sequence[Path], size: int, cache_dir: str | Path, *, skip_bad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Decode images once into a memory-map, so that an epoch reads memory and not JPEGs.

    The cache's name depends on S and on the list of files, with their sizes and times: when a file
    has changed, all are decoded again. The cache is written atomically.

    paths:    N images.
    size:     S, pixels a side.
    skip_bad: leave unreadable files out instead of raising.
    returns:  uint8 memory-map (K, 3, S, S), read-only, and the int64 (K,) indices into paths
              that it holds; K = N unless files were skipped.
    raises:   ValueError, naming every unreadable file, unless skip_bad and some are readable.
    """
    check_size(size)

    def read(files: Files) -> np.ndarray:
        return read_image(files[0], size)

    images, unreadable = _cached(
        [(path,) for path in paths],
        read,
        (3, size, size),
        Path(cache_dir),
        label="decoding images",
        skip_bad=skip_bad,
        zeros_for_unreadable=False,
    )
    return images, np.array([i for i in range(len(paths)) if i not in unreadable], dtype=np.int64)


def decode_masks(
    samples: Sequence[Sample], size: int, cache_dir: str | Path, *, skip_bad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the masks of N test images; a normal image has an empty mask, which is known.

    skip_bad: count an unreadable mask as unknown instead of raising.
    returns:  uint8 memory-map (N, S, S) of 0 and 1, read-only, and bool (N,): mask is known.
    raises:   ValueError, naming every mask that is unreadable or of another size than its image.
    """
    check_size(size)

    def read(files: Files) -> np.ndarray:
        if not files:
            return np.zeros((size, size), np.uint8)
        mask, image = files
        return read_mask(mask, size, image=image).astype(np.uint8)

    masks, unreadable = _cached(
        [(sample.mask, sample.path) if sample.mask else () for sample in samples],
        read,
        (size, size),
        Path(cache_dir),
        label="decoding masks",
        skip_bad=skip_bad,
        zeros_for_unreadable=True,
    )
    known = [
        (sample.label == 0 or sample.mask is not None) and i not in unreadable
        for i, sample in enumerate(samples)
    ]
    return masks, np.array(known, dtype=bool)


def decode_test(
    dataset: Dataset, size: int, cache_dir: str | Path, *, skip_bad: bool = False
) -> tuple[Dataset, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Decode the test images and their masks, one row for each sample.

    skip_bad: leave unreadable images out of the data set that is returned.
    returns:  dataset, images (N, 3, S, S), masks (N, S, S) and known (N,); the last two are None
              if no image has a mask.
    raises:   ValueError as `decode` and `decode_masks`, or if only one class is left.
    """
    paths = [sample.path for sample in dataset.test]
    images, kept = decode(paths, size, cache_dir, skip_bad=skip_bad)
    dataset = dataclasses.replace(dataset, test=tuple(dataset.test[i] for i in kept))
    dataset.check_test()
    if not dataset.has_masks:
        return dataset, images, None, None
    return dataset, images, *decode_masks(dataset.test, size, cache_dir, skip_bad=skip_bad)


# --- the cache: rows in a raw file, and a JSON file beside it once they are all there -------------


def _cached(
    rows: Sequence[Files],
    read: Callable[[Files], np.ndarray],
    shape: tuple[int, ...],
    folder: Path,
    *,
    label: str,
    skip_bad: bool,
    zeros_for_unreadable: bool,
) -> tuple[np.ndarray, dict[int, str]]:
    """read(files) of every row, from the cache if they are there.

    shape:   of a row.
    zeros_for_unreadable: such a row is zeros, instead of being left out.
    returns: uint8 memory-map (K, *shape), and the reason for each unreadable row.
    raises:  ValueError naming every unreadable file, unless skip_bad and some are readable.
    """
    if not rows:
        return np.empty((0, *shape), np.uint8), {}
    folder.mkdir(parents=True, exist_ok=True)
    stamps = [[_stamp(path) for path in files] for files in rows]
    content = json.dumps([CACHE_VERSION, shape, zeros_for_unreadable, stamps])
    name = hashlib.sha256(content.encode()).hexdigest()[:24]
    data, marker = folder / f"{name}.u8", folder / f"{name}.json"
    size = math.prod(shape)  # bytes of a row
    substitute = bytes(size) if zeros_for_unreadable else b""
    try:
        saved = json.loads(marker.read_text(encoding="utf-8"))
        unreadable = {int(row): reason for row, reason in saved.items()}
        missing = 0 if zeros_for_unreadable else len(unreadable)
        complete = data.stat().st_size == size * (len(rows) - missing)
    except (OSError, ValueError):  # not there, or cut short
        unreadable, complete = {}, False
    if not complete or (unreadable and not skip_bad):
        marker.unlink(missing_ok=True)
        unreadable = _write(rows, read, substitute, data, label=label, skip_bad=skip_bad)
        marker.write_text(json.dumps(unreadable), encoding="utf-8")
    return np.memmap(data, np.uint8, "r").reshape(-1, *shape), unreadable


def _stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, size and time."""
    try:
        stat = path.stat()
    except OSError:
        return os.path.abspath(path), -1, 0  # reported when it is read
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _write(
    rows: Sequence[Files],
    read: Callable[[Files], np.ndarray],
    substitute: bytes,
    target: Path,
    *,
    label: str,
    skip_bad: bool,
) -> dict[int, str]:
    """Write read(files) of every row to a partial file, then rename it to `target`.

    substitute: what is written for a row that is unreadable.
    returns:    the reason for each unreadable row.
    """
    _remove_abandoned(target.parent)
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    unreadable: dict[int, str] = {}
    try:
        # Plain writes: a full disk is then an OSError, where a memory-map would be a bus error.
        with open(part, "wb") as file:
            for i, row in enumerate(progress(_read_all(rows, read), len(rows), label)):
                if isinstance(row, str):
                    unreadable[i] = row
                file.write(substitute if isinstance(row, str) else row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        if unreadable and (not skip_bad or len(unreadable) == len(rows)):
            hint = "" if skip_bad else ". Repair or remove them, or go on without them: --skip-bad"
            reasons = "; ".join(unreadable.values())
            raise ValueError(
                f"{len(unreadable)} of {len(rows)} files cannot be used: {reasons}{hint}"
            )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return unreadable


def _read_all(
    rows: Sequence[Files], read: Callable[[Files], np.ndarray]
) -> Iterator[np.ndarray | str]:
    """read(files) of every row in order, or the reason why that failed; in several threads."""

    def attempt(files: Files) -> np.ndarray | str:
        try:
            return read(files)
        except (ValueError, OSError) as error:
            return str(error)

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # pillow decodes outside Python's lock
    try:
        for start in range(0, len(rows), 32):  # no more rows than that are held in memory
            yield from pool.map(attempt, rows[start : start + 32])
    finally:
        pool.shutdown(cancel_futures=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove partial files that a killed run has left: nobody has written to them for a minute."""
    for part in folder.glob("*.part-*"):
        if time.time() - part.stat().st_mtime > 60:
            part.unlink(missing_ok=True)
