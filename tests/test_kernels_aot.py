"""What the compiler makes of every kernel and configuration, for chips that are not here.

Triton compiles ahead of time for any target, in a process without the interpreter: this file run
as a program does that for its share of the variants and prints a report a line. The tests read
from it that no register spills, that shared memory fits and that the matrix units are used.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from kernels import HAS_TRITON, contrastive, mahalanobis, triton  # noqa: E402

# bytes of shared memory a block may have; sm_86 and sm_89 run the code of sm_80 with 101 376
SHARED_LIMIT = {"sm_80": 101_376, "sm_90": 232_448, "gfx942": 65_536}
ELEMENT = {"ieee": "*fp32", "tf32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
IDS = {"n_ptr": "*i64", "pair_ptr": "*i64"}
NUMBERS = dict.fromkeys(("same", "different", "positive_scale", "eps"), "fp32")
NVIDIA = ("sm_80", "sm_90")
PROCESSES = 2


def variants() -> dict[str, tuple]:
    """Name -> (kernel, types, constants, launch options, targets); constants fold to literals."""
    found: dict[str, tuple] = {}
    for kernel in ("_forward", "_backward"):
        for kind, element in ELEMENT.items():
            for ZP in (16, 64, 128, 256, 512):
                if kind == "bf16" and ZP not in (128, 512):
                    continue  # the same tiles and the same size as fp16
                name = kind if kind in ("ieee", "tf32") else "half"
                tile, launch = contrastive.config(kernel, name, ZP)
                targets = NVIDIA + (("gfx942",) if ZP == 128 and kind == "ieee" else ())
                types = IDS | NUMBERS | {"f_ptr": element}
                jit = getattr(contrastive, kernel)
                found[f"contrastive{kernel} {kind} Z={ZP}"] = (jit, types, tile, launch, targets)
    fixed = {"start": 1, "stop": 1, "splits": 1}  # Triton folds an argument that is 1
    tile, launch = contrastive.config("_backward", "ieee", 128)
    types = IDS | NUMBERS
    for kernel, constants in (
        ("_backward", tile | {"start": 1}),
        ("_finish_forward", dict(ZP=128, BM=16) | fixed),
        ("_finish_backward", dict(ZP=128, BM=16, Z=1, splits=1)),
    ):
        jit = getattr(contrastive, kernel)
        options = launch if kernel == "_backward" else {}
        found[f"contrastive{kernel} ieee folded"] = (jit, types, constants, options, NVIDIA)
    for kernel in ("_prepare", "_finish_forward", "_finish_backward"):
        for ZP in (128, 512):
            types = IDS | NUMBERS | {"z_ptr": "*bf16", "f_ptr": "*bf16", "dz_ptr": "*bf16"}
            constants = dict(ZP=ZP, BM=16) | ({"z_col": 1, "c_col": 1} if "prep" in kernel else {})
            jit = getattr(contrastive, kernel)
            found[f"contrastive{kernel} Z={ZP}"] = (jit, types, constants, {}, NVIDIA)
    for images, (BB, BI, BJ, warps, stages) in mahalanobis.CONFIGS.items():
        for kind in ("ieee", "tf32") if BB > 1 else ("ieee",):
            for stored in ("fp32", "bf16"):
                constants = dict(BB=BB, BI=BI, BJ=BJ, PRECISION=kind, x_d=1, mean_d=1, w_j=1)
                launch = dict(num_warps=warps, num_stages=stages)
                targets = NVIDIA + (("gfx942",) if stored == "fp32" and kind == "ieee" else ())
                found[f"mahalanobis {kind} W={stored} B={images}"] = (
                    mahalanobis._distance, {"w_ptr": f"*{stored}"}, constants, launch, targets
                )  # fmt: skip
    return found


def _spilled(ptx: str, target: str) -> int:
    """Bytes that ptxas reports as spilled, stores and loads."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        arch = "sm_90a" if target == "sm_90" else target
        command = [ptxas, "-v", "-arch", arch, source, "-o", Path(folder, "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def compile_one(jit, types, constants, launch, target) -> dict:
    """Compile one kernel for one target and report what the compiler says."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in jit.arg_names:
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(jit.arg_names)
        if signature[name].startswith("*")
    }
    amd = target.startswith("gfx")
    chip = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(jit, signature, constants, aligned)
    built = triton.compile(source, target=chip, options=dict(launch))
    if amd:
        spills = re.findall(r"\.[av]gpr_spill_count:\s+(\d+)", built.asm["amdgcn"])
        return {"shared": built.metadata.shared, "spilled": sum(map(int, spills)), "matrix": -1}
    ptx = built.asm["ptx"]
    matrix = len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx))
    return {"shared": built.metadata.shared, "spilled": _spilled(ptx, target), "matrix": matrix}


def main(share: int) -> None:
    """Compile every PROCESSES-th variant, print one JSON line each."""
    jobs = [(name, v, target) for name, v in variants().items() for target in v[-1]]
    for name, variant, target in jobs[share::PROCESSES]:
        print(json.dumps([name, target, compile_one(*variant[:-1], target)]), flush=True)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], dict]:
    """(variant, target) -> report; compiled once, in processes without the interpreter."""
    if not HAS_TRITON:
        pytest.skip("needs the Triton package")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen([*command, str(k)], env=env, stdout=subprocess.PIPE, text=True)
        for k in range(PROCESSES)
    ]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    assert all(process.returncode == 0 for process in running), "a kernel does not compile"
    return {(name, target): report for name, target, report in map(json.loads, lines)}


def test_every_variant_is_compiled_for_every_target(reports):
    assert set(reports) == {(name, target) for name, v in variants().items() for target in v[-1]}


def test_no_register_spills_on_nvidia(reports):
    bad = {key: r["spilled"] for key, r in reports.items() if r["spilled"] and key[1] in NVIDIA}
    assert not bad


def test_the_kernels_build_for_amd_too(reports):
    names = [name for name, target in reports if target == "gfx942"]
    assert any("forward" in name for name in names) and any("maha" in name for name in names)


def test_shared_memory_fits_the_chip(reports):
    bad = {key: r["shared"] for key, r in reports.items() if r["shared"] > SHARED_LIMIT[key[1]]}
    assert not bad


def test_narrow_products_use_the_matrix_units_and_ieee_ones_do_not(reports):
    for (name, target), report in reports.items():
        if target == "gfx942":
            continue
        narrow = any(kind in name for kind in (" tf32", " fp16", " bf16 "))
        assert (report["matrix"] > 0) == narrow, (name, target, report)


if __name__ == "__main__":
    main(int(sys.argv[1]))
