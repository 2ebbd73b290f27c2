"""What the compiler makes of the kernels, for GPUs that need not be here.

    python -m bench.builds > now.csv                        Z = 128 and the Mahalanobis kernel
    python -m bench.builds --before fc2315f^ > before.csv   the kernels of another commit
    python -m bench.builds --table now.csv before.csv       both as the table of docs/speed.md
    python -m bench.builds --all            every size and dtype that can run, as the tests do

Each row is a kernel for one chip: registers of a thread, bytes spilled, shared memory of a block,
and the instructions that a warp issues in one turn of the inner loop, an ordinary one, which takes
no mask. With 4 schedulers a processor these are `cycles` for 64 x 64 pairs of views (or elements
of W), as long as nothing else is slower. Nothing is run: no time is here. --table takes files of
several versions of Triton.

Z features, ZP of them with padding; chips are sm_80 (A100), 86 and 89 (graphics cards), 90 (H100),
100 (B200) and AMD's gfx942.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import heapq
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import torch

from bench.page import write_block
from kernels import contrastive, mahalanobis, triton

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
# What kernels.precision chooses on each, or 16-bit floats.
WHERE = {
    "half": CHIPS,
    "tf32": CHIPS,
    "tf32x3": ("sm_80", "sm_90", "sm_100"),
    "ieee": ("sm_86", "sm_89", "gfx942"),
}
COLUMNS = "kernel kind Z tile warps stages chip registers spilled shared instructions cycles"
MEASURED = COLUMNS.split()[7:]
TYPES = dict.fromkeys(("same", "different", "positive_scale", "largest", "eps"), "fp32")
TYPES |= {"n_ptr": "*i64", "pair_ptr": "*i64", "id_ptr": "*i32", "partner_ptr": "*i32"}
Variant = tuple[Any, dict, dict, dict, tuple[str, ...]]


def variants(everything: bool, before: str = "") -> Iterator[tuple[str, str, int, Variant]]:
    """Kernel, kind, Z -> (function, types, constants, launch options, chips).

    before: a commit whose kernels are built instead of today's.
    """
    contrastive, mahalanobis = (of_commit(name, before) for name in ("contrastive", "mahalanobis"))
    known = {kind for _, kind in contrastive.CONFIGS} | {"ieee"}
    sizes = (128, 256, 512) if everything else (128,)
    for kernel in ("_forward", "_backward"):
        for kind, chips in WHERE.items():
            for ZP in sizes:
                tile, launch = contrastive.config(kernel, kind if kind in known else "ieee", ZP)
                some = chips if ZP == 128 else tuple(c for c in chips if c in ("sm_80", "sm_90"))
                if ZP > 128 and kind == "tf32x3":
                    some = ("sm_80", "sm_86", "sm_90")  # ieee there
                both = everything and kind == "half" and ZP == 128
                for name in ("bf16", "fp16") if both else ("bf16",):
                    element = f"*{name}" if kind == "half" else "*fp32"
                    shown = name if kind == "half" else kind
                    function = getattr(contrastive, kernel)
                    types = TYPES | {"f_ptr": element}
                    yield f"contrastive{kernel}", shown, ZP, (function, types, tile, launch, some)
    for BB, BI, BJ, warps, stages in mahalanobis.CONFIGS.values():
        for kind in ("tf32", "tf32x3", "ieee") if BB > 1 else ("tf32x3",):
            for stored in ("fp32", "bf16") if everything and kind == "tf32x3" else ("fp32",):
                taken = kind if kind in known else "ieee"
                constants = dict(BB=BB, BI=BI, BJ=BJ, PRECISION=taken, x_d=1, mean_d=1, w_j=1)
                launch = dict(num_warps=warps, num_stages=stages)
                chips = WHERE[kind] if BB > 1 else CHIPS
                types = {"w_ptr": f"*{stored}"}
                variant = (mahalanobis._distance, types, constants, launch, chips)
                yield f"mahalanobis W={stored}", kind, BB, variant
    if everything:
        yield from small_variants()


def small_variants() -> Iterator[tuple[str, str, int, Variant]]:
    """The kernels before and after, and arguments that Triton folds because they are 1 or None."""
    chips = ("sm_80", "sm_90")
    backward = contrastive.config("_backward", "tf32", 128)
    types = TYPES | {"z_ptr": "*bf16", "f_ptr": "*bf16", "dz_ptr": "*fp32"}
    tile = {"ZP": 128, "BM": 16}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("_prepare", tile | {"PRECISION": "ieee", "z_col": 1, "c_col": 1}),
        ("_prepare", {"ZP": 512, "BM": 16, "PRECISION": "tf32"}),
        ("_finish_forward", tile | {"start": 1, "splits": 1}),
        ("_finish_forward", {"ZP": 512, "BM": 16}),
        ("_finish_backward", tile | {"Z": 1, "splits": 1, "unit_ptr": None}),
        ("_finish_backward", {"ZP": 512, "BM": 16}),
        ("_backward", backward[0] | {"start": 1}),
    )
    for name, constants in cases:
        f_type = {"f_ptr": "*fp32"} if constants.get("PRECISION") == "tf32" else {}
        launch = backward[1] if name == "_backward" else {}
        shown = " ".join(f"{k}={v}" for k, v in constants.items())
        variant = (getattr(contrastive, name), types | f_type, constants, launch, chips)
        yield f"contrastive{name} {shown}", "", constants["ZP"], variant


def of_commit(name: str, commit: str) -> Any:
    """kernels/NAME.py, today's or as it was; what it imports is today's."""
    if not commit:
        return {"contrastive": contrastive, "mahalanobis": mahalanobis}[name]
    command = ["git", "show", f"{commit}:kernels/{name}.py"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    file = Path(tempfile.mkdtemp(), f"{name}.py")  # Triton reads the source while it compiles
    file.write_text(text)
    spec: Any = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------- one build


def build(variant: Variant, chip: str, count: bool) -> dict[str, Any]:
    """Compile for the chip, and what registers and memory that takes, and with `count` what
    instructions: reading those takes as long as all the rest."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, types, constants, launch, _ = variant
    signature, aligned = {}, {}
    for k, name in enumerate(function.arg_names):
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
        if signature[name].startswith("*") or name == "span":
            aligned[k,] = [["tt.divisibility", 16]]
    amd = chip.startswith("gfx")
    target = GPUTarget("hip", chip, 64) if amd else GPUTarget("cuda", int(chip[3:]), 32)
    source = ASTSource(function, signature, constants, aligned)
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        built = triton.compile(source, target=target, options=dict(launch))
    found = {"shared": built.metadata.shared, "matrix": -1}
    if amd:
        spills = re.findall(r"\.[av]gpr_spill_count:\s+(\d+)", built.asm["amdgcn"])
        return found | {"spilled": sum(map(int, spills))}
    products = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
    found["matrix"] = len(re.findall(products, built.asm["ptx"]))
    found["registers"] = int(re.findall(r"Used (\d+) registers", log.getvalue())[0])
    found["spilled"] = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    return found | (turn(disassembled(built.asm["cubin"])) if count else {})


