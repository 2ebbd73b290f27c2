"""What lies in a folder: images, by their endings, and images of kinds that are not read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from support.progress import notify

EXTENSIONS = set(".png .jpg .jpeg .jpe .jfif .bmp .tif .tiff .webp .gif .ppm .pgm .jp2".split())
SHOWN = 5  # names in a message
MOST_FOLDERS = 20_000  # of a data set; more are somebody's whole disk
CONVERT = {  # what is no picture yet -> how to make one
    "DICOM": ({".dcm", ".dicom", ".ima"}, "pydicom's pixel_array, or dcm2img of DCMTK"),
    "NIfTI": ({".nii"}, "nibabel's get_fdata, slice by slice"),
    "volume": ({".mha", ".mhd", ".nrrd"}, "SimpleITK's GetArrayFromImage, slice by slice"),
    "NumPy": ({".npy", ".npz"}, "PIL.Image.fromarray(...).save"),
    "HEIC": ({".heic", ".heif"}, "any photo program"),
}


def walk(
    root: Path, failed: Callable[[OSError], None] | None = None, *, most: int = MOST_FOLDERS
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """os.walk in order of names, through links; nothing hidden, no folder twice, none above root.

    failed: receives the error of each folder that cannot be read.
    raises: ValueError if there are more than `most` folders.
    """
    above = [parent.stat() for parent in Path(root).resolve().parents]
    seen = {(place.st_dev, place.st_ino) for place in above}
    entered = 0
    began, notified = time.monotonic(), False
    for parent, folders, files in os.walk(root, onerror=failed, followlinks=True):
        try:
            place = os.stat(parent)
        except OSError:
            folders.clear()
            continue
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        entered += 1
        if entered > most:
            raise ValueError(f"{root}: more than {most:,} folders; name the data set's own folder")
        if not notified and time.monotonic() - began > 2:
            notify(f"looking through the folders below {root}")
            notified = True
        folders[:] = sorted(filter(visible, folders))
        yield Path(parent), folders, [*filter(visible, files)]


def refuse(error: OSError) -> NoReturn:
    """For `walk`: a folder that cannot be read ends it."""
    raise ValueError(f"{error.filename}: this folder cannot be read ({error.strerror})") from None


def named(names: Iterable[Any]) -> str:
    """The first names of a list, for a message, and how many more there are."""
    words = [str(name) for name in names]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def how_to_convert(root: Path) -> str:
    """A sentence for the files below a folder that hold images of a kind that is not read."""
    text = ""
    names = [name for _, _, files in walk(root) for name in files]
    for kind, (of_kind, how) in CONVERT.items():
        if count := sum(_ending(name) in of_kind for name in names):
            text += f"{count} {kind} files are not read: write PNG files first, by {how}. "
    return text


def other_kind(path: Path) -> str:
    """What to say of a file that pillow does not know, if its ending says what it is."""
    for kind, (of_kind, how) in CONVERT.items():
        if _ending(path.name) in of_kind:
            return f" but {kind}: write a PNG file first, by {how}"
    return ""


def _ending(name: str) -> str:
    """ ".nii" of a.nii.gz, too."""
    return Path(name.lower().removesuffix(".gz")).suffix
