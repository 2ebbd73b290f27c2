"""Decoding and checking images and masks, and the cache of what was decoded.

PMSACL: Tian et al., "Self-supervised Pseudo Multi-class Pre-training for Unsupervised Anomaly
Detection and Segmentation in Medical Images", section 4.1 (data sets). Which images there are is in
layouts.py, and everything that needs torch is elsewhere: this module needs numpy and pillow only.

N images, S pixels a side. Images are uint8 (3, S, S) RGB, masks uint8 or bool (S, S), 1 = lesion.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.layouts import Dataset, Sample

T = TypeVar("T")

MIN_SIZE = 32  # pixels a side asked for: one patch of the local encoder
MIN_SIDE = 8  # pixels of a file's shorter side: under that it is an icon, not an image
LINE_EVERY = 10.0  # seconds between progress lines where stderr is no terminal
CACHE_VERSION = 1  # part of every cache key; raise it when decoding changes

# --------------------------------------------------------------------------- single images


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

    Grey, palette and CMYK become RGB; transparent parts show white, as on a page; EXIF
    orientation is applied; of several frames the first counts. Files of more than 8 bits are
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
    """Read a lesion mask: binarised at half of its range, then resized to nearest neighbours.

    The range is 1, 255 or 65535, the smallest that holds the largest value, so that masks of
    {0, 1} and {0, 255} both work; a coloured mask counts by its brightest channel.

    size:    S, pixels a side.
    image:   the image it belongs to, if the two sizes are to be compared.
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


# -------------------------------------------------------------------------------- decoding


