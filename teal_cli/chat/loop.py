"""The chat's loop: a turn, its answer, the next turn."""

from __future__ import annotations

import sys
from pathlib import Path

from teal_cli import console
from teal_cli.chat import answers, editor, slash
from teal_cli.chat.state import Chat
from teal_cli.errors import TealError


def talk(chat: Chat, history: Path | None = None) -> None:
    """Answer turn after turn until the user leaves; nothing that fails ends the chat.

    Nothing of it is kept but the prompts, where `history` names a file for them.
    """
    console.print_dim(f"{chat.model}, {slash.sparsity_of(chat)}")
    console.print_dim("/help lists the commands, Ctrl-C ends an answer, Ctrl-D leaves.")
    if not chat.conversation.has_template:
        console.print_dim("This model has no chat template: it continues what you write.")
    if history is not None:
        console.print_dim(f"Prompts are kept in {history}.")
    read = editor.open_reader(history)
    leaves = False
    while not leaves:
        try:
            leaves = _go_on(chat, read)
        except KeyboardInterrupt:  # between two prompts, or while another is being answered
            chat.session.reset()


def _go_on(chat: Chat, read: editor.Reader) -> bool:
    """Read a turn and answer it; True where the user leaves."""
    try:
        line = read()
    except EOFError:
        print(file=sys.stderr)
        return True
    except KeyboardInterrupt:
        console.print_dim("Ctrl-D or /bye leaves.")
        return False
    try:
        return not _take_turn(chat, line)
    except KeyboardInterrupt:
        # Broken off anywhere: what the session holds is not to be relied on.
        chat.session.reset()
        console.print_dim("stopped")
    except Exception as error:  # of a driver or for want of memory too: the next may work
        if not isinstance(error, TealError):
            chat.session.rewind(0)
        console.report(error)
    return False


def _take_turn(chat: Chat, line: str) -> bool:
    """Do what a line says; False where it is to leave."""
    text, quoted = editor.unquote(line)
    if not text.strip():
        return True
    if quoted or not text.startswith("/"):
        answers.answer(chat, text)
        return True
    outcome = slash.run(chat, text)
    if outcome.text:
        console.print_line(outcome.text, to_stderr=True)
    if outcome.retry and chat.conversation.last_prompt is not None:
        answers.answer(chat, chat.conversation.last_prompt, again=True)
    return not outcome.leave
