"""From token ids to text that a terminal may show, piece by piece."""

from __future__ import annotations

import re
from typing import Any

from teal_cli.inference.ends import special_token_ids
from teal_cli.model.tokenizer import panics_explained
from teal_cli.printable import ESCAPE, UNSAFE, printable

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_ESCAPE = 256


class Detokenizer:
    """Turns a stream of tokens into text whose pieces make what decoding them all at once makes.

    Special tokens stand for no text. What another token could still change is held back: the
    bytes of a character that is not whole yet and, where a vocabulary falls back on byte tokens, a
    run of these, for such a decoder takes a whole run as text or none of it.
    """

    def __init__(self, tokenizer: Any, *, continues: bool = False) -> None:
        """Start a text.

        Args:
            tokenizer: a transformers tokenizer.
            continues: whether the text follows another, so that a first word keeps its space,
                which SentencePiece's decoders take from the beginning of a text.
        """
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._special = special_token_ids(tokenizer)
        before = tokenizer.encode("a", add_special_tokens=False) if continues else []
        self._stream = DecodeStream(before, skip_special_tokens=True)
        self._shown: list[int] = before  # the tokens of the last piece, which the next one joins
        self._pending: list[int] = []  # those after them
        self._run: list[int] = []  # the byte tokens at the end of _pending, not in the stream yet

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        name = self._tokenizer.id_to_token(token)
        # Left out here: to the stream a skipped token would be the end of a run of bytes.
        if name is None or token in self._special:
            return ""
        self._pending.append(token)
        self._run.append(token)
        if _BYTE_TOKEN.fullmatch(name):
            return ""
        with panics_explained():
            piece = self._stream.step(self._tokenizer, self._run)
        self._run = []
        if not piece:
            return ""
        self._shown, self._pending = self._pending, []
        return str(piece)

    def finish(self) -> str:
        """The rest; U+FFFD stands for a character whose bytes did not all come."""
        shown, pending, self._pending, self._run = self._shown, self._pending, [], []
        return self._decode([*shown, *pending])[len(self._decode(shown)) :]

    def _decode(self, tokens: list[int]) -> str:
        with panics_explained():
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Printable:
    """`printable` for a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""  # the start of an escape sequence that may go on

    def add(self, text: str) -> str:
        """What may be shown of the text so far, and was not yet."""
        text = self._held + text
        # What is held back stays as it came: without the sequences in it, it could be another.
        shown = ESCAPE.sub(lambda sequence: "\0" * len(sequence[0]), text)
        start = shown.find("\x1b")
        if start < 0 or len(text) - start >= _LONGEST_ESCAPE:
            start = len(text)
        self._held = text[start:]
        return UNSAFE.sub("", shown[:start])

    def finish(self) -> str:
        """The rest: a sequence that did not end was none."""
        text, self._held = self._held, ""
        return printable(text)