def decode(
    paths: Sequence[Path], size: int, cache_dir: str | Path, *, skip_bad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Decode images once into a memory-map, so that an epoch reads memory and not JPEGs.

    The cache is keyed by the list of files with sizes and times and by S: a changed file is
    decoded again. It appears when complete; an interrupted call leaves nothing to be reused.

    paths:    N images.
    size:     S, pixels a side.
    skip_bad: leave unreadable files out instead of raising.
    returns:  uint8 memory-map (K, 3, S, S), read-only, and the int64 (K,) indices into paths
              that it holds; K = N unless files were skipped.
    raises:   ValueError, naming every unreadable file, unless skip_bad and some are readable.
    """
    check_size(size)
    images, bad = _cached(
        [(p,) for p in paths],
        lambda key: read_image(key[0], size),
        (3, size, size),
        cache_dir,
        label="decoding images",
        skip_bad=skip_bad,
    )
    return images, np.array([i for i in range(len(paths)) if i not in bad], dtype=np.int64)


def decode_masks(
    samples: Sequence[Sample], size: int, cache_dir: str | Path, *, skip_bad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the masks of N test images; a normal image has an empty mask, which is known.

    skip_bad: count an unreadable mask as unknown instead of raising.
    returns:  uint8 memory-map (N, S, S) of 0 and 1, read-only, and bool (N,): mask is known.
    raises:   ValueError, naming every mask that is unreadable or of another size than its image.
    """
    check_size(size)
    keys = [(s.mask, s.path) if s.mask else () for s in samples]

    def read(key: tuple[Path, ...]) -> np.ndarray:
        if not key:
            return np.zeros((size, size), np.uint8)
        return read_mask(key[0], size, image=key[1]).astype(np.uint8)

    masks, bad = _cached(
        keys, read, (size, size), cache_dir, label="decoding masks", skip_bad=skip_bad, blank=True
    )
    known = [(s.label == 0 or s.mask is not None) and i not in bad for i, s in enumerate(samples)]
    return masks, np.array(known, dtype=bool)


def decode_test(
    dataset: Dataset, size: int, cache_dir: str | Path, *, skip_bad: bool = False
) -> tuple[Dataset, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The test split: what `decode` and `decode_masks` make of it, one row a sample.

    skip_bad: leave unreadable images out of the data set that is returned.
    returns:  dataset, images (N, 3, S, S), masks (N, S, S) and known (N,), or None where no
              image has a mask.
    raises:   ValueError as both, or if only one class is left.
    """
    paths = [sample.path for sample in dataset.test]
    images, kept = decode(paths, size, cache_dir, skip_bad=skip_bad)
    dataset = dataclasses.replace(dataset, test=tuple(dataset.test[i] for i in kept))
    dataset.check_test()
    if not dataset.has_masks:
        return dataset, images, None, None
    return dataset, images, *decode_masks(dataset.test, size, cache_dir, skip_bad=skip_bad)


def _cached(
    keys: Sequence[tuple[Path, ...]],
    read: Callable[[tuple[Path, ...]], np.ndarray],
    shape: tuple[int, ...],
    cache_dir: str | Path,
    *,
    label: str,
    skip_bad: bool,
    blank: bool = False,
) -> tuple[np.ndarray, dict[int, str]]:
    """The rows read(key), in order, from a raw file beside a JSON file that marks it complete.

    blank:   keep a row of zeros for an unreadable key instead of leaving the row out.
    returns: uint8 memory-map (rows, *shape) and the reason for each unreadable index.
    """
    if not keys:
        return np.empty((0, *shape), np.uint8), {}
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = json.dumps([CACHE_VERSION, shape, blank, [[_stamp(p) for p in key] for key in keys]])
    name = hashlib.sha256(stamp.encode()).hexdigest()[:24]
    data, done = folder / f"{name}.u8", folder / f"{name}.json"
    bad = _complete(data, done, len(keys), math.prod(shape), blank)
    if bad is None or (bad and not skip_bad):
        done.unlink(missing_ok=True)
        bad = _write_rows(keys, read, shape, data, label, blank)
        if bad and (not skip_bad or len(bad) == len(keys)):
            data.unlink()
            hint = "" if skip_bad else ". Repair or remove them, or go on without them: --skip-bad"
            why = "; ".join(bad.values())
            raise ValueError(f"{len(bad)} of {len(keys)} files cannot be used: {why}{hint}")
        done.write_text(json.dumps(bad), encoding="utf-8")  # cut short it is no JSON: not complete
    rows = len(keys) if blank else len(keys) - len(bad)
    return np.memmap(data, np.uint8, "r", shape=(rows, *shape)), bad


def _complete(
    data: Path, done: Path, count: int, row_bytes: int, blank: bool
) -> dict[int, str] | None:
    """The unreadable indices of a complete cache, None if there is none to use."""
    try:
        bad = {int(i): why for i, why in json.loads(done.read_text(encoding="utf-8")).items()}
        whole = data.stat().st_size == row_bytes * (count if blank else count - len(bad))
    except (OSError, ValueError):
        return None
    return bad if whole else None


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return os.path.abspath(path), -1, 0  # reported when it is read
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _write_rows(
    keys: Sequence[tuple[Path, ...]],
    read: Callable[[tuple[Path, ...]], np.ndarray],
    shape: tuple[int, ...],
    target: Path,
    label: str,
    blank: bool,
) -> dict[int, str]:
    """Write the rows to a partial file and rename it; pillow decodes outside Python's lock."""

    def attempt(key: tuple[Path, ...]) -> np.ndarray | str:
        try:
            return read(key)
        except (ValueError, OSError) as error:
            return str(error)

    for old in target.parent.glob("*.part-*"):
        if time.time() - old.stat().st_mtime > 60:  # left by a killed run: nobody writes to it
            old.unlink(missing_ok=True)
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    bad: dict[int, str] = {}
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # Plain writes: a full disk is then an OSError, where a memory-map would be a bus error.
        with open(part, "wb") as file:
            chunks = (keys[i : i + 32] for i in range(0, len(keys), 32))
            rows = (row for chunk in chunks for row in pool.map(attempt, chunk))
            for i, row in enumerate(progress(rows, len(keys), label)):
                if isinstance(row, str):
                    bad[i] = row
                    row = np.zeros(shape if blank else (0,), np.uint8)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        pool.shutdown(cancel_futures=True)
        part.unlink(missing_ok=True)
    return bad


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Pass items on and show on stderr how many are done and the time left.

    On a terminal one line is rewritten in place; elsewhere a line is printed now and then, and a
    last one if the whole took at least a second.
    """
    file = sys.stderr
    start = shown = time.monotonic()
    live, done, width = file.isatty(), 0, 0
    try:
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - shown >= (0.1 if live else LINE_EVERY) and done < total:
                left = (now - start) / done * (total - done)
                line = f"{label} {done}/{total}, {_clock(left)} left"
                print(f"\r{line:<{width}}" if live else line, end="" if live else "\n", file=file)
                file.flush()
                shown, width = now, len(line)
    finally:
        took = time.monotonic() - start
        line = f"{label} {done}/{total} in {_clock(took)}"
        if live or took >= 1:
            print(f"\r{line:<{width}}" if live else line, file=file, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
