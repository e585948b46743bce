"""What may have been meant by a name that is none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_TOKEN = re.compile(r"(?<![\w./])hf_\w+(?![\w./-])", re.ASCII)  # and no file or model


def closest(text: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name that is most like the text, upper and lower case alike; None if none is."""
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(text.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(text: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The closest name as a question, with a space behind it; empty if there is none."""
    name = closest(text, names, cutoff=cutoff)
    return f"Did you mean {name}? " if name else ""


def quoted(text: str) -> str:
    """What was typed, for a message about it: never an access token that lost its option."""
    return "'hf_…'" if _TOKEN.search(text) else repr(text)
