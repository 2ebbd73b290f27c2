"""Time and memory of both kernels against eager torch and torch.compile.

    python -m bench.kernels                   all sizes: N to 65536, B to 128, D = 100 and 448
    python -m bench.kernels --quick           small sizes, half a minute on a CPU

First the kernels are checked against the float64 definition, and nothing is timed if one is off.
Then a table goes to the screen and to a CSV, whose rows carry card, versions and commit. On a CPU
there is no Triton path and no torch.compile (it takes a minute to start): the torch path and eager
torch are timed. What the kernels cannot be faster than is in docs/speed.md.

Sizes: N views, Z = 128 features, A = 4 classes; B images, P = 4096 positions, D channels.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads spoil a shared machine

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from kernels import HAS_TRITON, triton
from kernels.contrastive import contrastive
from kernels.mahalanobis import mahalanobis, mahalanobis_ref
from losses import centred_features, contrastive_loss, kappas
from support.job import versions

Z, A, P = 128, 4, 4096
KAPPA: dict[str, Any] = {"tau": 0.2, "alpha": 2.0}
COLUMNS = "operation size channels path pass ms peak_mb".split()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "triton" if DEVICE.type == "cuda" and HAS_TRITON else "torch"

# ---------------------------------------------------------------------------- what is timed


def views(N: int) -> tuple[Tensor, ...]:
    """z, n, pair, c as the training loop has them: sorted by class, the two views side by side."""
    gen = torch.Generator().manual_seed(0)
    n = torch.arange(N // 2).mul(A).div(N // 2, rounding_mode="floor").repeat_interleave(2)
    c = torch.randn(A, Z, generator=gen)
    z = c[n] + torch.randn(N, Z, generator=gen)
    return z.to(DEVICE), n.to(DEVICE), (torch.arange(N) ^ 1).to(DEVICE), c.to(DEVICE)


def embeddings(B: int, D: int) -> tuple[Tensor, ...]:
    """x (B, P, D), mean (P, D), W (P, D, D): random, W lower triangular."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    W = torch.randn(P, D, D, generator=gen, device=DEVICE).tril_().mul_(D**-0.5)
    x = torch.randn(B, P, D, generator=gen, device=DEVICE)
    return x, torch.randn(P, D, generator=gen, device=DEVICE), W


def eager_contrastive(z: Tensor, n: Tensor, pair: Tensor, c: Tensor) -> Tensor:
    """Eq. 4-7 with every (N, N) matrix in memory."""
    same, different, positive = kappas(**KAPPA, positive_scale="kappa")
    f = centred_features(z, n, c)
    s = torch.where(n[:, None] == n[None, :], same, different) * (f @ f.T)
    itself = torch.eye(len(f), dtype=torch.bool, device=f.device)
    return (s.masked_fill(itself, -torch.inf).logsumexp(1) - positive * (f * f[pair]).sum(1)).mean()


def eager_mahalanobis(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The textbook form with a full inverse covariance."""
    delta = x - mean
    return torch.einsum("bpi,pij,bpj->bp", delta, inverse, delta).clamp_min(0).sqrt()


def anomalib_mahalanobis(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The arithmetic of anomalib 2.7's PaDiM; its x is (B, D, P), its mean (D, P)."""
    delta = (x - mean).permute(2, 0, 1)
    return (torch.matmul(delta, inverse) * delta).sum(2).permute(1, 0).clamp(0).sqrt()


def check() -> None:
    """raises: AssertionError if what will be timed is not the float64 definition, to 1e-4."""
    z, n, pair, c = views(1000)
    z, z64 = z.requires_grad_(), z.double().requires_grad_()
    loss = contrastive(z, n, pair, c, backend=BACKEND, **KAPPA)
    want = contrastive_loss(z64, n, pair, c.double(), **KAPPA)
    near = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7, check_dtype=False)
    near(loss, want)
    near(torch.autograd.grad(loss, z)[0], torch.autograd.grad(want, z64)[0])
    x, mean, W = embeddings(40, 100)
    x, mean, W = x[:, :64], mean[:64], W[:64]
    distance = mahalanobis(x, mean, W, backend=BACKEND)
    near(distance, mahalanobis_ref(x.double(), mean.double(), W.double()))


