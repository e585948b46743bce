"""Text of others: what a terminal would obey goes, what belongs to a character stays."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.printable import escaped, printable

OVERRIDES = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROLS = [*range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0)]


@pytest.mark.parametrize("code", [*OVERRIDES, *CONTROLS], ids=hex)
def test_what_steers_a_terminal_goes(code: int) -> None:
    assert chr(code) not in printable(f"a{chr(code)}b")
    assert json.loads(escaped(json.dumps(chr(code), ensure_ascii=False))) == chr(code)
    assert chr(code) not in escaped(json.dumps(chr(code), ensure_ascii=False))


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\tand a tab",
        "👩‍👩‍👧 a family, joined",
        "❤️ and ☎︎, chosen by their variation selectors",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿 a flag of tags",
        "می‌خواهم, with its non-joiner",
        "עברית and عربي",
        "co\u00adoperate, café",
    ],
)
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text
    assert json.loads(escaped(json.dumps(text, ensure_ascii=False))) == text


@given(st.text(st.sampled_from("\x1b[]m;0Pab\x07\\\n\u202e\x9b\ud800")))
def test_nothing_is_left_of_any_mixture(text: str) -> None:
    left = printable(text)
    assert not set(left) & {"\x1b", "\x07", "\u202e", "\x9b"}
    assert printable(left) == left
    assert json.loads(escaped(json.dumps(text, ensure_ascii=False))) == text
    escaped(json.dumps(text, ensure_ascii=False)).encode()
