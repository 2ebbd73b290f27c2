"""Read what a run has written, and refuse what it cannot have written: one line, no traceback.

config.json, results.json and detector files; a checkpoint is checked in training.py, the cache in
cache.py, data.json in layouts.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder import ResNet18
from support.healthy import of_state
from support.progress import notify
from support.run import read_json, short_of_memory
from support.tables import measured

CONFIG = ("image_size", "seed", "data")  # what every version has written
MOST_PIXELS = 4096  # a side


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json, {} if there is none.

    raises: ValueError if it is damaged, lacks what every run has, or holds an impossible value.
    """
    from support.options import Config  # which reads configs through this module

    path = folder / "config.json"
    if not path.is_file():
        return {}
    saved = read_json(path)
    missing = [name for name in CONFIG if name not in saved]
    if missing:
        raise ValueError(
            f"{path}: has no {', '.join(missing)}: damaged, or of an older version of this program"
        )
    known = {n: value for n, value in saved.items() if n in Config.__dataclass_fields__}
    for name, value in known.items():
        wanted = type(Config.__dataclass_fields__[name].default)
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            kind = {"str": "text", "int": "an integer", "float": "a number"}
            what = kind.get(wanted.__name__, "true or false")
            raise ValueError(f"{path}: {name} must be {what}, is {short(value)}")
    try:
        Config(**known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    window = saved.get("values_shown")
    if window is not None and not (_is_pair(window) and window[0] < window[1]):
        raise ValueError(f"{path}: values_shown must be LOW < HIGH, is {short(window)}")
    return saved


def short(value: Any) -> str:
    """For a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


ROW_NUMBERS = ("image_auroc", "specificity", "sensitivity", "accuracy", "threshold")
ROW_COUNTS = ("validation_normal", "validation_abnormal", "test_normal", "test_abnormal")


def read_results(folder: Path) -> dict[str, Any]:
    """A run's results.json, {} if there is none, without rows of an older version of this program.

    raises: ValueError if a measure in the row of a detector is not a finite number.
    """
    path = folder / "results.json"
    results = read_json(path)
    for name, row in measured(results).items():
        wrong = [key for key in ROW_NUMBERS if not _is_number(row.get(key, 0))]
        counts = row.get("images", dict.fromkeys(ROW_COUNTS, 0))
        if not isinstance(counts, dict) or not all(_is_number(counts.get(k)) for k in ROW_COUNTS):
            wrong.append("images")
        if not isinstance(row.get("notes", []), list):
            wrong.append("notes")
        pairs = ("map_scale", "image_auroc_interval")
        wrong += [key for key in pairs if not _is_pair(row.get(key, [0, 1]))]
        if wrong:
            raise ValueError(
                f"{path}: {name} has no usable {', '.join(wrong)}: damaged; evaluate the run again "
                "without that file"
            )
        if not row.keys() >= {*ROW_NUMBERS, "images", "notes", "image_auroc_interval"}:
            notify(f"left out: the row {name} of {path}, of an older version of this program")
            del results[name]
    seconds = results.get("seconds", {})
    if not isinstance(seconds, dict) or not all(map(_is_number, seconds.values())):
        raise ValueError(f"{path}: seconds is damaged; evaluate the run again without that file")
    return results


def folder_of_other(folder: Path, root: Path) -> Path:
    """RUN/eval-NAME of another data set; with a number if one of the same name has it already."""
    number, to = 1, folder / f"eval-{root.name}"
    while True:
        sources = {row.get("data", {}).get("root") for row in measured(read_results(to)).values()}
        if not sources or sources == {str(root)}:
            return to
        number += 1
        to = folder / f"eval-{root.name}-{number}"


def all_finite(state: Any) -> bool:
    """Whether no tensor of nested dictionaries and lists is infinite or NaN."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    parts = state.values() if isinstance(state, Mapping) else state
    return not isinstance(state, Mapping | list | tuple) or all(map(all_finite, parts))


def build_detector(
    state: Any, kinds: Mapping[str, Any], path: str | Path, device: str | torch.device
) -> Any:
    """The detector of a state, tried on an image.

    kinds:  "kind" of a state -> class.
    raises: ValueError, naming the file, if the state lacks something, does not fit together, or
            holds what is not finite.
    """
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError(f"{path}: not a detector file")
    if not isinstance(state["kind"], str) or state["kind"] not in kinds:
        raise ValueError(f"{path}: holds a detector of unknown kind {short(state['kind'])}")
    kind = kinds[state["kind"]]
    settings = state.get("settings")
    size = settings.get("image_size") if isinstance(settings, dict) else state.get("size")
    if not (type(size) is int and 32 <= size <= MOST_PIXELS):
        raise ValueError(f"{path}: a detector for images of {short(size)} pixels, or a damaged one")
    if not all_finite(state):
        raise ValueError(f"{path}: a damaged detector: some weights are not finite")
    try:
        start = ResNet18().to(device) if getattr(kind, "pretrained", False) else device
        detector = kind.of(state, start)
        detector.healthy = of_state(state.get("healthy"))
        maps, scores = detector.score(np.zeros((1, 3, size, size), np.uint8))
    except Exception as error:  # whatever is missing or of another shape
        if short_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{path}: a damaged detector, or of another version of this program ({reason[:160]})"
        ) from None
    of_size = maps is None or (maps.shape == (1, size, size) and bool(maps.isfinite().all()))
    if not (of_size and scores.isfinite().all()):
        raise ValueError(f"{path}: a damaged detector: its scores are not finite")
    return detector
