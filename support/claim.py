"""A run's folder belongs to one process; signals that end a run at the end of a step.

A folder is held by run.lock: the system's lock on that file, which goes with the process whatever
ends it, and the file's text, which says who holds it. Where the system has no such locks (Windows,
some network disks), and for other hosts, the text alone counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from support.progress import notify
from support.run import from_first_process, make_folder, patient, ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

LOCK = "run.lock"
# In a folder without a run.
NOT_BEGUN = {"cache", "phantom", ".phantom.part", LOCK, "config.json.partial"}
# What a run writes into its folder; nothing with other names, or older, is ever removed.
OURS = (
    "cache", "phantom", ".phantom.part", "figures", "config.json", "results.json", "results.md",
    "scores.csv", "report.html", "log*.csv", "checkpoint*.pt", "encoder*.pt", "detector*.pt",
    "eval-*",
)  # fmt: skip


# --- the lock ------------------------------------------------------------------------------------


def _self() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node()}


def holder(path: Path) -> dict[str, Any]:
    """Who wrote a lock; {} if nobody did, or the text is cut short."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Claim:
    """A run's folder, made or taken over by this process, and held until `release`.

    raises: ValueError if another process holds the folder or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, folder / LOCK
        self.made = not folder.exists()
        make_folder(folder)
        try:
            self.file = self._hold()
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{folder}: cannot be written to ({reason})") from None
        self.before = set(os.listdir(folder)) - {LOCK}
        for partial in folder.glob("*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)

    def _hold(self) -> int:
        """Lock run.lock; a file that its last holder removed meanwhile is not the one."""
        while True:
            file = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
            locked, owner = _system_lock(file), holder(self.lock)
            stale = locked and owner.get("host") == platform.node()  # it was killed
            if locked is False or (owner and not stale):
                os.close(file)
                raise ValueError(self._refusal(owner, locked is False))
            try:
                same = os.path.samestat(os.fstat(file), os.stat(self.lock))
            except FileNotFoundError:
                same = False
            if same:
                os.ftruncate(file, 0)
                os.write(file, json.dumps(_self()).encode())
                return file
            os.close(file)

    def _refusal(self, owner: dict[str, Any], runs: bool) -> str:
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
        if runs:
            return f"{self.folder} belongs to {who}, which is running; wait for it, or name another"
        return f"{self.folder} belongs to {who}; if that has ended, delete {self.lock}"

    def clear(self) -> None:
        """Remove what this process has put into the folder, and the folder if it made it."""
        ours = {path for pattern in OURS for path in self.folder.glob(pattern)}
        for path in ours - {self.folder / name for name in self.before}:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the folder up, and remove it if this process made it and left nothing there."""
        with contextlib.suppress(OSError):
            self.lock.unlink(missing_ok=True)
            if self.made and is_empty(self.folder):
                self.folder.rmdir()
        os.close(self.file)


def is_empty(folder: Path) -> bool:
    """Whether nothing of a run or of the user's is there; a shared cache may be."""
    return not set(os.listdir(folder)) - NOT_BEGUN


def _system_lock(file: int) -> bool | None:
    """True: this process holds it now; False: another does; None: this system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def claimed(choose: Callable[[], tuple[T, Path]]) -> Iterator[tuple[T, Path]]:
    """Hold the folder of a run while the block runs; of several processes, the first one does.

    Signals end the block by KeyboardInterrupt; what it has made is then removed if there is nothing
    to resume from.

    choose: the run's config and its folder.
    raises: as Claim.
    """
    claims: list[Claim] = []

    def take() -> tuple[T, Path]:
        config, folder = choose()
        claims.append(Claim(folder))
        return config, folder

    chosen = from_first_process(take)
    try:
        with signals():
            yield chosen
    except BaseException as error:
        kept = "config.json" if isinstance(error, KeyboardInterrupt) else "checkpoint*.pt"
        for claim in claims:
            if not any(claim.folder.glob(kept)):
                claim.clear()
        raise
    finally:
        for claim in claims:
            claim.release()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder of an existing run while the block writes into it; raises as Claim."""
    if not (folder / "config.json").is_file():  # no run: the block says so
        yield
        return
    with claimed(lambda: (None, folder)):
        yield


# --- signals -------------------------------------------------------------------------------------

SIGNALS = [s for name in ("SIGINT", "SIGTERM", "SIGHUP") if (s := getattr(signal, name, None))]


class _State:
    waiting = False  # a training will look at `asked` after its step
    asked = False


def _handle(number: int, _frame: Any) -> None:
    if not _State.waiting or _State.asked:
        raise KeyboardInterrupt
    _State.asked = True
    if number == signal.SIGINT:
        with contextlib.suppress(RuntimeError):  # it came while a line was being printed
            notify("stopping after this step, with a checkpoint; Ctrl-C again stops at once")


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt: at the end of a step while training."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    handlers = {number: signal.signal(number, _handle) for number in heard}
    try:
        yield
    finally:
        _State.asked = False
        for number, old in handlers.items():
            signal.signal(number, old)


@contextlib.contextmanager
def deferred(*, together: bool) -> Iterator[Callable[[], bool]]:
    """Signals wait; what is yielded says whether one has come, in any of the processes together."""
    _State.waiting = True
    try:
        yield _any_asked if together and ranks()[1] > 1 else lambda: _State.asked
    finally:
        _State.waiting = False


def _any_asked() -> bool:
    flag = torch.tensor(float(_State.asked))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=patient())  # all stop after the same step
    return bool(flag)
