"""Slash commands: what a user tells the chat itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teal_cli.chat.answers import guesses
from teal_cli.chat.state import KEYS, Chat
from teal_cli.errors import UsageError
from teal_cli.inference.transcript import Transcript
from teal_cli.options import parse_sparsity
from teal_cli.printable import printable
from teal_cli.suggestions import did_you_mean

_KEYS_HELP = """\
Enter sends. Several lines go between \"\"\" and \"\"\", or are pasted as they are.
Ctrl-C ends an answer and keeps what was said, or clears the line.
Ctrl-D leaves. A text that begins with a slash needs a space before it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command leads to: a text to show, another answer, or the end."""

    text: str = ""
    retry: bool = False
    leave: bool = False


@dataclass(frozen=True, slots=True)
class _Command:
    usage: str
    help: str
    run: Callable[[Chat, str], Outcome]


def run(chat: Chat, line: str) -> Outcome:
    """Do what a line such as "/sparsity 0.4" says.

    Raises:
        UsageError: there is no such command, or it does not take that argument.
        TealError: it failed.
    """
    name, *rest = line.strip().split(maxsplit=1)
    name = _ALIASES.get(name, name)
    command = COMMANDS.get(name)
    if command is None:
        near = did_you_mean(name, (*COMMANDS, *_ALIASES))
        raise UsageError(
            f"there is no command {name}",
            hint=f"{near}/help lists them. A text that begins with a slash needs a space before"
            " it.",
        )
    argument = rest[0] if rest else ""
    if argument and " " not in command.usage:
        raise UsageError(f"{name} takes no argument")
    return command.run(chat, argument)


def _help(chat: Chat, _: str) -> Outcome:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    return Outcome("\n".join([*lines, "", _KEYS_HELP]))


def _clear(chat: Chat, _: str) -> Outcome:
    chat.conversation.clear()
    return Outcome("everything that was said is forgotten")


def _sparsity(chat: Chat, argument: str) -> Outcome:
    if argument:
        chat.set_sparsity(parse_sparsity(argument))
    return Outcome(sparsity_of(chat))


def _set(chat: Chat, argument: str) -> Outcome:
    words = argument.split()
    if len(words) != 2:
        raise UsageError(f"/set takes one of {', '.join(KEYS)}, and a value")
    chat.set(*words)
    return Outcome(_settings(chat))


def _show(chat: Chat, _: str) -> Outcome:
    session, conversation, drafting = chat.session, chat.conversation, chat.session.drafting
    rows = [
        ("model", chat.model),
        ("runs on", f"{session.decoder.device}, {chat.weights}, {session.backend}"),
        ("sparsity", sparsity_of(chat).removeprefix("sparsity ")),
        ("guesses", drafting.name if drafting is not None else "none"),
        ("settings", _settings(chat)),
        ("context", f"{_context(chat)}, then {conversation.overflow}"),
        ("system", conversation.system or "the template's own, if it has one"),
        ("thinking", _thinking(chat)),
        ("turns", str(_turns(chat))),
    ]
    return Outcome("\n".join(f"{name:<9} {printable(value)}" for name, value in rows))


def _stats(chat: Chat, _: str) -> Outcome:
    totals = chat.totals
    if not totals.answers:
        return Outcome("nothing was answered yet")
    rows = [("answers", f"{totals.answers}, {totals.new_tokens} tokens")]
    if totals.decode_s > 0:
        rows.append(("speed", f"{totals.timed_tokens / totals.decode_s:.1f} tokens/s on average"))
    read = totals.prompt_tokens - totals.reused_tokens
    rows.append(("read", f"{read} tokens, {totals.reused_tokens} more found in the cache"))
    if totals.draft is not None:
        rows.append(("guesses", guesses(totals.draft)))
    realised = chat.last.stats.realised_sparsity if chat.last else None
    if realised is not None:
        rows.append(("realised", f"{realised:.1%} sparsity in the last answer"))
    nbytes = chat.session.cache.nbytes
    rows.append(("context", f"{_context(chat)}; the cache takes {nbytes / 1e6:,.1f} MB"))
    return Outcome("\n".join(f"{name:<9} {value}" for name, value in rows))


def _save(chat: Chat, argument: str) -> Outcome:
    messages = chat.conversation.messages
    if not argument:
        raise UsageError("/save takes the name of a file")
    if not messages:
        raise UsageError("there is nothing to save yet")
    path = _path(argument)
    Transcript(chat.model, messages).save(path)
    return Outcome(f"saved {len(messages)} messages → {path}")


def _load(chat: Chat, argument: str) -> Outcome:
    if not argument:
        raise UsageError("/load takes the name of a file")
    if not chat.conversation.has_template:
        raise UsageError("this model has no chat template, so it goes on from no conversation")
    transcript = Transcript.load(_path(argument))
    chat.conversation.restore(transcript.messages)
    system = chat.conversation.system
    turns = _turns(chat)
    said = f"loaded {turns} turn{'' if turns == 1 else 's'}"
    said += " and no system message" if system is None else " and the system message:"
    if transcript.model != chat.model:
        said = f"said with {printable(transcript.model)}: {said}"
    return Outcome(said if system is None else f"{said}\n{printable(system)}")


def _system(chat: Chat, argument: str) -> Outcome:
    if argument:
        chat.conversation.set_system(None if argument.lower() == "none" else argument)
    system = chat.conversation.system
    if system is None:
        return Outcome("there is no system message but the template's own, if it has one")
    return Outcome(f"the system message is: {printable(system)}")


def _compare(chat: Chat, argument: str) -> Outcome:
    choices = {"": not chat.compare, "on": True, "off": False}
    if argument.lower() not in choices:
        raise UsageError(f"/compare takes on or off, not {argument!r}")
    if chat.session.drafting is not None:
        raise UsageError("with --draft every answer is the dense model's: there is one to make")
    chat.compare = choices[argument.lower()]
    if not chat.compare:
        return Outcome("answers are made once")
    if not chat.sparsity:
        return Outcome("answers will be made twice once /sparsity is above 0")
    return Outcome("every answer is made twice now, dense and sparse; the sparse one stays")


def _think(chat: Chat, argument: str) -> Outcome:
    choices = {"": chat.conversation.think is not True, "on": True, "off": False, "auto": None}
    if argument.lower() not in choices:
        raise UsageError(f"/think takes on, off or auto, not {argument!r}")
    chat.conversation.set_think(choices[argument.lower()])
    return Outcome(f"thinking is {_thinking(chat)}")


def _retry(chat: Chat, _: str) -> Outcome:
    if chat.conversation.last_prompt is None:
        raise UsageError("there is nothing to answer again yet")
    return Outcome(retry=True)


def _bye(chat: Chat, _: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS = {
    command.usage.partition(" ")[0]: command
    for command in (
        _Command("/help", "this list", _help),
        _Command("/clear", "forget what was said; the system message stays", _clear),
        _Command("/sparsity [X]", "change the sparsity at once, or show it", _sparsity),
        _Command("/set KEY VALUE", "change one of the settings that /show lists", _set),
        _Command("/show", "show the model and what is set", _show),
        _Command("/stats", "show what the answers took so far", _stats),
        _Command("/save FILE", "store the conversation", _save),
        _Command("/load FILE", "go on from a stored conversation", _load),
        _Command("/system [TEXT]", "show or set the system message; 'none' drops it", _system),
        _Command("/think [on|off|auto]", "think before answers, or not", _think),
        _Command("/compare [on|off]", "answer dense and sparse, or once again", _compare),
        _Command("/retry", "answer the last prompt again", _retry),
        _Command("/bye", "leave; /exit and /quit do too", _bye),
    )
}
_ALIASES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye", "/q": "/bye"}


def _path(argument: str) -> Path:
    return Path(os.path.expanduser(printable(argument)))


def sparsity_of(chat: Chat) -> str:
    """The sparsity that answers have, and what shared it out."""
    if not chat.sparsity:
        return "sparsity 0 (dense)"
    whose = "" if chat.session.drafting is None else " of the guesses"
    return f"sparsity {chat.sparsity:g}{whose}, by {chat.setting_in_force.shown_method}"


def _turns(chat: Chat) -> int:
    return sum(message["role"] == "user" for message in chat.conversation.messages)


def _settings(chat: Chat) -> str:
    return " · ".join(f"{key} {chat.setting(key)}" for key in KEYS)


def _thinking(chat: Chat) -> str:
    return {True: "on", False: "off", None: "as the template has it"}[chat.conversation.think]


def _context(chat: Chat) -> str:
    return f"{chat.session.position} of {chat.session.max_length} tokens"
