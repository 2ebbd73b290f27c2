"""Time, launches and memory of both kernels beside plain torch, on whatever device there is.

    python -m bench.kernels                   at most five minutes
    python -m bench.kernels --commit 1f56c3f  where there is no git to ask

First every path is checked against the float64 definition, and nothing is timed if one is off.
Then the clock warms up, matrix products and a copy are timed for the floors, and each row goes to
the screen and to bench.csv; on a GPU to docs/kernels.csv and the table in docs/speed.md. The paths:

    triton, torch   ours, by its two backends (on a CPU there is no Triton path)
    eager           the definition with every (N, N) matrix in memory, in the dtype of the row
    compile         the same through torch.compile(dynamic=False), GPU only
    flex            eq. 5 by FlexAttention's log-sum-exp, forward only, GPU only

The paths of one size take turns, so that a drifting machine is the same for all. On a GPU the L2
cache is flushed before each run, and a GPU that waits for the host counts as time. `floor` is the
larger of the operations at the rate of a large product of the row's dtype and the bytes at that of
a copy; `ratio` is the time over ours; float32 in three products of tf32 may pass its floor. `mhz`
is the clock right after a size's timings.

Sizes: N views, Z = 128 features, A = 4 classes; B images, P = 4096 positions, D channels.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads spoil a shared machine

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.profiler import ProfilerActivity, profile

from bench.page import SPEED, add_commit, provenance, write_block
from kernels import HAS_TRITON
from kernels.contrastive import contrastive
from kernels.mahalanobis import mahalanobis, mahalanobis_ref
from losses import _rows_of_eq_5, centred_features, contrastive_loss, kappas

Z, A, P = 128, 4, 4096
KAPPA: dict[str, Any] = {"tau": 0.2, "alpha": 2.0}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
OURS = "triton" if GPU and HAS_TRITON else "torch"
VIEWS = (256, 4096, 16384, 65536) if GPU else (256, 1024)
IMAGES, CHANNELS = (1, 32, 128), (100, 448) if GPU else (100,)
# The last compiled peer starts within COMPILE seconds, the last size within ALL: five minutes.
ROW, COMPILE, ALL = 1.0, 120, 280
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
# The largest |error| / |value| that passes: float32 by products of tf32 (5e-5) does not.
WITHIN = {"bf16": 1e-2, "float32": 1e-5, "tf32": 1e-3, "float16": 2e-3}
COLUMNS = (
    "operation size channels dtype pass path ms ratio floor launches waits peak_mb mhz".split()
)

# ---------------------------------------------------------------------------- what is timed


def kinds() -> list[str]:
    """The dtypes that have matrix units here, and float32."""
    return list(DTYPES) if GPU and torch.cuda.get_device_capability() >= (8, 0) else ["float32"]


def views(N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """z, n, pair, c as the training loop has them: sorted by class, the two views side by side."""
    gen = torch.Generator().manual_seed(0)
    n = torch.arange(N // 2).mul(A).div(N // 2, rounding_mode="floor").repeat_interleave(2)
    c = torch.randn(A, Z, generator=gen)
    z = c[n] + torch.randn(N, Z, generator=gen)
    pair = torch.arange(N) ^ 1
    return z.to(DEVICE, dtype), n.to(DEVICE), pair.to(DEVICE), c.to(DEVICE, dtype)


def embeddings(B: int, D: int, dtype: torch.dtype, positions: int = P) -> tuple[Tensor, ...]:
    """x (B, P, D), mean (P, D), W (P, D, D): random, W lower triangular."""
    draw = partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    W = draw(positions, D, D).tril_().mul_(D**-0.5)
    return draw(B, positions, D).to(dtype), draw(positions, D).to(dtype), W.to(dtype)


def eager_contrastive(z: Tensor, n: Tensor, pair: Tensor, c: Tensor) -> Tensor:
    """[P:(4)] to [P:(7)], all queries at once."""
    kappa, f = kappas(**KAPPA, positive_scale="kappa"), centred_features(z, n, c)
    return _rows_of_eq_5(f, n, pair, kappa, 0, len(f)).mean()


def flex_contrastive(z: Tensor, n: Tensor, pair: Tensor, c: Tensor) -> Tensor:
    """The same; of the values that FlexAttention must average, 16 columns, the fewest it takes."""
    same, different, positive = kappas(**KAPPA, positive_scale="kappa")
    f = centred_features(z, n, c)

    def score(s: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, -torch.inf, torch.where(n[i] == n[j], same, different) * s)

    q = f[None, None]
    wanted: dict[str, Any] = {"scale": 1.0, "return_aux": AuxRequest(lse=True)}
    lse = flex_attention(q, q, q[..., :16], score, **wanted)[1].lse[0, 0]
    return (lse - positive * (f * f[pair]).sum(1)).mean()


def paths(ours: Callable, eager: Callable, kind: str) -> dict[str, Callable]:
    """The ways to compute one operation that need no compiler of torch's."""
    named: dict[str, Callable] = {OURS: partial(ours, backend=OURS, allow_tf32=kind == "tf32")}
    return named | {"torch": partial(ours, backend="torch"), "eager": eager}


