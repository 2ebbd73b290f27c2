"""One range of values for a whole set of images of more than 8 bits: CT, 16-bit scans, floats.

Decided once, before decoding, and kept in config.json: scaled file by file, one bright pixel would
darken the rest of its image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.cache import ahead
from support.data import Window, extremes, is_deep_file, window_of
from support.progress import notify, progress

EIGHT_BITS = {".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp"}  # always


def parse_window(text: str) -> Window | None:
    """--window LOW,HIGH; None for "".   raises: ValueError naming the option."""
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high and high - low < math.inf):
        raise ValueError(f"--window must be two numbers, LOW < HIGH, as in -160,240, got {text!r}")
    return low, high


def window_of_set(
    paths: Sequence[Path], text: str, saved: Mapping[str, Any] | None = None
) -> Window | None:
    """The values of black and white of all images of more than 8 bits, and a line that says so.

    A second line warns of images of both depths, or of another depth than the run's.

    text:    --window.   saved: config.json, whose range is the run's.
    returns: None if no image has more than 8 bits.
    raises:  ValueError, naming a file, for negative, infinite or NaN values without --window.
    """
    if given := parse_window(text):
        return given
    of_run = (saved or {}).get("values_shown")
    unsure = [path for path in paths if path.suffix.lower() not in EIGHT_BITS]
    looked = progress(ahead(is_deep_file, unsure), len(unsure), "looking for more than 8 bits")
    deep = [path for path, is_so in looked if is_so]
    if 0 < len(deep) < len(paths):
        notify(
            f"warning: {len(deep)} of {len(paths)} images have more than 8 bits, such as "
            f"{deep[0]}; the others have 8, and may differ in brightness for that alone"
        )
    if saved and not saved.get("window") and bool(of_run) != bool(deep):
        words = ("8 bits", "more than 8")[:: -1 if of_run else 1]
        notify(f"warning: the run's images have {words[0]}, but these have {words[1]}")
    return of_run or (_range_of(deep, bool(saved)) if deep else None)


def _range_of(deep: Sequence[Path], of_a_run: bool) -> Window | None:
    """The range that holds the values of all images of more than 8 bits."""
    least, most, floating = math.inf, -math.inf, False
    for path, values in progress(ahead(extremes, deep), len(deep), "value ranges"):
        if values is None:
            continue
        if values[0] < 0:
            what = "infinite or NaN" if math.isinf(values[0]) else "negative"
            hint = "set those of black and white with --window LOW,HIGH (CT: -160,240)"
            if of_a_run:
                hint = "the run knows images of 8 bits only, so convert it to 8 bits first"
            raise ValueError(f"{path}: holds {what} values; {hint}")
        least, most = min(least, values[0]), max(most, values[1])
        floating = floating or values[2]
    if least > most:  # none could be read
        return None
    window = window_of(most, floating)
    hint = "" if of_a_run else " (--window LOW,HIGH sets it)"
    notify(
        f"{len(deep)} images of more than 8 bits, values {least:g} to {most:g}: {window[0]:g} is "
        f"black and {window[1]:g} white in all of them{hint}"
    )
    return window
