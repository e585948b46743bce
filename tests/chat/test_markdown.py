"""Markdown as it streams: nothing is lost, nothing is printed twice, nothing is obeyed."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console

from teal_cli.chat.markdown import MarkdownWriter, inline

STYLE = re.compile(r"\x1b\[[\d;]*m")

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
    return "日本語", x  # longer than forty columns, surely

```

Country   Capital
─────────────────
日本         東京
France      Paris

────────────────────────────────────────
日本語のテキストは幅が広い、naïve 👍🏽 end
**unclosed
"""


def show(text: str, *, width: int = 40, step: int = 1, colour: bool = False) -> list[str]:
    """What is on the terminal after each piece, and at the end."""
    file = io.StringIO()
    writer = MarkdownWriter(Console(file=file, width=width, force_terminal=colour))
    states = []
    for start in range(0, len(text), step):
        writer.write(text[start : start + step])
        states.append(file.getvalue())
    writer.close()
    return [*states, file.getvalue()]


@pytest.mark.parametrize("step", [1, 3, 17, 10_000])
def test_it_looks_the_same_however_it_comes(step: int) -> None:
    shown = show(SAMPLE, step=step)[-1]
    assert "\n".join(line.rstrip() for line in shown.split("\n")) == SHOWN_AT_40


@pytest.mark.parametrize("width", [20, 33, 80, 200])
def test_what_is_printed_stays_and_fits(width: int) -> None:
    states = show(SAMPLE, width=width)
    for before, after in pairwise(states):
        assert after.startswith(before)
    # Code is left for the terminal to wrap, so that it can be copied.
    wide = [line for line in states[-1].split("\n") if cell_len(line) > width]
    assert all("surely" in line or "return" in line or "https" in line for line in wide)
    letters = re.sub(r"[\W_]", "", SAMPLE.replace("**", ""))
    assert re.sub(r"[\W_]", "", states[-1]) == letters


def test_a_long_line_is_shown_while_it_comes() -> None:
    words = "word " * 30
    states = show(words + "**bold over some rows " + words + "**" + words, width=40)
    shown = [state.count("\n") for state in states]
    assert (shown[70], shown[110]) == (1, 2)
    assert shown[300] == shown[150]  # the mark is open: what is under it may become bold
    assert shown[-1] == 12


def test_a_mark_that_turns_out_otherwise_loses_nothing() -> None:
    text = "one *two " + "three four " * 8 + "and \\* [five](x six " * 3
    shown = show(text, width=20)[-1]
    assert re.sub(r"\W", "", shown) == re.sub(r"\W", "", text)


def test_code_is_coloured_line_by_line_and_not_interpreted() -> None:
    code = 'x = """\n**not bold**\n| no | table |\n# no heading\n"""\n'
    states = show(f"~~~python\n{code}~~~\n", colour=True)
    plain = STYLE.sub("", states[-1])
    assert plain == f"~~~python\n{code}~~~\n"
    assert "\x1b[33m**not bold**" in states[-1]  # still inside the string
    assert show("```\n\x00", width=9)[-1]  # unknown and unfinished


def test_an_unknown_language_is_shown_plainly() -> None:
    assert show("```klingon\nqapla' **x**\n```\n")[-1] == "```klingon\nqapla' **x**\n```\n"


def test_bars_that_are_no_table_stay_lines() -> None:
    assert show("| one **b**\n| two\nafter\n")[-1] == "| one b\n| two\nafter\n"


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
    shown = show(source + "\n")[-1]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def test_a_link_shows_where_it_leads() -> None:
    assert inline("[bank](https://evil.example)").plain == "bank (https://evil.example)"
    assert inline("<https://x.example>").plain == "https://x.example"
    assert inline("<a@x.example>").plain == "a@x.example"
