"""The cache of decoded images: a raw file of rows, and a JSON file next to it once it is complete.

The JSON file holds the reason for each row that is unreadable, and the raw file's checksum.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from support.progress import notify, ours_alone, progress
from support.run import naming, write_file

T = TypeVar("T")
U = TypeVar("U")

Files = tuple[Path, ...]  # what one row of a cache is read from: an image, or a mask and its image

SHOWN = 10  # files in a complaint
THREADS = min(8, os.cpu_count() or 1)
AHEAD = 32  # files that are read before they are needed; no more are held in memory
CHUNK = 2**24  # bytes that are checked at once
CACHE_VERSION = 2  # part of every cache's name; increase it when decoding changes


def cached(
    rows: Sequence[Files],
    read: Callable[[Files], np.ndarray],
    shape: tuple[int, ...],
    folder: Path,
    *,
    label: str,
    skip_bad: bool,
    zeros_for_unreadable: bool,
    key: Any = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """read(files) of every row, from the cache if they are there and their checksum is right.

    shape:   of a row.   key: what else the rows depend on.
    zeros_for_unreadable: such a row is zeros, instead of being left out.
    returns: uint8 memory-map (K, *shape), and the reason for each unreadable row.
    raises:  ValueError naming every unreadable file, unless skip_bad and some are readable.
    """
    if not rows:
        return np.empty((0, *shape), np.uint8), {}
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    stamps = [[stamp(path) for path in files] for files in rows]
    content = json.dumps([CACHE_VERSION, shape, zeros_for_unreadable, stamps, key])
    name = hashlib.sha256(content.encode()).hexdigest()[:24]
    data, marker = folder / f"{name}.u8", folder / f"{name}.json"
    size = math.prod(shape)  # bytes of a row
    substitute = bytes(size) if zeros_for_unreadable else b""
    unreadable = _complete(data, marker, len(rows), size, len(substitute))
    if unreadable is None or (unreadable and not skip_bad):
        marker.unlink(missing_ok=True)
        unreadable, crc = _write(rows, read, substitute, data, label=label, skip_bad=skip_bad)
        saved = {"unreadable": unreadable, "crc32": crc}
        write_file(marker, json.dumps(saved).encode())
    return np.memmap(data, np.uint8, "r").reshape(-1, *shape), unreadable


def _complete(data: Path, marker: Path, rows: int, size: int, substitute: int) -> dict | None:
    """The reason for each unreadable row of a cache; None if it is not there, or damaged.

    size, substitute: bytes of a row, and of an unreadable one.
    """
    try:
        saved = json.loads(marker.read_bytes())
        unreadable = {int(row): str(reason) for row, reason in saved["unreadable"].items()}
        wanted = int(saved["crc32"])
        length = size * (rows - len(unreadable)) + substitute * len(unreadable)
        whole = 0 < length == data.stat().st_size
        if not (whole and all(0 <= row < rows for row in unreadable)):
            return None
        chunks = range(0, length, CHUNK)
        crc = 0
        with open(data, "rb") as file:
            for _ in progress(chunks, len(chunks), "checking the decoded images"):
                crc = zlib.crc32(file.read(CHUNK), crc)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if crc != wanted:
        notify(f"{data}: its content has changed; decoding again")
        return None
    return unreadable


def stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, size and time."""
    try:
        stat = path.stat()
    except OSError:
        return os.path.abspath(path), -1, 0  # reported when it is read
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def digest(paths: Iterable[Path], root: Path) -> str:
    """Of the files' names below root, and of their sizes."""
    names = [(os.path.relpath(path, root), stamp(path)[1]) for path in paths]
    return hashlib.sha256(repr(sorted(names)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _write(
    rows: Sequence[Files],
    read: Callable[[Files], np.ndarray],
    substitute: bytes,
    target: Path,
    *,
    label: str,
    skip_bad: bool,
) -> tuple[dict[int, str], int]:
    """Write read(files) of every row to a partial file, then rename it to `target`.

    substitute: what is written for a row that is unreadable.
    returns:    the reason for each unreadable row, and the file's CRC-32.
    """
    part = target.with_name(f"{target.name}.part-{platform.node()}-{os.getpid()}")
    unreadable: dict[int, str] = {}
    crc = 0
    try:
        # Plain writes: a full disk is then an OSError, where a memory-map would be a bus error.
        with naming(target), open(part, "wb") as file, ours_alone():
            read_ahead = progress(ahead(functools.partial(attempt, read), rows), len(rows), label)
            for i, (_, row) in enumerate(read_ahead):
                if isinstance(row, str):
                    unreadable[i] = row
                content = substitute if isinstance(row, str) else row.tobytes()
                crc = zlib.crc32(content, crc)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if unreadable and (not skip_bad or len(unreadable) == len(rows)):
            raise ValueError(complaint(list(unreadable.values()), len(rows), skip_bad))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return unreadable, crc


def complaint(reasons: Sequence[str], total: int, skip_bad: bool) -> str:
    """What to say of files that cannot be used.   reasons: one for each, of `total` files."""
    hint = "" if skip_bad else ". Repair or remove them, or go on without them: --skip-bad"
    text = "; ".join(reasons[:SHOWN])
    if len(reasons) > SHOWN:
        text += f"; and {len(reasons) - SHOWN} more"
    return f"{len(reasons)} of {total} files cannot be used: {text}{hint}"


def attempt(work: Callable[[T], U], item: T) -> U | str:
    """What `work` returns, or why it failed."""
    try:
        return work(item)
    except (ValueError, OSError) as error:
        return str(error)


def ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[tuple[T, U]]:
    """Each item with what `work` returns for it, in order; threads do AHEAD of them beforehand.

    What was taken is worked on to its end, also when the caller stops.
    """
    waiting: deque[tuple[T, Future[U]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:  # pillow decodes outside Python's lock
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > AHEAD:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()


def _remove_abandoned(folder: Path) -> None:
    """Remove partial files that nobody has written to for a minute: a killed run has left them."""
    for part in folder.glob("*.part-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 60:
                part.unlink()
