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
from support.data import Window, extremes, window_of
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

    text:    --window.   saved: config.json, whose range is the run's.
    returns: None if no image has more than 8 bits.
    raises:  ValueError, naming a file, for negative, infinite or NaN values without --window.
    """
    given = parse_window(text) or (saved or {}).get("values_shown")
    if given:
        return given
    deep = [path for path in paths if path.suffix.lower() not in EIGHT_BITS]
    least, most, floating, found = math.inf, -math.inf, False, 0
    for path, values in progress(ahead(extremes, deep), len(deep), "value ranges"):
        if values is None:
            continue
        found += 1
        if values[0] < 0:
            what = "infinite or NaN" if math.isinf(values[0]) else "negative"
            hint = "set those of black and white with --window LOW,HIGH (CT: -160,240)"
            if saved:
                hint = "the run knows images of 8 bits only, so convert it to 8 bits first"
            raise ValueError(f"{path}: holds {what} values; {hint}")
        least, most = min(least, values[0]), max(most, values[1])
        floating = floating or values[2]
    if not found:
        return None
    window = window_of(most, floating)
    notify(
        f"{found} images of more than 8 bits, values {least:g} to {most:g}: {window[0]:g} is black "
        f"and {window[1]:g} white in all of them (--window LOW,HIGH sets it)"
    )
    return window
