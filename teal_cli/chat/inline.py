"""Markdown within a line: emphasis, code and links as styled text."""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.text import Text

from teal_cli.printable import printable

_STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}


def inline(source: str) -> Text:
    """A piece of Markdown without blocks, as styled text that a terminal does not obey.

    Entities and percent signs can spell control characters, so that the text is cleaned last.
    """
    text = Text()
    styles: list[str] = []
    links: list[tuple[str, int]] = []  # where each open one leads, and where its text begins
    for token in _parser().parseInline(source)[0].children or []:
        kind, _, end = token.type.rpartition("_")
        if kind in _STYLES and end == "open":
            styles.append(_STYLES[kind])
            if kind == "link":
                links.append((str(token.attrs["href"]), len(text)))
        elif kind in _STYLES:
            styles.remove(_STYLES[kind])
            if kind == "link":
                target, start = links.pop()
                if target.removeprefix("mailto:") != text.plain[start:]:
                    text.append(f" ({printable(target)})", style="dim")
        else:
            text.append(_content(token), style=" ".join(styles + _code_style(token)))
    return text


def _content(token: Token) -> str:
    if token.type == "image":
        return f"[{printable(token.content)}] ({printable(str(token.attrs['src']))})"
    return printable(token.content)


def _code_style(token: Token) -> list[str]:
    return ["cyan"] if token.type == "code_inline" else []


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
