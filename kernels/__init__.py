"""Fused operations of the method: `contrastive` (eq. 4-7) and `mahalanobis` (eq. 13).

Each file holds, in this order: the definition (eq. 4-7's is in losses.py), the Triton kernels,
autograd, one public function. Triton is optional: without it (macOS, Windows) everything runs on
the torch path. It is imported once, here: kernels are *defined* anywhere, compiled where they run.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton: Any = SimpleNamespace(jit=lambda function: function)  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]
    HAS_TRITON = False


@triton.jit
def tf32(x):
    """x rounded to the 10 bits of its mantissa that a matrix unit reads, ties away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


def precision(device: torch.device, allow_tf32: bool) -> str:
    """How `tl.dot` takes float32: "tf32" rounds to 10 bits, "tf32x3" splits into two such parts;
    "ieee" is for chips without tf32 and graphics cards, where three passes are no faster."""
    if device.type == "cpu":  # the interpreter
        return "tf32" if allow_tf32 else "tf32x3"
    chip = torch.cuda.get_device_capability(device)
    if torch.version.hip or chip < (8, 0):
        return "ieee"
    if allow_tf32:
        return "tf32"
    return "tf32x3" if chip in ((8, 0), (9, 0)) or chip[0] == 10 else "ieee"


def choose_backend(backend: str, device: torch.device) -> str:
    """auto: "triton" on a GPU where Triton is installed, "torch" everywhere else.

    raises: ValueError if the name is unknown or "triton" cannot run here; it says what to do.
    """
    if backend == "auto":
        return "triton" if HAS_TRITON and device.type == "cuda" else "torch"
    if backend == "torch":
        return backend
    if backend != "triton":
        raise ValueError(f'backend must be "auto", "torch" or "triton", got {backend!r}')
    if not HAS_TRITON:
        raise ValueError(
            'backend="triton" needs the Triton package, which is not installed: '
            'pip install triton (Linux with a GPU), or use backend="torch"'
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend="triton" needs tensors on a GPU, got {device.type}: move them with .cuda(), '
            'use backend="torch", or set TRITON_INTERPRET=1 before the import to debug on a CPU'
        )
    return backend
