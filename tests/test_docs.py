"""The documents keep their word: commands parse, links lead somewhere, errors are the code's."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from teal_cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
HEADING = "## Every message"

_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (?:.*\\\n)*.*$", re.MULTILINE)  # with its continued lines
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_OPERATORS = {"|", "||", "&&", ";", "&", ">", ">>", "<"}


def written(page: Path) -> str:
    """The page without the list of messages, which test_messages.py makes from the source."""
    return page.read_text(encoding="utf-8").partition(HEADING)[0]


def commands_in(page: Path) -> Iterator[list[str]]:
    """The words after `teal` of every command in the page: in blocks, and quoted in sentences."""
    text = written(page)
    prose = _FENCE.sub("", text)
    blocks = "\n".join([*_FENCE.findall(text), *_INDENTED.findall(prose)]).replace("\\\n", " ")
    quoted = [" ".join(span.split()) for span in _SPAN.findall(prose)]
    for line in [*blocks.splitlines(), *quoted]:
        if re.search(r"\bteal ", line):
            yield from teal_commands(line)


def teal_commands(line: str) -> Iterator[list[str]]:
    """The words after each `teal` that a line of shell runs."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _OPERATORS:
            command.append(word)
            continue
        if command and Path(command[0]).name == "teal":
            yield command[1:]
        command = []


def commands() -> list[Any]:
    return [
        pytest.param(words, id=f"{page.name}: teal {' '.join(words)}")
        for page in PAGES
        for words in commands_in(page)
    ]


@cache
def program() -> Any:
    """`teal`, whose commands and whose options that answer at once do nothing."""
    root: Any = typer.main.get_command(app.build())
    root.invoke_without_command = True  # as `teal --version` is
    for command in (root, *root.commands.values()):
        command.callback = None
    for parameter in root.params:
        parameter.callback = None
    return root


def parse(words: list[str]) -> None:
    """Parse a command line as `teal` would, and run nothing.

    Raises:
        Exception: a usage error of the option parser that Typer brings.
    """
    program().main(list(words), prog_name="teal", standalone_mode=False)


@pytest.mark.parametrize("words", commands())
def test_a_command_in_the_documents_parses(words: list[str]) -> None:
    parse(words)


def test_the_documents_show_every_command() -> None:
    shown = {words[0] for page in PAGES for words in commands_in(page) if words}
    assert set(program().commands) <= shown


@pytest.mark.parametrize(
    "line", ["teal chatt", "teal chat --sparsty 0.4", "teal eval a b", "teal bench --tokens many"]
)
def test_a_wrong_command_does_not_parse(line: str) -> None:
    (words,) = teal_commands(line)
    with pytest.raises(Exception, match=r"there is no|has no|unexpected|No such|be a valid"):
        parse(words)


def test_commands_are_found_in_shell() -> None:
    line = 'cat a | .venv/bin/teal chat demo -p "a; b" > c && teal --version  # teal nothing'
    assert list(teal_commands(line)) == [["chat", "demo", "-p", "a; b"], ["--version"]]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(text)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@cache
def layers() -> dict[str, int]:
    """The line of each room in the picture of imports, by its path in teal_cli."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"^```imports\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = enumerate(picture.splitlines())
    return {room: number for number, line in lines for room in line.split()}


def room_of(module: str) -> str:
    """The room that a module of teal_cli, a path, belongs to: its own, or its folder's."""
    return module if module in layers() else module.split("/")[0]


def imported(file: Path) -> set[str]:
    """Paths in teal_cli of the modules that a file imports, inside functions too; "" is itself."""
    source = ROOT / "teal_cli"
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        package, *parts = name.split(".")
        while parts and not source.joinpath(*parts).with_suffix(".py").exists():
            if source.joinpath(*parts).is_dir():
                break
            parts.pop()  # a name in a module
        if package == "teal_cli":
            found.add("/".join(parts))
    return found


def test_imports_run_as_the_picture_says() -> None:
    line, back = layers(), []
    source = ROOT / "teal_cli"
    for file in source.rglob("*.py"):
        module = file.relative_to(source).with_suffix("").as_posix()
        if module in ("__init__", "__main__"):
            continue
        room = room_of(module.removesuffix("/__init__"))
        for other in map(room_of, imported(file)):
            if room != other and line[room] >= line[other]:
                back.append(f"{module} imports {other}")
    assert not back


def test_the_picture_shows_every_room() -> None:
    source = ROOT / "teal_cli"
    paths = [path.relative_to(source).with_suffix("") for path in source.glob("[!_]*")]
    assert {path.as_posix() for path in paths} <= set(layers())
    assert all(
        (source / room).is_dir() or (source / room).with_suffix(".py").exists() for room in layers()
    )


def test_the_kernels_import_nothing_of_the_program() -> None:
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    assert not [file for file in files if imported(file)]


@cache
def messages() -> tuple[str, ...]:
    """Every text in the code, with … for what an f-string fills in."""
    found = []
    folders = (ROOT / "teal_cli", ROOT / "kernels" / "teal_kernels")
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def test_troubleshooting_quotes_the_code() -> None:
    rows = re.findall(r"^\| (`.*?) \|", written(TROUBLESHOOTING), re.MULTILINE)
    quoted = [span for row in rows for span in _SPAN.findall(row)]
    assert len(quoted) >= 20
    assert not [text for text in quoted if not any(text in message for message in messages())]
