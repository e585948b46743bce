"""Markdown as it streams, on a terminal: everything is shown at once, nothing twice or obeyed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import pytest
from chat.screens import Screen
from hypothesis import given, settings
from hypothesis import strategies as st

from teal_cli.chat.inline import inline
from teal_cli.chat.markdown import MarkdownWriter

SAMPLE = """\
# Title with `code`

A text with **bold words that span a row**, *italic* and a [link](https://x.example/a_b), 2 * 3.
Its second line.

1. First item, long enough to be wrapped with a hanging indent
   - nested **one**
10. Ten

> quoted, and long enough to be wrapped as well as the others

```python
def f(x):
    return "日本語", x  # longer than forty columns, surely

```

| Country | Capital |
|:--|--:|
| 日本 | **東京** |
| France | Paris |

---
日本語のテキストは幅が広い、naïve 👍🏽 end **unclosed"""

SHOWN_AT_40 = """\
Title with code

A text with bold words that span a row,
italic and a link
(https://x.example/a_b), 2 * 3.
Its second line.

1. First item, long enough to be wrapped
   with a hanging indent
   • nested one
10. Ten

│ quoted, and long enough to be wrapped
│ as well as the others

```python
def f(x):
    return "日本語", x  # longer than fo
rty columns, surely

```

Country   Capital
─────────────────
日本         東京
France      Paris

────────────────────────────────────────
日本語のテキストは幅が広い、naïve 👍🏽
end **unclosed"""


# What Markdown and terminals trip over, and words to see that nothing is lost.
PIECES = [
    *(
        "word",
        "two",
        "日本",
        "👍🏽",
        " ",
        " ",
        "\n",
        "\n\n",
        "**",
        "*",
        "_",
        "`",
        "~~",
        "[",
        "](u) ",
    ),
    *("](http://a.b)", "<", "<http://c.d>", "|", "```\n", "```py\n", "def f", "# ", "- ", "1. "),
    *("> ", "---\n", "\t", "    ", "(", ")", "!", "\\", "longlonglongwordthatisfolded"),
]


def letters(text: str) -> str:
    """A text without marks, spaces and line ends."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFC", text))


def pieces(text: str, step: int) -> list[str]:
    return [text[start : start + step] for start in range(0, len(text), step)]


def show(parts: Sequence[str], width: int = 40, height: int = 60) -> tuple[list[str], Screen]:
    """What is on the screen after each piece, and the screen at the end."""
    screen = Screen(width, height)
    writer = MarkdownWriter(screen.console())
    states = []
    for part in parts:
        writer.write(part)
        states.append(screen.text())
    writer.close()
    return states, screen


@pytest.mark.parametrize("step", [1, 3, 17, 10_000])
def test_it_looks_the_same_however_it_comes(step: int) -> None:
    assert show(pieces(SAMPLE, step))[1].text() == SHOWN_AT_40


@pytest.mark.parametrize("height", [6, 24, 60])
@pytest.mark.parametrize("width", [20, 33, 80, 120])
def test_every_token_is_on_the_screen_at_once(width: int, height: int) -> None:
    parts = pieces(SAMPLE, 4)
    states, screen = show(parts, width, height)
    source = ""
    for part, state in zip(parts, states, strict=True):
        source += part
        assert letters(state) == letters(source)
    if height == 60:
        assert screen.cells() == show([SAMPLE], width, height)[1].cells()


def test_what_is_above_the_unfinished_block_is_not_written_again() -> None:
    screen = Screen(40, 60)
    writer = MarkdownWriter(screen.console())
    for line in SAMPLE.split("\n"):
        above = screen.text()
        for piece in (*pieces(line, 3), "\n"):
            writer.write(piece)
        if not line.startswith("|"):
            assert screen.text().startswith(above)
    assert all(up <= 3 for up in screen.moves_up)  # rows of the longest line, and of the table


def test_prose_costs_no_more_than_its_text() -> None:
    text = "The quick brown fox jumps over the lazy dog, and then it rests. " * 6
    _, screen = show(pieces(text, 3), width=40)
    # A word that turns out too long for its row is taken back and written again.
    assert len(screen.log) < 1.3 * len(text)


def test_a_mark_is_text_until_it_is_paired() -> None:
    for mark in ("*", "**", "_", "`", "~~", "[", "<", "~"):
        text = f"one {mark}two three "
        assert show([text])[0][-1] == text.rstrip()
    states, screen = show(["one **two", " three", "**", " four"])
    assert states == ["one **two", "one **two three", "one two three", "one two three four"]
    bold = [cell.data for cell in screen.cells()[0] if cell.bold]
    assert "".join(bold) == "two three"


def test_a_table_is_shown_row_by_row() -> None:
    states, _ = show(
        ["| a ", "| b |\n", "|--", "-|---|\n", "| one ", "| two |\n", "| a longer", " |"]
    )
    assert states[0] == "| a"
    assert states[1] == "| a | b |"
    assert states[3].split("\n") == ["a   b", "─────"]
    assert states[4].split("\n")[2:] == ["one"]
    assert states[5].split("\n")[2:] == ["one   two"]
    assert states[7].split("\n") == ["a          b", "──────────────", "one        two", "a longer"]


