"""What the compiler makes of every kernel and configuration, for chips that are not here.

bench/builds.py compiles ahead of time, in processes without the interpreter, and writes a row a
build. The tests read from it that no register spills, that shared memory fits and that the matrix
units are used; and that torch.compile takes the kernels into one graph.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import HAS_TRITON, contrastive, mahalanobis

# bytes of shared memory a block may have
SHARED_LIMIT = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "gfx942": 65_536}
SHARED_LIMIT |= {"sm_90": 232_448, "sm_100": 232_448}
PROCESSES = 2


def compiling() -> dict[str, str]:
    """The environment of a process that compiles instead of interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """Every build that can run, once."""
    if not HAS_TRITON:
        pytest.skip("needs the Triton package")
    command = [sys.executable, "-m", "bench.builds", "--all", "--share"]
    running = [
        subprocess.Popen(
            [*command, str(k), str(PROCESSES)],
            env=compiling(), cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for k in range(PROCESSES)
    ]  # fmt: skip
    tables = [process.communicate()[0].splitlines() for process in running]
    assert all(process.returncode == 0 for process in running), "a kernel does not compile"
    return [row for table in tables for row in csv.DictReader(table)]


def test_every_configuration_is_compiled(rows):
    assert {row["chip"] for row in rows} == set(SHARED_LIMIT)
    tiles = {(row["kernel"], row["tile"], row["warps"], row["stages"]) for row in rows}
    for (kernel, _), configs in contrastive.CONFIGS.items():
        for BM, BN, warps, stages in configs:
            assert (f"contrastive{kernel}", f"{BM} x {BN}", str(warps), str(stages)) in tiles
    for BB, BI, BJ, warps, stages in mahalanobis.CONFIGS.values():
        name = "mahalanobis W=fp32"
        assert (name, f"{BB} x {BI} x {BJ}", str(warps), str(stages)) in tiles


def test_no_register_spills(rows):
    """But for a few that float32 has in three products on sm_100, with Triton 3.7's assembler."""
    allowed = {("tf32x3", "sm_100"): 24}
    for r in rows:
        if r["chip"] != "gfx942":
            assert int(r["spilled"]) <= allowed.get((r["kind"], r["chip"]), 0), r


def test_shared_memory_fits_the_chip(rows):
    assert not [r for r in rows if int(r["shared"]) > SHARED_LIMIT[r["chip"]]]


def test_all_products_but_ieee_use_the_matrix_units(rows):
    for row in rows:
        if row["kind"] and row["chip"] != "gfx942":
            by_hand = row["kind"] == "ieee" or row["tile"].startswith("1 x")
            by_hand |= row["kind"] == "tf32x3" and int(row["Z"]) > 128
            assert (int(row["matrix"]) > 0) != by_hand, row


def test_a_tile_takes_few_instructions(rows):
    """What the masks, ids, maximum and exponentials of every tile once cost was 2 to 6 times it."""
    limits = {("contrastive_forward", "sm_90"): 300, ("contrastive_backward", "sm_90"): 400}
    limits |= {("contrastive_forward", "sm_80"): 380, ("contrastive_backward", "sm_80"): 560}
    found = {
        (r["kernel"], r["chip"]): int(r["cycles"])
        for r in rows
        if r["kind"] == "bf16" and r["Z"] == "128"
    }
    assert all(found[key] <= limit for key, limit in limits.items()), found


# The graph is only made, forward and backward: what would run it returns a zero.
ONE_GRAPH = """
import re, torch
import torch.utils._triton
torch.utils._triton.has_triton = lambda *device: True  # it asks for a GPU
from kernels import contrastive as C
C.choose_backend = lambda backend, device: "triton"
def loss(z, n, pair, c):
    return C.contrastive(2 * z, n, pair, c, tau=0.2, alpha=2.0)
graphs = []
def keep(graph, inputs):
    graphs.append(graph)
    return lambda *inputs: (torch.zeros((), requires_grad=True),)
z, n, pair = torch.randn(6, 5, requires_grad=True), torch.zeros(6).long(), torch.arange(6) ^ 1
torch.compile(loss, backend=keep, fullgraph=True)(z, n, pair, torch.zeros(1, 5))
calls = re.findall(r"triton_kernel_wrapper_mutation\\(", graphs[0].print_readable(False))
print(len(graphs), len(calls))
"""


def test_torch_compile_takes_the_kernels_into_one_graph():
    if not HAS_TRITON:
        pytest.skip("needs the Triton package")
    command = [sys.executable, "-c", ONE_GRAPH]
    run = subprocess.run(command, env=compiling(), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["1", "5"]
