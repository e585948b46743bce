"""Reading a user's turns: with line editing, history and completion, or plainly."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from teal_cli import console
from teal_cli.chat.slash import COMMANDS
from teal_cli.chat.state import KEYS

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

_PROMPT, _CONTINUED = ">>> ", "... "
_QUOTES = '"""'

# Reads one turn. EOFError: the user leaves; KeyboardInterrupt: Ctrl-C on an empty line.
Reader = Callable[[], str]


def open_reader(history: Path | None = None) -> Reader:
    """The best reader that this terminal and this installation allow.

    Earlier prompts are those of this chat, or where `history` names a file, of others too.
    """
    screen = next((stream for stream in (sys.stdout, sys.stderr) if console.is_rich(stream)), None)
    if screen is None:
        return _read_plainly
    try:
        session = line_editor(screen, history)
    except ImportError:
        console.reporter().note(
            "prompt_toolkit is not installed: no history, no completion, and a paste of several "
            "lines is several turns"
        )
        return _read_plainly
    return session.prompt


def unquote(text: str) -> tuple[str, bool]:
    """The turn in what was read, and whether it stood between triple quotes."""
    if not text.startswith(_QUOTES):
        return text, False
    inner = text.strip().removeprefix(_QUOTES)
    return inner.removesuffix(_QUOTES).strip("\n"), True


def line_editor(screen: TextIO, history: Path | None = None) -> PromptSession[str]:
    """A prompt_toolkit session on a terminal; `history` as for `open_reader`.

    Raises:
        ImportError: prompt_toolkit is not installed.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app_session
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    from teal_cli.chat.history import FileHistory

    return PromptSession(
        _PROMPT,
        multiline=True,  # a paste keeps its lines; the bindings let Enter send
        prompt_continuation=lambda width, line, wraps: " " * width if wraps else _CONTINUED,
        history=FileHistory(history) if history is not None else InMemoryHistory(),
        completer=_completer(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=_bindings(),
        enable_suspend=True,
        output=get_app_session().output if screen is sys.stdout else create_output(screen),
    )


def _bindings() -> KeyBindings:
    from prompt_toolkit.application import get_app, run_in_terminal
    from prompt_toolkit.completion import CompleteEvent, get_common_complete_suffix
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import Condition, has_focus, is_searching
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.bindings.completion import display_completions_like_readline
    from prompt_toolkit.key_binding.bindings.search import abort_search
    from prompt_toolkit.utils import get_cwidth

    bindings = KeyBindings()
    at_prompt = has_focus(DEFAULT_BUFFER)  # not in the search of Ctrl-R and Ctrl-S
    quoting = Condition(lambda: get_app().quoted_insert)  # after Ctrl-Q

    @bindings.add("enter", filter=at_prompt)
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        if _is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=at_prompt)
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add(
        "c-c", filter=at_prompt & ~quoting, eager=True
    )  # with a selection it begins other keys
    @bindings.add("<sigint>", filter=at_prompt)
    def _clear(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    bindings.add("<sigint>", filter=is_searching)(abort_search)

    @bindings.add("tab", filter=at_prompt)
    def _complete(event: Any) -> None:
        buffer = event.current_buffer
        wanted = CompleteEvent(completion_requested=True)
        found = list(buffer.completer.get_completions(buffer.document, wanted))
        size = event.app.output.get_size()
        widest = max((get_cwidth(one.display_text) for one in found), default=0)
        rows = -(-len(found) // max(size.columns // (widest + 1), 1))
        # What asks before it lists more than a page takes a Ctrl-C for an error of its own.
        if rows < size.rows or get_common_complete_suffix(buffer.document, found):
            display_completions_like_readline(event)
        else:
            text = f"{len(found)} names begin like this: type more of the one you want"
            run_in_terminal(lambda: event.app.print_text(f"{text}\n"))

    return bindings


def _completer() -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class SlashCompleter(Completer):
        """The commands, the names of settings, and files."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
            command, space, argument = document.text_before_cursor.partition(" ")
            if not command.startswith("/") or "\n" in document.text:
                return
            if not space:
                names = (name for name in COMMANDS if name.startswith(command))
                yield from (Completion(name, -len(command)) for name in names)
            elif command == "/set":
                keys = (key for key in KEYS if key.startswith(argument))
                yield from (Completion(key, -len(argument)) for key in keys)
            elif command in ("/save", "/load"):
                yield from files.get_completions(Document(argument), complete_event)

    return SlashCompleter()


def _is_open(text: str) -> bool:
    """Whether a turn began with triple quotes that are not closed yet."""
    stripped = text.strip()
    closed = len(stripped) >= 2 * len(_QUOTES) and stripped.endswith(_QUOTES)
    return text.startswith(_QUOTES) and not closed


def _read_plainly() -> str:
    """One turn without any library; prompts go to stderr where stdout is not a terminal."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() line editing)
    text = _read_line(_PROMPT)
    while _is_open(text):
        text += "\n" + _read_line(_CONTINUED)
    return text


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()