def test_a_table_longer_than_the_screen_goes_on_in_its_columns() -> None:
    rows = [f"| row {number:02} | {'x' * 8} |" for number in range(1, 15)]
    rows.append("| longer row 15 | xxxxxxxx |")
    source = "\n".join(["| a | b |", "|---|---|", *rows]) + "\nafter"
    shown = show(pieces(source, 5), width=40, height=8)[1].text()
    assert sorted(letters(shown)) == sorted(letters(source))  # the long cell is folded
    assert {line.index("x") for line in shown.split("\n") if "x" in line} == {9}


def test_a_table_too_wide_for_the_screen_stays_text() -> None:
    source = "|" + "a|" * 9 + "\n|" + "-|" * 9 + "\n|" + "b|" * 9
    assert letters(show(pieces(source, 2), width=20)[1].text()) == "a" * 9 + "b" * 9


@pytest.mark.parametrize("source", ["word " * 100, "日本語" * 60, "**bold** `code` " * 40])
def test_a_line_longer_than_the_screen_scrolls_off_as_it_is(source: str) -> None:
    states, screen = show(pieces(source, 7), width=20, height=6)
    assert letters(states[-1]) == letters(source)
    assert screen.text() == show([source], 20, 200)[1].text()


def test_a_mark_that_is_paired_after_its_row_scrolled_off_loses_nothing() -> None:
    for count in range(20, 60):
        words = " ".join(f"w{number}" for number in range(count))
        source = f"**a {words}** end"
        assert letters(show(pieces(source, 9), 20, 6)[1].text()) == letters(source)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.sampled_from([7, 20, 80]),
    st.sampled_from([6, 100]),
    st.data(),
)
def test_random_markdown_cut_anywhere(
    text: str, width: int, height: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    states, screen = show(parts, width, height)
    source = ""
    for part, state in zip(parts, states, strict=True):
        source += part
        assert letters(state) == letters(source)
    if height == 100:
        assert screen.cells() == show([text], width, height)[1].cells()


def test_a_window_that_grows_loses_nothing() -> None:
    screen = Screen(20, 30)
    writer = MarkdownWriter(screen.console())
    for place, piece in enumerate(pieces(SAMPLE, 5)):
        screen.resize(20 + place // 3)
        writer.write(piece)
    writer.close()
    # A table's row is begun anew, so that the start of one may be there twice.
    before, _, after = SAMPLE.partition("| Country")
    assert letters(screen.text()).startswith(letters(before))
    assert letters(screen.text()).endswith(letters(after.split("---")[1]))


def test_a_new_width_is_taken_up_in_the_middle_of_a_line() -> None:
    screen = Screen(40, 12)
    writer = MarkdownWriter(screen.console())
    writer.write("- one two three ")
    screen.resize(20)
    writer.write("four five six seven eight")
    writer.close()
    assert screen.text() == "• one two three\n  four five six\n  seven eight"


def test_dim_text_stands_in_lines_of_its_own() -> None:
    screen = Screen(40, 12)
    writer = MarkdownWriter(screen.console())
    writer.write("thinking", dim=True)
    writer.write(" aloud", dim=True)
    writer.write("The answer")
    writer.close()
    assert screen.text() == "thinking aloud\nThe answer"
    assert "\x1b[2mthinking\x1b[0m" in screen.log
    assert "\x1b[2mThe" not in screen.log


def test_a_mark_that_turns_out_otherwise_loses_nothing() -> None:
    text = "one *two " + "three four " * 8 + "and \\* [five](x six " * 3
    assert letters(show(pieces(text, 1), width=20)[1].text()) == letters(text)


def test_code_is_coloured_as_it_comes_and_not_interpreted() -> None:
    code = 'x = """\n**not bold**\n| no | table |\n# no heading\n"""'
    _, screen = show(pieces(f"~~~python\n{code}\n~~~\n", 2))
    assert screen.text() == f"~~~python\n{code}\n~~~"
    row = screen.cells()[2]
    assert {cell.fg for cell in row[:12]} == {"brown"}  # still inside the string
    assert not any(cell.bold for cell in row)
    assert show(["```\n\x00"], width=9)[0]  # unknown and unfinished


def test_an_unknown_language_is_shown_plainly() -> None:
    assert show(["```klingon\nqapla' **x**\n```\n"])[1].text() == "```klingon\nqapla' **x**\n```"


def test_bars_that_are_no_table_stay_lines() -> None:
    assert show(["| one **b**\n| two\nafter\n"])[1].text() == "| one b\n| two\nafter"


@pytest.mark.parametrize(
    "source",
    [
        "<http://x/%1b[31mred>",
        "<http://x/%9b31m>",
        "&#27;[31m &#x1b;]0;t&#7; &#x9b;31m",
        "[a](<http://x/%1b[31m> 'title')",
        "![&#27;[1m](http://x/%1bc)",
        "`&#27;` \\&#27;",
        "| a |\n|---|\n| &#27;[31m<http://%1b> |",
        "# &#27;c\n- &#27;c\n> &#27;c",
    ],
)
def test_nothing_spells_a_control_character(source: str) -> None:
    written = re.sub(r"\x1b\[[\d;]*[mACJ]", "", show([source + "\n"])[1].log)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", written)
    assert "31m" not in re.sub(r"[^\x1b]31m", "", written)


def test_a_link_shows_where_it_leads() -> None:
    assert inline("[bank](https://evil.example)").plain == "bank (https://evil.example)"
    assert inline("<https://x.example>").plain == "https://x.example"
    assert inline("<a@x.example>").plain == "a@x.example"
    inner = inline("[<https://bank.example>](https://evil.example)").plain
    assert inner.endswith("(https://evil.example)")
