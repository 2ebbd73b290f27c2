"""Time and memory of both kernels against eager torch, torch.compile and the roofline.

    python -m bench.kernels                   all sizes: N to 65536, B to 128, D = 100 and 448
    python -m bench.kernels --quick           small sizes, half a minute on a CPU

First the paths are checked against the float64 definition at a few sizes; nothing is timed if one
is off. Then a table goes to the screen and to a CSV, whose rows carry card, versions and commit.
On a CPU there is no Triton path and no torch.compile (it takes a minute to start): the torch path
and eager torch are timed. On a shared machine set OMP_WAIT_POLICY=passive, or spinning threads
make small operations up to 40 times slower.

The floor of a row is max(bytes / copy bandwidth, operations / matmul rate), both measured here:
  contrastive  least operations: upper triangle, N^2 Z forward and 3 N^2 Z backward (s again, then
               w f and w^T f); 8 N Z bytes forward, 12 N Z backward.
  mahalanobis  B P D^2 operations; half of W, x and the result once.

Sizes: N views, Z = 128 features, A = 4 classes; B images, P = 4096 positions, D channels.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads spoil a shared machine

import torch
from torch import Tensor

from kernels import HAS_TRITON, triton
from kernels.contrastive import contrastive
from kernels.mahalanobis import mahalanobis, mahalanobis_ref
from losses import centred_features, kappas

Z, A, P = 128, 4, 4096
KAPPA: dict[str, Any] = {"tau": 0.2, "alpha": 2.0}
COLUMNS = "operation size channels path pass ms peak_mb floor_ms over_floor".split()


# ---------------------------------------------------------------------------- what is timed


def views(N: int, device: torch.device, dtype=torch.float32) -> tuple[Tensor, ...]:
    """z, n, pair, c as the training loop has them: sorted by class, the two views side by side."""
    gen = torch.Generator().manual_seed(0)
    n = torch.arange(N // 2).mul(A).div(N // 2, rounding_mode="floor").repeat_interleave(2)
    c = torch.randn(A, Z, generator=gen)
    z = c[n] + torch.randn(N, Z, generator=gen)
    return z.to(device, dtype), n.to(device), (torch.arange(N) ^ 1).to(device), c.to(device)


def embeddings(B: int, D: int, device: torch.device) -> tuple[Tensor, ...]:
    """x (B, P, D), mean (P, D), W (P, D, D): random, W lower triangular."""
    gen = torch.Generator(device).manual_seed(0)
    W = torch.randn(P, D, D, generator=gen, device=device).tril_().mul_(D**-0.5)
    x = torch.randn(B, P, D, generator=gen, device=device)
    return x, torch.randn(P, D, generator=gen, device=device), W


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


# ---------------------------------------------------------------------------- measuring


def milliseconds(run: Callable[[], object], device: torch.device, *, seconds: float = 1.0) -> float:
    """Median of as many runs as fit `seconds`, at least three, after one to warm up."""

    def once() -> float:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)

    once()
    times = [once()]
    while len(times) < 3 or (sum(times) < 1e3 * seconds and len(times) < 200):
        times.append(once())
        if times[-1] > 2e4:  # a run of twenty seconds says enough
            break
    return median(times)


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float | str:
    """Memory beyond what was held before the run; blank where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
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


def roofline(device: torch.device) -> tuple[float, float]:
    """Measured bytes a second of a copy (read and write) and operations a second of a product."""
    size = 2**28 if device.type == "cuda" else 2**25
    source, target = torch.zeros(2, size, device=device)
    bandwidth = 8 * size / (1e-3 * milliseconds(lambda: target.copy_(source), device))
    side = 4096 if device.type == "cuda" else 1024
    left, right, out = torch.randn(3, side, side, device=device)
    product = milliseconds(lambda: torch.mm(left, right, out=out), device)
    return bandwidth, 2 * side**3 / (1e-3 * product)


def check(device: torch.device, backend: str) -> None:
    """The path that will be timed against the float64 definition.

    raises: SystemExit if a loss, a gradient or a distance is off by more than 1e-4 of its largest.
    """
    results = []
    for N in (64, 1000):
        z, n, pair, c = views(N, device)
        z64 = z.double().requires_grad_()
        z.requires_grad_()
        want = eager_contrastive(z64, n, pair, c.double())
        got = contrastive(z, n, pair, c, backend=backend, **KAPPA)
        got.backward()
        want.backward()
        assert z.grad is not None and z64.grad is not None
        results += [(f"contrastive N={N}", got, want), (f"its gradient N={N}", z.grad, z64.grad)]
    for B in (1, 8, 40):
        x, mean, W = (t[..., :64, :] if t.ndim < 3 else t for t in embeddings(B, 100, device))
        x, mean, W = x[:, :64], mean[:64], W[:64]
        want = mahalanobis_ref(x.double(), mean.double(), W.double())
        results.append((f"mahalanobis B={B}", mahalanobis(x, mean, W, backend=backend), want))
    for name, got, want in results:
        off = float(((got - want).abs().max() / want.abs().max()).detach())
        if not off < 1e-4:
            sys.exit(f"{name}: off by {off:.1e} of its largest value; nothing was timed")


