"""Streaming text: whole characters only, nothing that a terminal would obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teal_cli.inference.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a byte: every character beyond ASCII is split."""
    import tiny
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: Any, text: str | bytes, context: str = "") -> list[str]:
    """The text that comes out after each token, and at the end."""
    if isinstance(text, str):
        tokens = tokenizer.encode(text, add_special_tokens=False)
    else:  # token of byte b: after three special tokens, in the order of the byte alphabet
        tokens = [tokenizer.convert_tokens_to_ids(byte_token(b)) for b in text]
    stream = Detokenizer(tokenizer, tokenizer.encode(context, add_special_tokens=False))
    return [*(stream.add(token) for token in tokens), stream.finish()]


def byte_token(byte: int) -> str:
    """GPT-2's printable stand-in for a byte, as byte-level tokenizers write it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Grüße, naïve café",
        "日本語のテキスト",
        "👍🏽 and 👩‍👩‍👧 done",
        " lead",
        "a\n\tb",
        "",
    ],
)
def test_the_pieces_make_the_text(tokenizer: Any, text: str) -> None:
    out = pieces(tokenizer, text)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_a_character_appears_with_its_last_byte(tokenizer: Any) -> None:
    assert pieces(tokenizer, "a👍") == ["a", "", "", "", "👍", ""]


def test_a_character_cut_short_is_dropped(tokenizer: Any) -> None:
    assert "".join(pieces(tokenizer, "ab👍".encode()[:-1])) == "ab"


def test_bytes_that_are_no_character_do_not_hold_the_rest_back(tokenizer: Any) -> None:
    out = "".join(pieces(tokenizer, b"a" + b"\xff" * 6 + b"bc"))
    assert out.replace("\ufffd", "") == "abc"


def test_text_after_a_prompt_keeps_its_space(tokenizer: Any) -> None:
    assert "".join(pieces(tokenizer, " Paris", context="The capital is")) == " Paris"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("a\x1b]0;open\nb", "a\nb"),
        ("a\x1b[3\x07b", "ab"),
        ("a\x1bcb", "ab"),
        ("a\x07\x08\rb\x7f\x9bc", "abc"),
        ("a\u202eb\u2066c\u200fd", "abcd"),
        ("👩‍👧 ❤️", "👩‍👧 ❤️"),
        ("line\n\ttab", "line\n\ttab"),
        ("end\x1b", "end"),
        ("end\x1b[31", "end[31"),
        ("x\x1b]" + "y" * 300, "x]" + "y" * 300),
    ],
    ids=[
        "colour",
        "title",
        "link",
        "open-title",
        "broken",
        "reset",
        "controls",
        "direction",
        "joiners",
        "kept",
        "lone",
        "open",
        "endless",
    ],
)
def test_what_a_terminal_would_obey_is_stripped(tokenizer: Any, text: str, shown: str) -> None:
    assert "".join(pieces(tokenizer, text)) == shown


def test_special_tokens_are_not_shown(tokenizer: Any) -> None:
    assert "".join(pieces(tokenizer, "a<|im_end|>b")) == "ab"