def gradient(loss: Callable[..., Tensor], z: Tensor, *rest: Tensor, scale: float = 1) -> Tensor:
    """scale dloss/dz."""
    z = z.detach().requires_grad_()
    value = loss(z, *rest)
    return torch.autograd.grad(value, z, torch.full_like(value, scale))[0]


# ---------------------------------------------------------------------------- what must be right


def near(got: Tensor, want: Tensor, kind: str, what: str) -> None:
    """raises: RuntimeError if `got` is off by more than the dtype explains."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error <= WITHIN[kind]:
        raise RuntimeError(f"{what}, {kind}: off by {error:.1e}, allowed {WITHIN[kind]:.0e}")


def set_products(kind: str) -> None:
    """How plain torch multiplies float32."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")


def gate() -> None:
    """Every path and dtype against the float64 definition on the same bits."""
    for kind in dict.fromkeys([*kinds(), "bf16", "float16"]):
        set_products(kind)
        dtype = DTYPES.get(kind, torch.float16)
        z, n, pair, c = views(1000, dtype)
        exact = z.double(), n, pair, c.double()
        want, scale = contrastive_loss(*exact, **KAPPA), 1000  # or the mean's 1 / N ends float16
        want_dz = gradient(contrastive_loss, *exact, scale=scale)
        for path, loss in paths(partial(contrastive, **KAPPA), eager_contrastive, kind).items():
            near(loss(z, n, pair, c), want, kind, f"{path} contrastive, forward")
            dz = gradient(loss, z, n, pair, c, scale=scale)
            near(dz, want_dz, kind, f"{path} contrastive, gradient")
        for B in (1, 40):
            case = embeddings(B, 100, dtype, 64)
            want = mahalanobis_ref(*(t.double() for t in case))
            for path, distance in paths(mahalanobis, mahalanobis_ref, kind).items():
                near(distance(*case), want, kind, f"{path} mahalanobis, B = {B}")


# ---------------------------------------------------------------------------- measuring


@cache
def larger_than_cache() -> Tensor:
    size = 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=DEVICE)


def seconds(run: Callable[[], object]) -> float:
    """Of one run: between two events on a GPU, by the clock of the host elsewhere."""
    if not GPU:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    larger_than_cache().zero_()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def product(kind: str) -> tuple[Callable[[], object], float]:
    """A large matrix product, and its operations."""
    set_products(kind)
    side = 8192 if GPU else 1024
    a = torch.ones(side, side, dtype=DTYPES[kind], device=DEVICE)
    return partial(torch.mm, a, a), 2.0 * side**3


def warm_up() -> bool:
    """Products until two successive rounds differ by less than 2%; False if 20 s bring none."""
    run, _ = product("float32")
    before, end = float("inf"), time.monotonic() + 20
    while time.monotonic() < end:
        now = statistics.median(seconds(run) for _ in range(15))
        if abs(now - before) < 0.02 * before:
            return True
        before = now
    return False


def rates() -> dict[str, float]:
    """Operations a second by dtype, and bytes a second ("copy")."""
    found = {}
    for kind in kinds():
        run, operations = product(kind)
        found[kind] = operations / min(seconds(run) for _ in range(15))
    source = torch.ones(2**30 if GPU else 2**27, dtype=torch.uint8, device=DEVICE)
    run = partial(torch.empty_like(source).copy_, source)
    return found | {"copy": 2 * len(source) / min(seconds(run) for _ in range(15))}


def counted(run: Callable[[], object]) -> tuple:
    """Kernels, copies and fills that the GPU is told, how often the host waits for it, and MB of
    memory beyond what was held before; blank on a CPU."""
    if not GPU:
        return "", "", ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    on_gpu = (e for e in seen.events() or () if e.device_type == DeviceType.CUDA)
    launches = sum(e.name != "Context Sync" and not e.is_user_annotation for e in on_gpu)
    waits = sum("called a synchronizing" in str(w.message) for w in told)
    return launches, waits, (torch.cuda.max_memory_allocated() - before) / 2**20


# ---------------------------------------------------------------------------- the rows


class Group(NamedTuple):
    """What takes turns."""

    what: tuple  # of COLUMNS up to `pass`
    paths: dict[str, Callable]
    compiled: dict[str, Callable]  # by torch.compile, those that run only so
    run: Callable[[Callable], object]  # what is timed, given a path
    operations: float
    bytes: float