# ---------------------------------------------------------------------------- the rows


def fits(need: float, device: torch.device) -> bool:
    """Whether `need` bytes are within 70% of the memory that is free."""
    if device.type == "cuda":
        return need < 0.7 * torch.cuda.mem_get_info()[0]
    if not hasattr(os, "sysconf"):
        return need < 4e9
    return need < 0.7 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def contrastive_rows(sizes, device, backend, bandwidth, rate) -> Iterator[dict]:
    paths: dict[str, Callable] = {
        backend: lambda *args: contrastive(*args, backend=backend, **KAPPA),
        "eager": eager_contrastive,
    }
    if device.type == "cuda":
        paths["torch"] = lambda *args: contrastive(*args, backend="torch", **KAPPA)
        paths["triton tf32"] = lambda *args: contrastive(*args, allow_tf32=True, **KAPPA)
        paths["compile"] = torch.compile(eager_contrastive)
    for N in sizes:
        z, *rest = views(N, device)
        floors = {}
        for name, bytes_, operations in (("forward", 8, 1), ("both", 20, 4)):
            memory, products = bytes_ * N * Z / bandwidth, operations * N * N * Z / rate
            floors[name] = 1e3 * max(memory, products)
        for path, loss in paths.items():
            if path in ("eager", "compile") and not fits(28 * N * N, device):
                continue  # seven (N, N) tensors at its peak

            def forward(loss=loss, z=z, rest=rest):
                with torch.no_grad():
                    return loss(z, *rest)

            def both(loss=loss, z=z, rest=rest):
                loss(z.detach().requires_grad_(), *rest).backward()

            for name, run in (("forward", forward), ("both", both)):
                ms = milliseconds(run, device)
                row = ("contrastive", N, Z, path, name, ms, peak_megabytes(run, device))
                yield dict(zip(COLUMNS, (*row, floors[name], ms / floors[name]), strict=True))


def mahalanobis_rows(images, channels, device, backend, bandwidth, rate) -> Iterator[dict]:
    paths: dict[str, Callable] = {
        backend: lambda x, mean, W: mahalanobis(x, mean, W, backend=backend),
        "eager": eager_mahalanobis,
        "anomalib": anomalib_mahalanobis,
    }
    if device.type == "cuda":
        paths["torch"] = lambda x, mean, W: mahalanobis(x, mean, W, backend="torch")
        paths["triton tf32"] = lambda x, mean, W: mahalanobis(x, mean, W, allow_tf32=True)
        paths["compile"] = torch.compile(eager_mahalanobis, dynamic=False)
    for D in channels:
        for B in images:
            x, mean, W = embeddings(B, D, device)  # the inverse's values do not matter to time
            delta, out = torch.randn(2, P, B, D, device=device)
            paths["bare product"] = lambda x, mean, W, d=delta, o=out: torch.bmm(d, W.mT, out=o)
            moved = 4 * P * (D * (D + 1) / 2 + D + B * D + B)
            floor = 1e3 * max(moved / bandwidth, B * P * D * D / rate)
            for path, distance in paths.items():
                own = (x, mean)
                if path == "anomalib":
                    own = x.transpose(1, 2).contiguous(), mean.T.contiguous()

                def run(distance=distance, own=own, W=W):
                    return distance(*own, W)

                ms = milliseconds(run, device)
                row = ("mahalanobis", B, D, path, "forward", ms, peak_megabytes(run, device))
                yield dict(zip(COLUMNS, (*row, floor, ms / floor), strict=True))


# ---------------------------------------------------------------------------- the program


def provenance(device: torch.device) -> dict[str, str]:
    """Card, versions and commit, the same in every row."""
    card = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "")
        card = f"{model or platform.machine()}, {torch.get_num_threads()} threads"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    version = triton.__version__ if HAS_TRITON else "none"
    return {
        "card": card,
        "torch": torch.__version__,
        "triton": version,
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.csv"), help="CSV to write")
    parser.add_argument("--quick", action="store_true", help="N to 4096, B to 8, D = 100")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    about = provenance(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if device.type == "cpu":
        print("no GPU: only the torch backend and eager torch are timed, no Triton, no compile")
    check(device, backend)
    bandwidth, rate = roofline(device)
    print(f"checks passed; copy {bandwidth / 1e9:.0f} GB/s, product {rate / 1e9:.0f} GFLOP/s")
    sizes = (256, 1024, 4096) if args.quick else (256, 1024, 4096, 8192, 16384, 65536)
    images, channels = ((1, 8), (100,)) if args.quick else ((1, 8, 32, 128), (100, 448))
    print(("{:>13}" * len(COLUMNS)).format(*COLUMNS))
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + list(about))
        writer.writeheader()
        common = device, backend, bandwidth, rate
        for rows in (contrastive_rows(sizes, *common), mahalanobis_rows(images, channels, *common)):
            for row in rows:
                text = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
                print(("{:>13}" * len(text)).format(*text), flush=True)
                writer.writerow(row | about)
                file.flush()
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
