"""What the screen shows of work under way: one line of progress, and one format for durations."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO, TypeVar

from support.run import keep_freed_memory, one_line, ranks, short_of_memory

T = TypeVar("T")

LINE_EVERY = 30.0  # seconds between progress lines where stderr is no terminal
REFRESH_EVERY = 0.1  # seconds between progress lines on a terminal, where each replaces the last
unwritten: list[str] = []  # why results are not on stdout; said when all else is done
CLEAR_LINE = "\r\x1b[K"  # of a terminal, from its start


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s' or '2 h 05 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def notify(text: str) -> None:
    """Print a line on stderr, from the first process only."""
    _write(text, "\n")


def complain(program: str, error: object) -> int:
    """Print in one line why a program ends, from any process; its exit status, 2.

    raises: the error again if it is neither the user's nor the machine's.
    """
    if isinstance(error, MemoryError | RuntimeError):
        if short_of_memory(error):
            error = "out of memory: lower --batch-size or --image-size"
        elif ranks()[1] > 1:
            error = f"another process of this run has ended or cannot be reached ({error!s:.200})"
        else:
            raise error
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    _print(clear + one_line(program, error), "", sys.stderr)
    return 2


def as_program(main: Callable[[], int]) -> int:
    """The exit status of a program's `main`, without the warnings of libraries.

    Names that the terminal cannot show are written with escapes. -W and PYTHONWARNINGS bring the
    warnings back. Freed memory is kept (`keep_freed_memory`).
    """
    keep_freed_memory()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None where the shell has closed it
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = main()
    show("")  # flushes: a closed pipe is noticed here and not by the interpreter
    return complain(Path(sys.argv[0]).name, unwritten[0]) if unwritten else status


@contextlib.contextmanager
def ours_alone() -> Iterator[None]:
    """Discard what libraries in C, such as libtiff, write to the screen while the block runs."""
    try:
        real = sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # somebody else's stream
        real = False
    if not real:
        yield
        return
    old, kept = sys.stderr, os.dup(2)
    sys.stderr = open(kept, "w", encoding=old.encoding, errors=old.errors, closefd=False)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        sys.stderr.close()
        sys.stderr = old
        os.close(silent)
        os.close(kept)


def show(text: str) -> None:
    """Print text on stdout; a closed pipe, as with `| head -1`, does not end a run."""
    if text and sys.stderr.isatty() and sys.stdout.isatty():
        _write("", "")  # clears the line of progress
    _print(text, "", sys.stdout)


def _write(text: str, end: str) -> None:
    """On a terminal the text replaces a progress line that was left without an end."""
    if ranks()[0] > 0:
        return
    if sys.stderr.isatty():
        if not end:  # a line that is wrapped could not be replaced
            text = text[: shutil.get_terminal_size().columns - 1]
        text = CLEAR_LINE + text
    _print(text, end, sys.stderr)


def _print(text: str, end: str, stream: TextIO) -> None:
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:  # its reader has gone, its disk is full
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, stream.fileno())  # or the interpreter complains when it ends
        os.close(silent)
        if error.errno == errno.ENOSPC and stream is sys.stdout:  # results, not progress
            unwritten.append(f"stdout: {error.strerror}")


def size_of(count: float) -> str:
    """'3.2 GB' of bytes."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {units[power]}"


class _Line:
    """A line of progress: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self) -> None:
        self.shown = time.monotonic()

    def show(self, text: str, now: float, *, always: bool = False) -> None:
        """Show the text if it is time for it, or `always`."""
        terminal = sys.stderr.isatty()
        if always or now - self.shown >= (REFRESH_EVERY if terminal else LINE_EVERY):
            _write(text, "" if terminal else "\n")
            self.shown = now


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Pass items on, and show how many of `total` are done and the time left.

    A last line says how long all of them took; where stderr is no terminal, only if that was a
    second or more.
    """
    line, done = _Line(), 0
    start = line.shown
    try:
        for item in items:
            yield item
            done += 1
            if done < total:
                now = time.monotonic()
                left = (now - start) / done * (total - done)
                line.show(f"{label} {done}/{total}, {duration(left)} left", now)
    finally:
        took = time.monotonic() - start
        if sys.stderr.isatty() or took >= 1:
            notify(f"{label} {done}/{total} in {duration(took)}")


class Meter:
    """Progress of a training: where it is, its losses, its speed and the time left.

    done, total: steps before this process, and in all.
    images:      of one step, over all ranks.
    """

    def __init__(self, done: int, total: int, images: int) -> None:
        self.total, self.images = total, images
        self.rate = float("nan")  # images a second, from the second step of this process on
        self.first = done + 1
        self.line = _Line()
        self.began = self.line.shown

    def show(self, step: int, where: str, numbers: Mapping[str, float], *, last: bool) -> None:
        """After step number `step`; `last` closes an epoch, whose line is always shown."""
        now = time.monotonic()
        if step <= self.first:  # the first step fills caches and would spoil the estimate
            self.began = now
            return
        per_step = (now - self.began) / (step - self.first)
        self.rate = self.images / per_step
        left = per_step * (self.total - step)
        if step == self.first + 3:
            notify(f"{self.total} steps, about {duration(left)}")
        values = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        speed = f"{self.rate:.0f} images/s" if self.rate >= 1 else f"{per_step:.0f} s a step"
        text = f"{where}  {values}  {speed}  {duration(left)} left"
        if step == self.total:
            notify(text)
        else:
            self.line.show(text, now, always=last)