def disassembled(cubin: bytes) -> str:
    """The machine's instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command: list[Any] = [tool, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def turn(sass: str) -> dict[str, int]:
    """Instructions on the shortest way through the inner loop that multiplies; none: {}."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    place = {int(address, 16): k for k, (address, _) in enumerate(lines)}
    code = [text for _, text in lines]
    jumps: dict[int, int] = {}
    for k, text in enumerate(code):
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) in place:
            jumps[k] = place[int(jump[1], 16)]
    multiplies = r"MMA" if "MMA" in sass else r"FFMA"
    ways = {}
    for last, head in jumps.items():
        if head < last and any(re.search(multiplies, text) for text in code[head : last + 1]):
            if count := shortest(code, jumps, head, last):
                ways[head, last] = count
    inner = [a for a in ways if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in ways)]
    return {"instructions": max(ways[a] for a in inner)} if inner else {}


def shortest(code: list[str], jumps: dict[int, int], head: int, last: int) -> int:
    """Instructions from `head` to `last` by the shortest way between them; 0: there is none."""
    todo, seen = [(1, head)], set()
    while todo:
        count, k = heapq.heappop(todo)
        if k == last:
            return count
        if k in seen or not head <= k < last:
            continue
        seen.add(k)
        conditional = code[k].startswith("@") or re.search(r"BRA\S*\s+!?U?P\d", code[k])
        if k in jumps:
            heapq.heappush(todo, (count + 1, jumps[k]))
        if k not in jumps or conditional:
            heapq.heappush(todo, (count + 1, k + 1))
    return 0


