"""The launches and waits of a training step on a GPU, counted without one.

Tensors on the meta device stand for those of a GPU: they have no numbers, so whatever asks for one
is found. A launch is an operation of ATen on such tensors that is no view; CUDA may take two for
it. A wait is for a number or a shape that only the GPU knows, or for a copy to it, unless that is
non_blocking and its memory is pinned, or SMALL: then it is staged at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pmsacl
from support.options import Config
from support.training import step

SMALL = 2**16  # bytes
ROOT = str(Path(__file__).resolve().parent.parent)
NO_KERNEL = {"detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
NO_KERNEL |= {"new_empty_strided", "_unsafe_view", "_reshape_alias", "is_same_size"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
SHAPES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"}


class Launches(TorchDispatchMode):
    """While the block runs: how often each line of ours launches something, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.pinned: list[Tensor] = []

    def __enter__(self) -> Any:
        """A tensor made on a GPU from Python numbers is copied there, and waited for."""
        new_tensor, tensor = Tensor.new_tensor, torch.tensor

        def counted_new(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._count(self.waits, like.is_meta)
            return new_tensor(like, *args, **kwargs)

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self._count(self.waits, str(kwargs.get("device")) == "meta")
            return tensor(*args, **kwargs)

        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(Tensor, "new_tensor", counted_new))
        self.patches.enter_context(mock.patch.object(torch, "tensor", counted))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if "pin_memory" in name:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        on_gpu = any(t.is_meta for t in given)
        if on_gpu and (name == "_local_scalar_dense" or name in SHAPES):
            self._count(self.waits)
            any_value = torch.ones(given[0].shape, dtype=given[0].dtype)
            return 0 if name == "_local_scalar_dense" else func(any_value, *args[1:], **kwargs)
        if on_gpu and name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            self._count(self.waits)  # of its numbers: any will do
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        if on_gpu and name in INDEXING:
            args = (args[0], self._indices(args[1]), *args[2:])
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in given + made):
            return result
        unblocked = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        for host in (t for t in given if not t.is_meta and (t.ndim or name == "_to_copy")):
            staged = host.nbytes <= SMALL or any(host is t for t in self.pinned)
            self._count(self.waits, not (unblocked and staged))
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self._count(self.launches, not view and name not in NO_KERNEL)
        return result

    def _indices(self, indices: Any) -> list[Tensor | None]:
        """Each mask counted, and one on the GPU then taken for true everywhere."""
        listed: list[Tensor | None] = []
        for index in indices if isinstance(indices, list) else [indices]:
            if index is None or index.dtype != torch.bool:
                listed.append(index)
            else:
                self._count(self.waits)
                known = torch.ones(index.shape) if index.is_meta else index
                listed += [i.to("meta") for i in known.nonzero().unbind(1)]
        return listed

    def _count(self, counter: Counter[str], times: int = 1) -> None:
        """At the innermost line of ours."""
        frame: FrameType | None = sys._getframe(2)
        while frame and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        counter[f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "elsewhere"] += times


def of_step(
    config: Config, images: np.ndarray, *, resident: bool = True
) -> tuple[Launches, Launches]:
    """A step of the pre-training but for SGD and eq. 5's kernel, and its encoder's passes alone.

    config:   with "meta" as its device.   images: (N, 3, S, S) uint8.
    resident: whether the GPU has room for the images.
    """
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.autocast": lambda *_, **__: contextlib.nullcontext(),  # knows no meta device
            "torch.cuda.mem_get_info": lambda device: (10 * resident * images.nbytes, 0),
            "medmix.Generator": lambda device: torch.Generator(),
            "pmsacl.contrastive": lambda z, n, pair, c, **options: (z - c[n]).square().mean(),
        }.items():
            stack.enter_context(mock.patch(name, value))
        training = pmsacl.Pretraining(images, config)
        training.c, training.step_done = torch.zeros(config.classes, 128, device="meta"), 1
        stack.enter_context(mock.patch.object(training.optimiser, "step"))
        with Launches() as whole:
            step(training, training.losses, Path("none"))
        views = torch.empty(2 * config.classes * training.batch, *images.shape[1:], device="meta")
        training.encoder.zero_grad(set_to_none=True)
        with Launches() as network:
            training.encoder(views).sum().backward()
    return whole, network


def _is_ours(file: str) -> bool:
    """Not of a package, whose environment may lie in this folder too."""
    return file.startswith(ROOT) and "site-packages" not in file
