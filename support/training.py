"""The one training loop, of the pre-training and of IGD: checkpoints, log, progress; start weights.

A training is an object with
    name, rate_option     for messages: "", "local", "IGD global"; the option that lowers its rate
    device                where it runs
    total, steps          steps in all and an epoch
    step_done, images     steps done, and images of a step, over all processes
    rate                  the learning rate of the next step
    losses()              the terms of the next step, whose sum is the loss
    update(terms)         back-propagates their sum, steps, and counts the step
    end_epoch()           more columns for the epoch's row of the log
    state_dict(), load_state_dict(state)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder import ResNet18
from support.progress import Meter, say
from support.run import ranks, read_saved, save_atomically, write_rows

SAVE_EVERY = 60.0  # seconds between checkpoints
FORMAT = 2  # of a checkpoint; raise it when a step draws other numbers than before


def train(
    training: Any, checkpoint: Path, log: Path, *, save_every: float = SAVE_EVERY
) -> list[dict[str, float]]:
    """Take the steps that are left, and keep a checkpoint and a log.

    training:   as above; it goes on from the checkpoint if there is one.
    checkpoint: .pt file.   log: .csv file, a row an epoch.   save_every: seconds.
    returns:    the rows of the log.
    raises:     FloatingPointError when a loss or a weight is not finite, with the last good
                checkpoint kept; ValueError for a checkpoint of other images or settings.
    """
    sums, rows = load(training, checkpoint) if checkpoint.exists() else ({}, [])
    meter = Meter(training.step_done, training.total, training.images, training.device)
    saved = time.monotonic()
    while training.step_done < training.total:
        epoch, position = divmod(training.step_done, training.steps)
        rate, values = training.rate, step(training, checkpoint)
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        means = {name: value / (position + 1) for name, value in sums.items()} | {"lr": rate}
        last = position + 1 == training.steps
        where = f"{training.name} epoch {epoch + 1}/{training.total // training.steps}".lstrip()
        meter.show(training.step_done, where, means, last=last)
        if last:
            row = {"epoch": epoch + 1, **means, "images_per_second": meter.rate}
            rows.append(row | training.end_epoch())
            sums = {}
        due = training.step_done == training.total or time.monotonic() - saved > save_every
        if due and ranks()[0] == 0:
            save(training, checkpoint, sums, rows)
            if rows:
                write_rows(log, rows)
            saved = time.monotonic()
    return rows


def step(training: Any, checkpoint: Path) -> dict[str, float]:
    """One step; the value of each term before it.

    raises: FloatingPointError when a term is not finite, before the weights are touched.
    """
    terms: dict[str, Tensor] = training.losses()
    numbers = torch.stack([term.detach() for term in terms.values()]).tolist()  # one wait
    values = dict(zip(terms, numbers, strict=True))
    if not all(map(math.isfinite, numbers)):
        epoch, position = divmod(training.step_done, training.steps)
        raise FloatingPointError(
            f"{training.name} the loss is not finite in epoch {epoch + 1}, step {position + 1} "
            f"({values}): {_remedy(training, checkpoint)}".lstrip()
        )
    training.update(terms)
    return values


def _remedy(training: Any, checkpoint: Path) -> str:
    kept = f"the last good state is kept in {checkpoint}"
    return (
        f"lower {training.rate_option} ({training.rate:g}); "
        f"{kept if checkpoint.exists() else 'no state was saved yet'}"
    )


def save(training: Any, checkpoint: Path, sums: Mapping[str, float], rows: list) -> None:
    """raises: FloatingPointError, with the old file kept, if a weight is not finite."""
    state = training.state_dict()
    if not all(t.isfinite().all() for t in _tensors(state) if t.is_floating_point()):
        raise FloatingPointError(
            f"{training.name} a weight is not finite after step {training.step_done}: "
            f"{_remedy(training, checkpoint)}".lstrip()
        )
    save_atomically({**state, "format": FORMAT, "sums": dict(sums), "log": rows}, checkpoint)


def _tensors(state: Any) -> list[Tensor]:
    """The tensors of nested dictionaries and lists."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, Mapping) else state
    nested = parts if isinstance(state, Mapping | list | tuple) else ()
    return [tensor for part in nested for tensor in _tensors(part)]


def load(training: Any, checkpoint: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Put the training where the checkpoint was; the sums of its epoch, and its log.

    raises: OSError or ValueError, naming the file.
    """
    state = read_saved(checkpoint, "checkpoint", training.device)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint}: a checkpoint of another version of this program; finish the run with "
            "that version, or begin another"
        )
    try:
        training.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    return state["sums"], state["log"]


IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def start_weights(backbone: ResNet18, init: str) -> str:
    """Fill the backbone as --init says.   [P!§4.2 R14]

    init:    "random" leaves it as it is; "imagenet" insists on torch.hub's cached or downloaded
             weights and "auto" goes on without them; else a file in torchvision's format.
    returns: what the network starts from: "random", "imagenet" or the file's name.
    raises:  ValueError if ImageNet's weights cannot be had, or the file is no ResNet-18.
    """
    if init == "random":
        return init
    if init in ("auto", "imagenet"):
        try:
            weights = torch.hub.load_state_dict_from_url(
                IMAGENET, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:  # no network, or a damaged download
            if init == "imagenet":
                raise ValueError(
                    f"--init imagenet: no weights from {IMAGENET} ({error}); put that file into "
                    f"{torch.hub.get_dir()}/checkpoints, or use --init random"
                ) from None
            say("ImageNet weights are neither cached nor to be downloaded: random start weights")
            return "random"
        backbone.load_state_dict(weights)
        return "imagenet"
    try:
        backbone.load_state_dict(read_saved(init, "state dict", "cpu"))
    except OSError as error:
        raise ValueError(f"--init {init}: {error.strerror}") from None
    except Exception:  # whatever the file holds, it may be anything
        raise ValueError(
            f"--init {init}: no state dict of a resnet18; give a run's encoder.pt or torchvision's"
        ) from None
    return Path(init).name