# ---------------------------------------------------------------------------- the program


def rows(
    everything: bool, share: int = 0, shares: int = 1, *, before: str = ""
) -> Iterator[dict[str, Any]]:
    """Every `shares`-th build from number `share` on, as COLUMNS and the matrix instructions."""
    jobs = [(what, chip) for what in variants(everything, before) for chip in what[3][4]]
    for (kernel, kind, Z, variant), chip in jobs[share::shares]:
        _, _, constants, launch, _ = variant
        sides = [constants[s] for s in ("BB", "BM", "BI", "BN", "BJ") if s in constants]
        row: dict[str, Any] = {"kernel": kernel, "kind": kind, "Z": Z, "chip": chip}
        row |= {"tile": " x ".join(map(str, sides))}
        row |= {name: launch.get(f"num_{name}", "") for name in ("warps", "stages")}
        row |= build(variant, chip, count=not everything or (kind == "bf16" and Z == 128))
        if "instructions" in row and len(sides) > 1:
            per_64 = 64 * 64 / (sides[-1] * sides[-2])
            row["cycles"] = round(row["instructions"] * row["warps"] / 4 * per_64)
        yield row


def table(files: Sequence[str]) -> list[str]:
    """The lines of a table in Markdown, from rows in CSV files; "a / b" where versions of Triton
    differ, the newest first."""
    chips: dict[tuple, dict[tuple, dict[str, str]]] = {}
    for file in files:
        for row in csv.DictReader(Path(file).read_text().splitlines()):
            if row["chip"].startswith("gfx"):  # whose assembler says less
                continue
            if row["before"] and row["matrix"] == "0":  # the loop of its FFMAs is not always found
                row["cycles"] = ""
            of = row["kernel"].split()[0].replace("_", " "), row["kind"], row["Z"], row["chip"]
            chips.setdefault(of, {})[bool(row["before"]), row["triton"]] = row
    versions = sorted({triton for rows in chips.values() for _, triton in rows}, reverse=True)

    def cell(rows: dict[tuple, dict[str, str]], before: bool, column: str) -> str:
        values = [rows.get((before, version), {}).get(column) for version in versions]
        return " / ".join(dict.fromkeys(f"{int(v):,}" if v else "-" for v in values))

    alike: dict[tuple, list[str]] = {}  # chips with the same cells
    for (kernel, kind, Z, chip), rows in chips.items():
        now = next(row for (before, _), row in rows.items() if not before)
        size = f" of {Z}" * (kernel == "mahalanobis")
        cells = [f"{kernel}{size}, {kind}", f"{now['tile']}, {now['warps']}, {now['stages']}"]
        cells += [cell(rows, False, column) for column in MEASURED]
        cells += [cell(rows, True, column) for column in MEASURED if column != "instructions"]
        alike.setdefault(tuple(cells), []).append(chip)
    head = ["kernel, products", "chip", "tile, warps, stages", *MEASURED, "before: registers"]
    lines = [f"Triton {' / '.join(versions)}:", "", [*head, "spilled", "shared", "cycles"]]
    lines.append(["---"] * len(lines[-1]))
    lines += [[cells[0], ", ".join(names), *cells[1:]] for cells, names in alike.items()]
    return [line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every size and dtype that can run")
    what.add_argument("--before", default="", metavar="COMMIT", help="build that commit's kernels")
    what.add_argument("--table", nargs="+", metavar="CSV", help="rewrite the table from these rows")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="share K of R, K from 0")
    args = parser.parse_args()
    if not 0 <= args.share[0] < args.share[1]:
        parser.error(f"--share {args.share[0]} {args.share[1]}: the first is 0 to the second - 1")
    if args.table:
        write_block("bench.builds", table(args.table))
        return
    writer = csv.DictWriter(sys.stdout, [*COLUMNS.split(), "matrix", "before", "triton", "torch"])
    writer.writeheader()
    about = {"before": args.before, "triton": triton.__version__, "torch": torch.__version__}
    for row in rows(args.all, *args.share, before=args.before):
        writer.writerow(row | about)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
