"""The one training loop, of the pre-training and of IGD: checkpoints, log; the initial weights.

A training is an object with
    name, rate_option     for messages: "", "local", "IGD global"; the option that lowers its rate
    networks              the module that all processes train together; without it, one does alone
    total, steps          steps in all and an epoch
    step_done, images     steps done, and images of a step, over all processes
    start_rate, rate      the learning rate that the option sets, and that of the next step
    losses()              the terms of the next step, whose sum is the loss
    update(terms)         back-propagates their sum, steps, and counts the step
    end_epoch()           more columns for the epoch's row of the log; it may be missing
    state_dict(), load_state_dict(state)
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder import Encoder, ResNet18
from support.claim import deferred
from support.progress import Meter, notify
from support.readers import all_finite
from support.run import (
    as_in_first_process,
    averaged,
    ranks,
    read_saved,
    save_atomically,
    short_of_memory,
    write_rows,
)

SAVE_EVERY = 60.0  # seconds between checkpoints
FORMAT = 2  # of a checkpoint; raise it when a step draws other numbers than before


def train(
    training: Any, checkpoint: Path, log: Path, *, save_every: float = SAVE_EVERY
) -> list[dict[str, float]]:
    """Take the steps that are left, and keep a checkpoint and a log.

    training:   as above; it resumes from the checkpoint if there is one.
    checkpoint: .pt file.   log: .csv file, a row an epoch.   save_every: seconds.
    returns:    the rows of the log.
    raises:     FloatingPointError when a loss or a weight is not finite, with the last good
                checkpoint kept; ValueError for a checkpoint of other images or settings;
                KeyboardInterrupt, with a checkpoint, after the step in which a signal came.
    """
    networks = getattr(training, "networks", None)
    with deferred(together=networks is not None) as asked:
        sums, rows = load(training, checkpoint) if checkpoint.exists() else ({}, [])
        if rows and ranks()[0] == 0:
            write_rows(log, rows)  # a kill may have come between the two files
        losses = averaged(training.losses, networks) if networks else training.losses
        meter = Meter(training.step_done, training.total, training.images)
        saved = time.monotonic()
        while training.step_done < training.total:
            epoch, position = divmod(training.step_done, training.steps)
            rate, values = training.rate, step(training, losses, checkpoint)
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
            means = {name: value / (position + 1) for name, value in sums.items()} | {"lr": rate}
            last = position + 1 == training.steps
            where = f"{training.name} epoch {epoch + 1}/{training.total // training.steps}"
            meter.show(training.step_done, where.lstrip(), means, last=last)
            if last:
                row = {"epoch": epoch + 1, **means, "images_per_second": meter.rate}
                rows.append(row | _end_epoch(training, checkpoint))
                sums = {}
            done = training.step_done == training.total
            stop = asked()
            due = done or stop or time.monotonic() - saved > save_every
            if due and ranks()[0] == 0:
                save(training, checkpoint, sums, rows)
                if rows:
                    write_rows(log, rows)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    if networks:
        as_in_first_process(networks)
    return rows


def step(
    training: Any, losses: Callable[[], dict[str, Tensor]], checkpoint: Path
) -> dict[str, float]:
    """One step on `losses`, the training's own or those of several processes; each term's value.

    The one place where a step waits for a GPU, for the forward pass; the backward pass continues.

    raises: FloatingPointError when a term was not finite; then the weights are not finite either.
    """
    terms = losses()
    read = _reading(torch.stack([term.detach() for term in terms.values()]))
    training.update(terms)
    numbers = read()
    values = dict(zip(terms, numbers, strict=True))
    if not all(map(math.isfinite, numbers)):
        epoch, position = divmod(training.step_done - 1, training.steps)
        raise FloatingPointError(
            f"{training.name} the loss is not finite in epoch {epoch + 1}, step {position + 1} "
            f"({values}): {_remedy(training, checkpoint, training.step_done - 1)}".lstrip()
        )
    return values


def _reading(values: Tensor) -> Callable[[], list[float]]:
    """Read the values as they are now: wait for them, and for nothing that a GPU does later."""
    if not values.is_cuda:
        return values.tolist
    copy, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


def _remedy(training: Any, checkpoint: Path, done: int) -> str:
    """What to change (the rate, only if a step was taken at it), and which state is kept."""
    kept = f"the last good state is kept in {checkpoint}"
    config = getattr(training, "config", None)
    rate = training.start_rate
    change = f"lower {training.rate_option} ({rate:g})"
    if config is not None and rate * config.weight_decay > 1:
        change = f"lower --weight-decay ({config.weight_decay:g})"
    elif done == 0:
        change = "no step was taken, so the rate is not to blame: the options of the loss are"
    return f"{change}; {kept if checkpoint.exists() else 'no state was saved yet'}"


def save(training: Any, checkpoint: Path, sums: Mapping[str, float], rows: list) -> None:
    """raises: FloatingPointError, with the old file kept, if a weight is not finite."""
    state = training.state_dict()
    if not all_finite(state):
        raise _not_finite("a weight", training, checkpoint)
    save_atomically({**state, "format": FORMAT, "sums": dict(sums), "log": rows}, checkpoint)


def _not_finite(what: str, training: Any, checkpoint: Path) -> FloatingPointError:
    return FloatingPointError(
        f"{training.name} {what} is not finite after step {training.step_done}: "
        f"{_remedy(training, checkpoint, training.step_done)}".lstrip()
    )


def _end_epoch(training: Any, checkpoint: Path) -> dict[str, float]:
    """raises: FloatingPointError if PaDiM, which measures the encoder, cannot use its features."""
    try:
        return training.end_epoch() if hasattr(training, "end_epoch") else {}
    except ValueError:
        raise _not_finite("a feature", training, checkpoint) from None


def load(training: Any, checkpoint: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Restore the training from its checkpoint; the sums of its epoch, and its log.

    raises: OSError or ValueError, naming the file.
    """
    state = read_saved(checkpoint, "checkpoint", "cpu")  # where Adam keeps its count of steps
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint}: a checkpoint of another version of this program; finish the run with "
            "that version, or begin another"
        )
    try:
        return _restore(training, state)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    except Exception as error:  # whatever is missing or of another shape
        if short_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ValueError(
            f"{checkpoint}: a damaged checkpoint, or of other settings ({reason}); move it away"
        ) from None


