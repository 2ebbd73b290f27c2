"""What commands share: their options' errors, files that are whole or not there, processes."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import errno
import functools
import io
import json
import os
import re
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # a misspelt option is an error
        self._negative_number_matcher = re.compile(r"-\.?\d")  # --window -160,240 is a value

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(self.prog, message))


def given_path(text: str) -> Path:
    """An argument that is a path; an empty one comes of a shell's variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def real(path: str | Path) -> Path:
    """The absolute path without links; Path.resolve ends in a RuntimeError where they go round."""
    return Path(os.path.realpath(path))


LONGEST = 760  # characters of a complaint: ten lines of a terminal


def one_line(program: str, error: object) -> str:
    """What a program says when it ends with exit code 2: one line, of bounded length."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        error = f"{error.filename}: {error.strerror}"
    text = " ".join(f"{program}: {error}".split())
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 20].rstrip()} ... (cut)") + "\n"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory, in blocks up to 256 MiB, where it would give it back.

    Getting it again, page by page, takes up to a fifth of a training step on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**28)


def pick_device(name: str) -> str:
    """auto: the GPU if there is one.   raises: ValueError for a device that is not there."""
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks()[1] > 1 and name.startswith("cuda"):
        name = "cuda"  # each process has its own
        if gpus and (here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > len(gpus):
            wanted = f"--nproc-per-node {len(gpus)}, or --device cpu"
            raise ValueError(f"{here} processes here, but {len(gpus)} GPU(s): {wanted}")
    if name not in ["cpu", *gpus] and not (name == "cuda" and gpus):
        raise ValueError(f"--device must be auto, cpu or cuda (if there is one), got {name}")
    return name


def short_of_memory(error: Exception) -> bool:
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return memory or "allocate memory" in str(error)  # a RuntimeError on a CPU


# --- files: written under another name, then renamed: an interruption leaves the old one ---------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the block name this file where the system does not, as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write; it replaces `path` at the end, or is removed if that fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut leaves the name without the content
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_atomically(value: dict, path: Path) -> None:
    """torch.save of plain tensors, numbers and strings: loads with weights_only=True.

    raises: OSError, with the old file kept, if the disk is full: torch's own writer would end the
            process, so it writes to memory.
    """
    content = io.BytesIO()
    torch.save(tree_map_only(Tensor, Tensor.cpu, value), content)  # for machines without a GPU, too
    with replacing(path) as partial:  # a run's folder that was deleted is not made again
        partial.write_bytes(content.getbuffer())


def open_regular(path: str | Path) -> BinaryIO:
    """A file to read; raises OSError for a pipe or a device, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def read_saved(path: str | Path, what: str, device: torch.device | str) -> Any:
    """torch.load of plain tensors, numbers and strings.

    what:   "checkpoint", ...: what the file should be.
    raises: OSError if it cannot be opened, ValueError if its bytes are something else.
    """
    try:
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):  # its own checksums: torch's reader passes over them
                with zipfile.ZipFile(file) as parts:
                    if parts.testzip():
                        raise ValueError
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # an unpickler may fail in any way on foreign bytes
        if short_of_memory(error) or getattr(error, "filename", None):  # it cannot be opened
            raise
        raise ValueError(f"{path}: no {what}, or a damaged one; move it away") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} if there is no such file; raises ValueError if it is damaged."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or move it away") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged (no JSON object); restore it, or move it away")
    return content


def encoded(text: str) -> bytes:
    """UTF-8, whatever the locale; file names that are not UTF-8 keep their bytes."""
    return text.encode("utf-8", "surrogateescape")


