"""docs/cli.md says what `--help` says.

It is made from the commands themselves, not from the printed help, whose layout is typer's affair.
After a change of the options: UPDATE_DOCS=1 python -m pytest tests/cli/test_reference.py
"""

from __future__ import annotations

import inspect
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from teal_cli import app
from teal_cli.examples import EXAMPLES

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
INTRODUCTION = """\
# Command line reference

Made from the commands' own help texts: `tests/cli/test_reference.py` writes and checks it.

Results go to stdout, everything else to stderr. `NO_COLOR` turns colours off, `TEAL_HOME` puts
everything that teal stores into one folder, `TEAL_HISTORY=1` keeps the prompts of chats,
`TEAL_DEBUG=1` shows the traceback of an error. `teal --install-completion` lets the shell complete
commands, options and the names of models.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | something failed |
| 2 | wrong usage |
| 3 | something is missing; the message names the command that makes it |
| 4 | access denied by the Hub |
| 5 | the device or the model is not supported |
| 130 | stopped with Ctrl-C |
"""


def render() -> str:
    root: Any = typer.main.get_command(app.build())
    sections = [section("teal", root)]
    sections += [section(f"teal {name}", command) for name, command in root.commands.items()]
    return "\n".join([INTRODUCTION, *sections])


def section(title: str, command: Any) -> str:
    """One command: its help, then a table of its arguments and options."""
    annotations = {
        name: parameter.annotation
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items()
    }
    # Typer's own options (completion) carry no annotation of ours.
    rows = [row(p, annotations[p.name]) for p in command.params if p.name in annotations]
    table = "\n".join(["| option | meaning |", "| --- | --- |", *rows])
    examples = "\n".join(EXAMPLES[title.partition(" ")[2]])
    return (
        f"## {title}\n\n{inspect.cleandoc(command.help)}\n\n```bash\n{examples}\n```\n\n{table}\n"
    )


def row(parameter: Any, annotation: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar}`"
    else:
        value = value_name(annotation)
        options = [*parameter.opts, *parameter.secondary_opts]
        name = ", ".join(f"`{option}`" for option in sorted(options, key=len))
        name += f" {parameter.metavar or value}" if value else ""
    text = parameter.help
    if parameter.default is not None and parameter.default is not False:
        text += f" [default: {parameter.default}]"
    cells = (cell.replace("|", "\\|") for cell in (name, text))
    return f"| {' | '.join(cells)} |"


def value_name(annotation: Any) -> str:
    """What a value of the annotated type is called; empty for a flag."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    alternatives = [kind for kind in get_args(annotation) if kind is not type(None)]
    if alternatives:
        return value_name(alternatives[0])
    if issubclass(annotation, Enum):
        return "|".join(member.value for member in annotation)
    names = {bool: "", str: "TEXT", int: "N", float: "X", Path: "PATH"}
    return names[annotation]


def test_the_reference_is_what_help_prints() -> None:
    page = render()
    if os.environ.get("UPDATE_DOCS") == "1":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
    assert page == PAGE.read_text(encoding="utf-8"), "run it again with UPDATE_DOCS=1"
