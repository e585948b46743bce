"""From token ids to text that a terminal may show, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from teal_cli.printable import ESCAPE, UNSAFE

_REPLACEMENT = "\ufffd"  # what a tokenizer gives for bytes that are no character, or not yet
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so byte tokens
_LONGEST_ESCAPE = 256


class Detokenizer:
    """Turns a stream of tokens into text: only whole characters, only printable ones."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        """Start after the tokens of `context`, which decide whether a word begins with a space.

        Args:
            tokenizer: a transformers tokenizer.
            context: the last few tokens before the stream; their text is not repeated.
        """
        self._tokenizer = tokenizer
        self._tokens = list(context)
        self._shown = self._decode()  # text of all of _tokens that has been given out
        self._held = ""  # the start of an escape sequence that may go on

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._tokens.append(token)
        text = self._decode()
        pending = text[len(self._shown) :]
        if pending.endswith(_REPLACEMENT) and pending.count(_REPLACEMENT) < _LONGEST_CHARACTER:
            return ""
        # Only the latest tokens are kept: decoding the whole answer anew for each would take
        # time that grows with its square.
        self._tokens = self._tokens[-_LONGEST_CHARACTER:]
        self._shown = self._decode()
        return self._printable(pending)

    def finish(self) -> str:
        """The rest; a character whose bytes did not all come is dropped."""
        pending = self._decode()[len(self._shown) :].rstrip(_REPLACEMENT)
        text = self._printable(pending) + UNSAFE.sub("", self._held)
        self._held = ""
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _printable(self, text: str) -> str:
        text = ESCAPE.sub("", self._held + text)
        start = text.find("\x1b")
        if start >= 0 and len(text) - start < _LONGEST_ESCAPE:
            text, self._held = text[:start], text[start:]
        else:
            self._held = ""
        return UNSAFE.sub("", text)
