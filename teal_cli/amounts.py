"""Amounts, rates and times as a person reads them."""

from __future__ import annotations

import math


def format_amount(amount: float, unit: str) -> str:
    """An amount with its unit: bytes in powers of 1000, anything else as a number."""
    if unit != "B":
        digits = 0 if amount >= 10 or amount == int(amount) else 1
        return f"{amount:.{digits}f} {unit}"
    if amount < 1000:
        return f"{amount:.0f} B"
    power = min(int(math.log10(amount) // 3), 4)
    return f"{amount / 1000**power:.1f} {' kMGT'[power]}B"


def format_seconds(seconds: float) -> str:
    """A duration as people read it: 0.3 s, 42 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_rate(per_s: float, unit: str) -> str:
    """A rate, or, where that is below one a second, how long each takes."""
    if per_s < 1 and unit != "B":
        return f"{format_seconds(1 / per_s)} each"
    return f"{format_amount(per_s, unit)}/s"


def format_left(seconds: float) -> str:
    """A time to wait, as exact as an estimate is: 5 s, 40 s, 2 min, 1 h 10 min."""
    if seconds < 57.5:
        return f"{max(round(seconds / 5), 1) * 5} s"
    minutes = round(seconds / 60)
    return f"{max(minutes, 1)} min" if minutes < 60 else format_seconds(seconds - seconds % 600)