def one_word(name: str) -> str:
    """A file's name with escapes for tabs, new lines and whatever else is not printable."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def read_text(path: Path) -> str:
    """What `encoded` wrote."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def make_folder(path: Path) -> None:
    """raises: ValueError naming --out if the folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out {path}: cannot be made ({reason}); name another") from None


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """A CSV file of rows, numbers to six digits; a key that a row lacks is left empty."""
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    return list(csv.DictReader(io.StringIO(read_text(path), newline="")))


# --- processes: `torchrun --nproc-per-node R pmsacl.py ...` ---------------------------------------


def join_processes() -> None:
    """Join the other processes, if torchrun started this one."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("WORLD_SIZE is set without LOCAL_RANK: use torchrun, or unset it")
        gpus, rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if rank < gpus:
            torch.cuda.set_device(rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        patient()


def leave_processes() -> None:
    """Leave the others, at the end of a run: torch warns of groups that are left open."""
    if ranks()[1] > 1:
        dist.destroy_process_group()
        patient.cache_clear()


@functools.cache
def patient() -> dist.ProcessGroup | None:
    """All processes, on their CPUs, to wait for one another: NCCL gives up after ten minutes, and
    the first process may decode for hours. All of them make the first call together.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def wait_for_all() -> None:
    """No process continues before all are here."""
    if ranks()[1] > 1:
        dist.barrier(group=patient())


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) for one process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block, then the first of each other machine, then the rest."""
    turn = 0 if ranks()[0] == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(turn, 2):
        wait_for_all()


def cache_folder(run: Path) -> Path:
    """Where this machine keeps decoded images: the first one in the run's folder, the others among
    their temporary files, whose place TMPDIR names.
    """
    elsewhere = int(os.environ.get("GROUP_RANK", "0")) > 0  # torchrun's number of the machine
    return Path(tempfile.gettempdir(), "pmsacl-cache") if elsewhere else run / "cache"


def from_first_process(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, or its ValueError, in all of them."""
    rank, world = ranks()
    value: list[Any] = [None, None]
    if rank == 0:
        try:
            value[0] = make()
        except ValueError as error:
            value[1] = str(error)
    if world > 1:
        dist.broadcast_object_list(value, group=patient())
    if value[1] is not None:
        raise ValueError(value[1])
    return cast(T, value[0])


class _Gather(torch.autograd.Function):
    """Rows of all ranks, rank by rank; the gradients of a row add up on its own rank."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(ranks()[1])]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        g = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        rank, world = ranks()
        return g.chunk(world)[rank]


def gather(
    z: Tensor, n: Tensor, pair: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int] | None]:
    """The global batch, so that eq. 5's denominator is over all of it.

    z, n, pair: (N, Z), (N,), (N,) of this rank.
    returns:    (R N, Z), (R N,), (R N,) of R ranks, and this rank's rows (None for one process).
    """
    rank, world = ranks()
    if world == 1:
        return z, n, pair, None
    ids = torch.stack([n, pair + rank * len(n)])  # (2, N)
    parts = [torch.empty_like(ids) for _ in range(world)]
    dist.all_gather(parts, ids)
    n_all, pair_all = torch.cat(parts, dim=1)
    return _Gather.apply(z), n_all, pair_all, (rank * len(n), (rank + 1) * len(n))


class _Losses(nn.Module):
    """What DistributedDataParallel wraps: losses, and the networks that they are computed with."""

    def __init__(self, losses: Callable[[], dict[str, Tensor]], networks: nn.Module) -> None:
        super().__init__()
        self.losses, self.networks = losses, networks

    def forward(self) -> dict[str, Tensor]:
        return self.losses()


def averaged(
    losses: Callable[[], dict[str, Tensor]], networks: nn.Module
) -> Callable[[], dict[str, Tensor]]:
    """`losses`, whose backward pass leaves the mean gradients of all processes in the networks.

    The processes begin with the first one's weights. Each one's losses are means over its own rows,
    so the mean of the gradients is that of the whole batch. On GPUs batch norm is over all of it.
    """
    if ranks()[1] == 1:
        return losses
    if next(networks.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(networks)  # of the parts, in place
    return DistributedDataParallel(_Losses(losses, networks), find_unused_parameters=True)


def as_in_first_process(networks: nn.Module) -> None:
    """Weights and buffers: on CPUs, the averages of batch norm differ between processes."""
    if ranks()[1] > 1:
        for tensor in networks.state_dict().values():
            dist.broadcast(tensor, 0)


def mean_of_processes(value: Tensor, weight: int) -> Tensor:
    """The weighted mean; value itself for one process."""
    if ranks()[1] == 1:
        return value
    total = torch.cat([weight * value.flatten().double(), value.new_tensor([weight]).double()])
    dist.all_reduce(total)
    return (total[:-1] / total[-1]).view_as(value).to(value.dtype)
