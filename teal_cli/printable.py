"""Text that others wrote, made fit for a terminal: nothing in it that a terminal would obey."""

from __future__ import annotations

import re

# CSI, OSC and two-character escapes.
ESCAPE = re.compile(
    r"\x1b(?:\[[ -?]*[^ -?]|\][^\x07\x1b\n]*(?:\x07|\x1b\\|(?=\n))|[^\[\]])", re.DOTALL
)
# Then all control characters but newline and tab (C0, DEL and C1), and the marks that turn the
# direction of the text around them. Joiners and variation selectors are parts of characters.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What JSON may hold and UTF-8 may not: the halves of surrogate pairs that odd file names bring.
_UNSAFE_OR_HALF = re.compile(rf"{UNSAFE.pattern[:-1]}\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without escape sequences, control characters and marks of direction."""
    return UNSAFE.sub("", ESCAPE.sub("", text))


def escaped(json_text: str) -> str:
    """JSON with everything that `printable` would take out written as \\uXXXX."""
    return _UNSAFE_OR_HALF.sub(_escape, json_text)


def encodable(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
