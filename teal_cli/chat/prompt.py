"""The prompt of a chat that answers once: from the command line, a pipe, or both."""

from __future__ import annotations

import sys
import threading

from teal_cli import console
from teal_cli.errors import UsageError

_PATIENCE_S = 2.0  # until a pipe that brings nothing is told of


def only_prompt(option: str | None, words: list[str] | None) -> str | None:
    """The only prompt: what was typed, then what a pipe brings; None where a person is to talk.

    Raises:
        UsageError: it is empty, given twice, or no text.
    """
    if option is not None and words:
        raise UsageError(
            "the prompt is given twice, behind the model and with --prompt", hint="Leave one out."
        )
    typed = " ".join(words) if words else option
    needs_pipe = typed in (None, "-")
    if typed is None and sys.stdin.isatty():
        return None
    piped = ""
    if needs_pipe or not sys.stdin.isatty():
        try:
            piped = _piped_text()
        except OSError:
            if needs_pipe:
                raise
    texts = [piped] if needs_pipe else [typed or "", piped]
    parts = [text for text in texts if text.strip()]
    if not parts:
        raise UsageError(
            "the prompt is empty", hint="Give a text behind the model, or through a pipe."
        )
    return "\n\n".join(parts)


def _piped_text() -> str:
    """All of stdin; where its other end keeps it open and says nothing, a line tells so."""
    waited = threading.Timer(
        _PATIENCE_S,
        console.reporter().note,
        ["reading stdin to its end; `< /dev/null` leaves it out"],
    )
    waited.daemon = True
    waited.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text on stdin is not UTF-8: {error}", hint="Convert it, for example with iconv."
        ) from None
    finally:
        waited.cancel()
