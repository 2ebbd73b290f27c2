"""Decoding and checking images and masks.   [P:§4.1]

Which images there are is in layouts.py, the cache of what was decoded in cache.py.

N images, S pixels a side. Images are uint8 (3, S, S) RGB, masks uint8 or bool (S, S), 1 = lesion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from support import healthy
from support.cache import Files, cached
from support.folders import other_kind
from support.layouts import Dataset, Sample
from support.progress import notify
from support.run import open_regular

Window = tuple[float, float]  # the values that are shown black and white

MIN_SIZE = 32  # pixels a side asked for: one patch of the local encoder
MIN_SIDE = 8  # pixels of a file's shorter side: below that it is an icon, not an image


# --- single images -------------------------------------------------------------------------------


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file becomes a ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        what = other_kind(path) or " that Pillow reads"
        raise ValueError(f"{path}: not an image{what}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: of more than 178 million pixels; write a smaller one") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # pillow's readers raise SyntaxError, struct.error, EOFError, …
        raise ValueError(f"{path}: {error}") from error


def _check_side(path: Path, size: tuple[int, int]) -> None:
    if min(size) < MIN_SIDE:
        w, h = size
        raise ValueError(f"{path}: {w} x {h} pixels; the shorter side needs {MIN_SIDE} or more")


def check_header(path: Path) -> None:
    """raises: ValueError, naming the file, if its beginning is that of no image, or of a tiny one.

    What a truncated file lacks shows only when it is decoded.
    """
    with _named_errors(path), open_regular(path) as file, Image.open(file) as image:
        size = image.size
    _check_side(path, size)


def _load(path: Path) -> Image.Image:
    """The first frame, decoded to its last byte and turned upright as EXIF says."""
    with _named_errors(path), open_regular(path) as file:
        image: Any = Image.open(file)
        image.load()  # a truncated file raises here
        upright: Image.Image = ImageOps.exif_transpose(image)
    _check_side(path, upright.size)
    return upright


def check_size(size: int) -> None:
    """raises: ValueError if images of `size` pixels a side are too small for the networks."""
    if size < MIN_SIZE:
        raise ValueError(f"image size {size}: must be at least {MIN_SIZE} pixels, a patch")


def is_deep(image: Image.Image) -> bool:
    """Whether it holds more than 8 bits, always in one channel."""
    return image.mode == "F" or image.mode.startswith("I")


def is_deep_file(path: Path) -> bool:
    """The same of a file; False for one that cannot be read, which is reported when decoded."""
    try:
        with _named_errors(path), open_regular(path) as file, Image.open(file) as image:
            return is_deep(image)
    except ValueError:
        return False


def extremes(path: Path) -> tuple[float, float, bool] | None:
    """The least and largest value of an image of more than 8 bits, and whether they are floats.

    returns: None for one that cannot be read; (-inf, inf) if a value is infinite or NaN.
    """
    try:
        loaded = _load(path)
    except ValueError:
        return None
    values = np.asarray(loaded, np.float64)
    whole = bool(np.isfinite(values).all())
    least, most = float(values.min()), float(values.max())
    return (least, most, loaded.mode == "F") if whole else (-math.inf, math.inf, True)


def window_of(high: float, floating: bool) -> Window:
    """Black and white of a set of more than 8 bits: 0 and the top of the range that holds it."""
    ranges = (1, 255, 4095, 65535) if floating else (255, 4095, 65535)
    return 0.0, next((float(r) for r in ranges if high <= r), high)


def _rgb(image: Image.Image, behind: str = "white", window: Window | None = None) -> Image.Image:
    """8 bits of red, green and blue; transparent parts show the colour behind them.

    raises: ValueError for values that only a window gives a meaning to.
    """
    if is_deep(image):
        values = np.asarray(image, np.float64)
        if window is None:
            if not np.isfinite(values).all() or values.min() < 0:
                raise ValueError("holds negative, infinite or NaN values: --window LOW,HIGH")
            window = window_of(float(values.max()), image.mode == "F")
        low, high = window
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        grey = np.clip((values - low) / (high - low), 0, 1)
        return Image.fromarray(np.round(255 * grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, behind), rgba).convert("RGB")
    return image.convert("RGB")


def read_image(path: str | Path, size: int, window: Window | None = None) -> np.ndarray:
    """Read an image as a viewer shows it, resized to a square with antialiasing.

    Grey, palette and CMYK images become RGB; transparent parts show white, as on a page; EXIF
    orientation is applied; only the first of several frames is read.

    path:    any file that pillow reads.
    size:    S, pixels a side, at least 32; a smaller image is enlarged.
    window:  values of black and white in files of more than 8 bits. None: 0 and the top of 8, 12
             or 16 bits, the smallest that holds the file's largest value; a set of files needs one
             window for all, or a single pixel sets an image's brightness (support/depth.py).
    returns: uint8 (3, S, S).
    raises:  ValueError, naming the file, if it is no image, is truncated, is under 8 pixels, or
             holds negative, infinite or NaN values and there is no window.
    """
    return read_both(path, size, window)[0]


def read_both(
    path: str | Path, size: int, window: Window | None = None
) -> tuple[np.ndarray, Image.Image]:
    """What `read_image` returns or raises, and the image at its own size, 8 bits of RGB."""
    check_size(size)
    loaded = _load(Path(path))
    try:
        original = _rgb(loaded, window=window)
        image = original.resize((size, size), Image.Resampling.BILINEAR)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), original


def read_mask(path: str | Path, size: int, *, image: str | Path | None = None) -> np.ndarray:
    """Read a lesion mask: cut at half of its range, resized by nearest neighbour.   [P!§4.1 R30]

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
        with open_regular(image) as file, Image.open(file) as other:  # the header only
            turned = other.getexif().get(0x0112, 1) >= 5  # EXIF orientation: width is height
            shape = other.size[::-1] if turned else other.size
        if mask.size != shape:
            (w, h), (iw, ih) = mask.size, shape
            raise ValueError(f"{path}: mask of {w} x {h} pixels for an image of {iw} x {ih}")
    if mask.mode in ("P", "CMYK") or mask.has_transparency_data:
        mask = _rgb(mask, "black")
    values = np.asarray(mask)
    values = values.max(axis=2) if values.ndim == 3 else values
    known = np.nan_to_num(values.astype(np.float32))
    top = next((r for r in (1, 255, 65535) if known.max() <= r), known.max())
    inside = known / top > 0.5
    if values.any() and not inside.any():
        raise ValueError(f"{path}: no value above half, largest {values.max()}; write 0 and 255")
    small = Image.fromarray(inside.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(small).astype(bool)


LEFT_OUT_SHOWN = 20  # lines on the screen


def tell(reasons: Sequence[str], where: str) -> None:
    """Print what --skip-bad leaves out.   where: the whole list is to be found."""
    for reason in reasons[:LEFT_OUT_SHOWN]:
        notify(f"left out: {' '.join(reason.split())[:300]}")
    if len(reasons) > LEFT_OUT_SHOWN:
        notify(f"and {len(reasons) - LEFT_OUT_SHOWN} more; {where}")


def _tell(unreadable: dict[int, str], left_out: list[str] | None) -> None:
    """Print the reasons, and append them to `left_out`."""
    tell(list(unreadable.values()), "the report.html of a run names all of them")
    if left_out is not None:
        left_out += [f"left out: {reason}" for reason in unreadable.values()]


# --- data sets -----------------------------------------------------------------------------------


def decode(
    paths: Sequence[Path],
    size: int,
    cache_dir: str | Path,
    *,
    skip_bad: bool = False,
    window: Window | None = None,
    left_out: list[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode images once into a memory-map, so that an epoch reads memory and not JPEGs.

    The cache's name depends on S and on the list of files, with their sizes and times: when a file
    has changed, all are decoded again. The cache is written atomically.

    paths:    N images.
    size:     S, pixels a side.
    skip_bad: leave unreadable files out instead of raising.
    window:   as in `read_image`.
    left_out: receives a line for each of them.
    returns:  uint8 memory-map (K, 3, S, S), read-only, and the int64 (K,) indices into paths
              that it holds; K = N unless files were skipped.
    raises:   ValueError, naming every unreadable file, unless skip_bad and some are readable.
    """
    check_size(size)
    images, unreadable = cached(
        [(path,) for path in paths], lambda files: read_image(files[0], size, window),
        (3, size, size), Path(cache_dir), label="decoding images", skip_bad=skip_bad,
        zeros_for_unreadable=False, key=window,
    )  # fmt: skip
    _tell(unreadable, left_out)
    return images, np.array([i for i in range(len(paths)) if i not in unreadable], dtype=np.int64)


def decode_train(
    paths: Sequence[Path], share: float, size: int, cache_dir: str | Path, **how: Any
) -> tuple[tuple[Path, ...], np.ndarray, np.ndarray]:
    """Decode the healthy images: those that train, and those that --healthy-share holds out.

    how:     as `decode` takes them.
    returns: the files that train, images (N, 3, S, S), and held-out images (H, 3, S, S).
    """
    fit, others = healthy.split(paths, share)
    images, kept = decode([*fit, *others], size, cache_dir, **how)
    count = int((kept < len(fit)).sum())  # of those that train: the first ones
    return tuple(fit[i] for i in kept[:count]), images[:count], images[count:]


def decode_masks(
    samples: Sequence[Sample],
    size: int,
    cache_dir: str | Path,
    *,
    skip_bad: bool = False,
    left_out: list[str] | None = None,
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

    masks, unreadable = cached(
        [(sample.mask, sample.path) if sample.mask else () for sample in samples], read,
        (size, size), Path(cache_dir), label="decoding masks", skip_bad=skip_bad,
        zeros_for_unreadable=True,
    )  # fmt: skip
    _tell(unreadable, left_out)
    known = [
        (sample.label == 0 or sample.mask is not None) and i not in unreadable
        for i, sample in enumerate(samples)
    ]
    return masks, np.array(known, dtype=bool)


def decode_test(
    dataset: Dataset,
    size: int,
    cache_dir: str | Path,
    *,
    skip_bad: bool = False,
    window: Window | None = None,
    left_out: list[str] | None = None,
) -> tuple[Dataset, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Decode the test images and their masks, one row for each sample.

    skip_bad: leave unreadable images out of the data set that is returned.
    returns:  dataset, images (N, 3, S, S), masks (N, S, S) and known (N,); the last two are None
              if no image has a mask.
    raises:   ValueError as `decode` and `decode_masks`, or if only one class is left.
    """
    paths = [sample.path for sample in dataset.test]
    how: dict[str, Any] = {"skip_bad": skip_bad, "left_out": left_out}
    images, kept = decode(paths, size, cache_dir, window=window, **how)
    dataset = dataclasses.replace(dataset, test=tuple(dataset.test[i] for i in kept))
    dataset.check_test()
    if not dataset.has_masks:
        return dataset, images, None, None
    masks, known = decode_masks(dataset.test, size, cache_dir, **how)
    return dataset, images, masks, known


# --- on a GPU ------------------------------------------------------------------------------------

RESIDENT = 0.25  # of a GPU's free memory: images that fit into so much stay there
PART = 2**28  # bytes moved at a time


def resident(images: np.ndarray | torch.Tensor, device: torch.device) -> np.ndarray | torch.Tensor:
    """The images on the GPU if they fit into a quarter of its free memory; else as they are.

    images:  (N, 3, S, S) uint8, perhaps a memory-map, or there already.   returns: the same, uint8.
    """
    if device.type == "cpu" or isinstance(images, torch.Tensor):
        return images
    if images.nbytes > RESIDENT * torch.cuda.mem_get_info(device)[0]:
        return images
    there = torch.empty(images.shape, dtype=torch.uint8, device=device)
    step = max(1, PART // max(1, images[0].nbytes))
    for k in range(0, len(images), step):
        there[k : k + step] = torch.from_numpy(np.array(images[k : k + step]))
    return there