def _restore(training: Any, state: dict[str, Any]) -> tuple[dict[str, float], list]:
    """raises: ValueError or anything else if the state does not fit this training."""
    if not all_finite(state):
        raise ValueError("a damaged checkpoint: some weights are not finite; move it away")
    sums, rows = state["sums"], state["log"]
    numbers = [*sums.values(), *(value for row in rows for value in row.values())]
    if not all(isinstance(value, int | float) for value in numbers):
        raise TypeError("the log holds something that is not a number")
    training.load_state_dict(state)
    if not (type(training.step_done) is int and 0 <= training.step_done <= training.total):
        raise ValueError(f"a damaged checkpoint: step {training.step_done} of {training.total}")
    return sums, rows


IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
WAIT = 20.0  # seconds for the server to answer
_failed: list[Exception] = []  # a table's runs try once


def _imagenet() -> dict[str, Tensor]:
    """torch.hub's weights, cached or downloaded now.   raises: OSError, RuntimeError."""
    if _failed:
        raise _failed[0]
    if not Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET).name).exists():
        notify(f"downloading ImageNet's weights, 45 MB; the server has {WAIT:.0f} s to answer")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT)
    try:
        return torch.hub.load_state_dict_from_url(
            IMAGENET, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        _failed.append(error)
        raise
    finally:
        socket.setdefaulttimeout(before)


def start_weights(backbone: ResNet18, init: str) -> str:
    """Fill the backbone as --init says.   [P!§4.2 R14]

    init:    "random" leaves it as it is; "imagenet" insists on torch.hub's cached or downloaded
             weights and "auto" does without them; else a file in torchvision's format.
    returns: what the network starts from: "random", "imagenet" or the file's name.
    raises:  ValueError if ImageNet's weights are unavailable, or the file is not a ResNet-18.
    """
    if init == "random":
        return init
    if init in ("auto", "imagenet"):
        try:
            weights = _imagenet()
        except (OSError, RuntimeError) as error:  # no network, or a damaged download
            if init == "imagenet":
                raise ValueError(
                    f"--init imagenet: no weights from {IMAGENET} ({error}); put that file into "
                    f"{torch.hub.get_dir()}/checkpoints, or use --init random"
                ) from None
            notify(
                "no ImageNet weights, neither cached nor from the server: random initial weights"
            )
            return "random"
        backbone.load_state_dict(weights)
        return "imagenet"
    _fill(backbone, Path(init), f"--init {init}")
    return Path(init).name


def _fill(backbone: ResNet18, file: Path, given: str) -> None:
    """Take the weights of a file.   raises: ValueError that begins with `given`."""
    try:
        weights = read_saved(file, "state dict", "cpu")
        backbone.load_state_dict(weights)
    except OSError as error:
        raise ValueError(f"{given}: {error.strerror}") from None
    except Exception as error:  # whatever the file holds, it may be anything
        if short_of_memory(error):
            raise
        raise ValueError(
            f"{given}: no state dict of a resnet18; give a run's encoder.pt or torchvision's"
        ) from None
    if not all_finite(weights):
        raise ValueError(f"{given}: some weights are infinite or NaN")


def encoder_of(folder: Path, name: str, device: str) -> tuple[Encoder, str]:
    """Another run's encoder, with heads that nothing has trained.   raises: ValueError."""
    file, encoder = folder / name, Encoder()
    if not file.is_file():
        remedy = "; train it with --detector both, or add --local no" if "local" in name else ""
        raise ValueError(f"--encoder {folder}: there is no {name} here{remedy}")
    _fill(encoder.backbone, file, f"--encoder {folder}: {name}")
    return encoder.to(device).eval(), f"the encoder of {folder.name}"


def check_start(encoder: str, init: str, folder: Path, *, local: bool = False) -> None:
    """Try --encoder or --init before an image is read.

    folder:  of the run; one with its checkpoints needs --init no more.
    local:   an encoder of patches is needed, too.
    raises:  ValueError or OSError as `encoder_of` and `start_weights`.
    """
    if encoder:
        for name in ("encoder.pt", "encoder_local.pt")[: 1 + local]:
            encoder_of(Path(encoder), name, "cpu")
    elif init not in ("auto", "imagenet") and not all(
        (folder / f"checkpoint{part}.pt").exists() for part in ("", "_local")[: 1 + local]
    ):
        start_weights(ResNet18(), init)