def groups(kind: str) -> Iterator[Group]:
    dtype = DTYPES[kind]
    for N in VIEWS:
        case = views(N, dtype)
        named = paths(partial(contrastive, **KAPPA), eager_contrastive, kind)
        work, moved = 2.0 * N * N * Z, case[0].nbytes
        peers: dict[str, Callable] = {"compile": eager_contrastive}
        forward = torch.no_grad()(lambda loss, case=case: loss(*case))
        both = partial(lambda case, loss: gradient(loss, *case), case)
        with_flex = peers | {"flex": flex_contrastive}
        what: tuple = "contrastive", N, Z, kind
        yield Group((*what, "forward"), named, with_flex, forward, work, moved)
        yield Group((*what, "both"), named, peers, both, 3 * work, 2 * moved)
    for D in CHANNELS:
        for B in IMAGES:
            x, mean, W = embeddings(B, D, dtype)
            named = paths(mahalanobis, mahalanobis_ref, kind)
            half = W.nbytes * (D + 1) / (2 * D)
            run = torch.no_grad()(lambda distance, case=(x, mean, W): distance(*case))
            peers = {"compile": mahalanobis_ref}
            what = "mahalanobis", B, D, kind, "forward"
            yield Group(what, named, peers, run, 1.0 * B * P * D * D, half + x.nbytes)


def running(group: Group, compiling: bool) -> dict[str, Callable[[], object]]:
    """The paths of a group that run here, warm, each compared with ours."""
    named = dict(group.paths)
    if GPU and compiling:
        torch.compiler.reset()  # of one function it keeps eight versions, then runs it eagerly
        named |= {name: torch.compile(f, dynamic=False) for name, f in group.compiled.items()}
    runs: dict[str, Callable[[], object]] = {}
    want: Any = None
    for path, function in named.items():
        run = partial(group.run, function)
        try:
            result: Any = run()
            want = result if path == OURS else want
            near(result, want, group.what[3], "its result")
            run()
        except RuntimeError as error:  # a peer out of memory, wrong, or that does not compile
            if path == OURS:
                raise
            print(path, *group.what, "is not timed:", str(error).splitlines()[0])
            continue
        runs[path] = run
    return runs


def rows(group: Group, compiling: bool, rate: dict[str, float]) -> Iterator[list]:
    """The paths in turns, for ROW seconds each and three times at least."""
    runs = running(group, compiling)
    taken: dict[str, list[float]] = {path: [] for path in runs}
    end = time.monotonic() + ROW * len(runs)
    while time.monotonic() < end or len(taken[OURS]) < 3:
        for path, run in runs.items():
            taken[path].append(seconds(run))
    mhz = clock()  # while the GPU is still warm
    floor = 1e3 * max(group.operations / rate[group.what[3]], group.bytes / rate["copy"])
    for path, run in runs.items():
        ms = 1e3 * statistics.median(taken[path])
        ratio = statistics.median(a / b for a, b in zip(taken[path], taken[OURS], strict=True))
        yield [*group.what, path, ms, ratio, floor, *counted(run), mhz]


# ---------------------------------------------------------------------------- the program


def clock() -> str:
    """Of the GPU's processors now, in MHz, as its driver reports it; "" without a GPU."""
    if not GPU:
        return ""
    gpu = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a part of a GPU, perhaps
        return "unknown"


def measured() -> Iterator[list]:
    """All rows, until the time is over; what the machine does goes to the screen before them."""
    began = time.monotonic()
    try:
        gate()
    except RuntimeError as error:
        raise SystemExit(f"nothing is timed: {str(error).splitlines()[0]}") from None
    print("every path and dtype agrees with float64")
    steady = "steady" if warm_up() else "NOT steady, compare ratios only"
    print(f"clock {clock() or 'of the CPU'}, {steady}")
    rate = rates()
    print(", ".join(f"{name} {value / 1e12:.3g} T/s" for name, value in rate.items()))
    for kind in kinds():
        for group in groups(kind):
            spent = time.monotonic() - began
            if spent > ALL:
                print(f"{ALL} s are over: not timed from {group.what} on")
                return
            set_products(kind)
            yield from rows(group, spent < COMPILE, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_commit(parser)
    about = provenance(parser.parse_args().commit)
    out = SPEED.with_name("kernels.csv") if GPU else Path("bench.csv")
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    print(told)
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS + list(about))
        for row in measured():
            lines.append([f"{v:.3f}" if isinstance(v, float) else str(v) for v in row])
            if len(lines) == 3:
                print(("{:>12}" * len(COLUMNS)).format(*COLUMNS))
            print(("{:>12}" * len(lines[-1])).format(*lines[-1]), flush=True)
            writer.writerow([*row, *about.values()])
            file.flush()
    print(f"written to {out}")
    if GPU:
        write_block("bench.kernels", [f"{told}:", "", *(f"| {' | '.join(x)} |" for x in lines)])


if __name__ == "__main__":
    main()