# ---------------------------------------------------------------------------- measuring


def milliseconds(run: Callable[[], object]) -> float:
    """Median of as many runs as fit a second, after one to warm up."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=1).median


def peak_megabytes(run: Callable[[], object]) -> float | str:
    """Memory beyond what was held before the run; blank where the system does not tell."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return ""

    def field(name: str) -> int:
        return next(int(s.split()[1]) for s in status.read_text().splitlines() if name in s)

    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak starts anew
    before = field("VmRSS")
    run()
    return (field("VmHWM") - before) / 2**10


def free_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------- the rows

Rows = Iterator[tuple]  # of COLUMNS up to `pass`, then what to run


def paths(ours: Callable, eager: Callable) -> dict[str, Callable]:
    """The ways to compute one operation, by the name of their row."""
    named: dict[str, Callable] = {BACKEND: partial(ours, backend=BACKEND), "eager": eager}
    if DEVICE.type == "cuda":
        named["torch"] = partial(ours, backend="torch")
        named["triton tf32"] = partial(ours, allow_tf32=True)
        torch.compiler.reset()  # of one function it keeps eight versions, then runs it eagerly
        named["compile"] = torch.compile(eager, dynamic=False)
    return named


def contrastive_rows(sizes: Iterable[int]) -> Rows:
    for N in sizes:
        z, *rest = views(N)
        for path, loss in paths(partial(contrastive, **KAPPA), eager_contrastive).items():
            if path in ("eager", "compile") and 28 * N * N > 0.7 * free_bytes():
                continue  # seven (N, N) tensors at its peak

            def both(loss=loss, z=z, rest=rest):
                loss(z.detach().requires_grad_(), *rest).backward()

            forward = torch.no_grad()(partial(loss, z, *rest))
            yield "contrastive", N, Z, path, "forward", forward
            yield "contrastive", N, Z, path, "both", both


def mahalanobis_rows(images: Iterable[int], channels: Iterable[int]) -> Rows:
    for D in channels:
        for B in images:
            x, mean, W = embeddings(B, D)  # the inverse's values do not matter to time
            for path, distance in paths(mahalanobis, eager_mahalanobis).items():
                yield "mahalanobis", B, D, path, "forward", partial(distance, x, mean, W)
            theirs = x.transpose(1, 2).contiguous(), mean.T.contiguous(), W
            run = partial(anomalib_mahalanobis, *theirs)
            yield "mahalanobis", B, D, "anomalib", "forward", run


# ---------------------------------------------------------------------------- the program


def provenance() -> dict[str, str]:
    """Card, versions and commit, the same in every row."""
    card, cpus = platform.machine(), Path("/proc/cpuinfo")
    if cpus.exists():
        named = (s for s in cpus.read_text().splitlines() if s.startswith("model name"))
        card = next(named, f": {card}").split(":")[1].strip()
    card = f"{card}, {torch.get_num_threads()} threads"
    return {
        "card": torch.cuda.get_device_name() if DEVICE.type == "cuda" else card,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "commit": versions()["commit"][:7],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.csv"), help="CSV to write")
    parser.add_argument("--quick", action="store_true", help="N to 4096, B to 8, D = 100")
    args = parser.parse_args()
    about = provenance()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if DEVICE.type == "cpu":
        print("no GPU: only the torch backend and eager torch are timed, no Triton, no compile")
    check()
    sizes = (256, 1024, 4096) if args.quick else (256, 1024, 4096, 8192, 16384, 65536)
    images, channels = ((1, 8), (100,)) if args.quick else ((1, 8, 32, 128), (100, 448))
    print(("{:>13}" * len(COLUMNS)).format(*COLUMNS))
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS + list(about))
        for rows in (contrastive_rows(sizes), mahalanobis_rows(images, channels)):
            for *what, run in rows:
                row = [*what, milliseconds(run), peak_megabytes(run)]
                text = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
                print(("{:>13}" * len(text)).format(*text), flush=True)
                writer.writerow([*row, *about.values()])
                file.flush()
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
