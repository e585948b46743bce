"""Wrong command lines in teal's own words, and what other programs call teal's commands."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer
from typer.core import TyperGroup

from teal_cli.errors import UsageError
from teal_cli.suggestions import closest, did_you_mean, quoted

# Typer brings its own Click, and exports but one of its errors; all of them have this base.
ParserError: type[Any] = typer.BadParameter.__mro__[1]

# The commands of ollama, llama.cpp, llm, vLLM and pip that people's fingers know. MODEL stands for
# what follows the command.
_ELSEWHERE = {
    "run": "teal chat MODEL",
    "talk": "teal chat MODEL",
    "ask": "teal chat MODEL",
    "generate": "teal chat MODEL",
    "pull": "teal download MODEL",
    "get": "teal download MODEL",
    "fetch": "teal download MODEL",
    "install": "teal download MODEL",
    "list": "teal models",
    "ls": "teal models",
    "show": "teal models",
    "rm": "teal models --remove MODEL",
    "remove": "teal models --remove MODEL",
    "delete": "teal models --remove MODEL",
    "benchmark": "teal bench MODEL",
    "evaluate": "teal eval MODEL",
    "perplexity": "teal eval MODEL",
    "create": "teal convert MODEL",
    "quantize": "teal convert MODEL --quantize int8",
    "version": "teal --version",
    "env": "teal --env",
    "info": "teal --env",
}
_NOT_HERE = {
    "ps": "teal runs only while a command does: teal models lists what is stored.",
    "stop": "teal runs only while a command does, and Ctrl-C ends it.",
    "push": "teal uploads nothing: hf upload does.",
    "login": "Log in to the Hub with: hf auth login",
}
_RANGES = {
    r"greater than or equal to (\S+)": "{} or more",
    r"less than or equal to (\S+)": "at most {}",
    r"not in the range x>=(\S+?)\.?$": "{} or more",
    r"valid integer": "a whole number",
    r"valid (?:number|float)": "a number",
}


class Group(TyperGroup):
    """The program's commands: `help` is understood, and a name that is none is explained."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`teal` alone and `teal help` show the help; `teal help chat` that of a command."""
        if not args:
            args = ["--help"]
        elif args[0] == "help":
            args = [*args[1:2], "--help"]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names.

        Raises:
            UsageError: it names none.
        """
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            raise _no_command(args, list(self.commands))
        return super().resolve_command(ctx, args)


def _no_command(words: list[str], commands: list[str]) -> UsageError:
    name, *rest = words
    meant = name.lower() if name.lower() in (*_ELSEWHERE, *_NOT_HERE) else None
    if meant is None:
        meant = closest(name, (*commands, *_ELSEWHERE, *_NOT_HERE), cutoff=0.7)
    if meant in _ELSEWHERE:
        hint = f"In teal that is: {_filled(_ELSEWHERE[meant], rest)}"
    elif meant in _NOT_HERE:
        hint = _NOT_HERE[meant]
    elif meant is not None:
        hint = f"Did you mean teal {meant}?"
    else:
        hint = f"The commands are {', '.join(commands)}; `teal --help` says what they do."
    return UsageError(f"there is no command {quoted(name)}", hint=hint)


def _filled(command: str, rest: list[str]) -> str:
    """The command with the model that was named; with all the words where they are plain."""
    if not rest or any(quoted(word) != repr(word) or word.startswith("-") for word in rest):
        return command
    return command.replace("MODEL", shlex.join(rest))


def explained(error: Any) -> UsageError:
    """An error of Typer's option parser as one of teal's."""
    message = error.format_message()
    path = error.ctx.command_path if error.ctx is not None else "teal"
    help_hint = f"`{path} --help` lists what there is."
    if hasattr(error, "possibilities"):
        options = [o for p in error.ctx.command.params for o in (*p.opts, *p.secondary_opts)]
        # Without the dashes, which would make all short names alike.
        names = [option.removeprefix("--") for option in options if option.startswith("--")]
        name = closest(error.option_name.lstrip("-"), names)
        meant = f"Did you mean --{name}? " if name else ""
        return UsageError(
            f"{path} has no option {quoted(error.option_name)}",
            hint=f"{meant}{help_hint}",
        )
    if hasattr(error, "param_type"):  # a missing argument, whose message is empty
        needed = [_name(param) for param in error.ctx.command.params if param.required]
        return UsageError(
            f"no {_name(error.param)} is named",
            hint=f"As in {path} {' '.join(needed)}; {help_hint}",
        )
    if isinstance(error, typer.BadParameter):
        return _bad_value(error, help_hint)
    if missing := re.match(r"Option '(\S+)' requires", message):
        hint = f"It follows behind, as in {missing[1]} VALUE."
        return UsageError(f"{missing[1]} needs a value", hint=hint)
    if flag := re.match(r"Option '(\S+)' does not take", message):
        return UsageError(f"{flag[1]} takes no value", hint="Leave it out.")
    if extra := re.search(r"unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        return UsageError(f"{path} takes no further argument {quoted(extra[1])}", hint=help_hint)
    if message.startswith("Missing command"):
        return UsageError("no command is named", hint=help_hint)
    return UsageError(message, hint=help_hint)


def _name(param: Any) -> str:
    """An argument as the help has it."""
    return str(param.metavar or param.human_readable_name.upper())


def _bad_value(error: Any, help_hint: str) -> UsageError:
    """What an option takes, and what it was given as far as the parser tells."""
    option = max(error.param.opts, key=len) if error.param is not None else "the value"
    message = re.sub(r"^Value error, ", "", error.message)
    if choice := re.match(r"(.*) is not one of (.*?)\.?$", message, re.DOTALL):
        choices, typed = re.findall(r"'([^']*)'", choice[2]), choice[1].strip("'")
        return UsageError(
            f"{option} takes {', '.join(choices[:-1])} or {choices[-1]}, not {quoted(typed)}",
            hint=f"{did_you_mean(typed, choices, cutoff=0.5)}{help_hint}",
        )
    for pattern, takes in _RANGES.items():
        if found := re.search(pattern, message):
            given = _typed(error, message)
            sentence = f"{option} takes {takes.format(*found.groups())}{given}"
            return UsageError(sentence, hint=help_hint)
    return UsageError(f"{option}: {message}", hint=help_hint)


def _typed(error: Any, message: str) -> str:
    """ ", not '…'" with the value that was given; empty where the parser keeps it to itself."""
    details = getattr(error.__cause__, "errors", None)  # pydantic's
    if details is not None:
        return f", not {quoted(str(details()[0]['input']))}"
    named = re.match(r"'?([^']*?)'? is not", message)
    return f", not {quoted(named[1])}" if named else ""
