"""What the numbers of a run or a benchmark depend on besides its options."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import torch


def versions(device: str) -> dict[str, str]:
    """Commit, versions, the device's processor, and threads."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "processor": processor(device),
        "threads": str(torch.get_num_threads()),
    }


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
