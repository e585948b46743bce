"""The bytes that a token stands for by itself."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"  # SentencePiece's


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token, as OpenAI's logprobs name it; a special token's are its name's.

    Args:
        tokenizer: a transformers tokenizer.
        token: an id; one beyond the vocabulary has none.
    """
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return b""
    if token in tokenizer.added_tokens_decoder:
        return str(name).encode("utf-8", "replace")
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(byte[1])
    letters = _letters()
    byte_level = tokenizer.backend_tokenizer.token_to_id("Ġ") is not None  # a space there
    if byte_level and all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return str(name).replace(_SPACE, " ").encode("utf-8", "replace")


@cache
def _letters() -> dict[str, int]:
    """The byte of each letter in the names of byte-level vocabularies, as GPT-2 has them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
