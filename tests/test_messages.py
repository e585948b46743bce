"""docs/troubleshooting.md ends with every message that teal's errors have, read from the source.

After a change of any: UPDATE_DOCS=1 python -m pytest tests/test_messages.py
"""

from __future__ import annotations

import ast
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from teal_cli import errors, faults
from teal_cli.options import parse_sparsity
from teal_cli.store import local, models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = "## Every message"
INTRODUCTION = f"""{HEADING}

All that can follow `error:`, with its exit code and its next step, sorted by the first words that
stay the same. Made from the source: `tests/test_messages.py` writes and checks it.

| what teal says | code | what to do |
| --- | --- | --- |
"""
# Where a message is itself the step.
ITSELF = {
    1: "Mend what the message names, or fetch or make it anew.",
    2: "Change what the message names; `--help` says what there is.",
    3: "Make what is missing, or name another.",
    4: "Log in again: `hf auth login`.",
    5: "Take another model, or another device.",
}
WILD = "…"


@dataclass(frozen=True, slots=True)
class Message:
    """What an error says, with … for what is filled in; its step, and its exit code."""

    text: str
    code: int
    hint: str

    def says(self, text: str) -> bool:
        parts = [re.escape(part) for part in self.text.split(WILD)]
        return re.fullmatch(".*?".join(parts), text, re.DOTALL) is not None


class Texts:
    """The texts that an expression of a module may have."""

    def __init__(self, tree: ast.Module, imported: dict[str, list[ast.expr]]) -> None:
        self._constants = imported | _assigned(tree.body)
        self._functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}

    def of(self, node: ast.expr | None, local_names: dict[str, list[ast.expr]]) -> list[str]:
        if isinstance(node, ast.Constant):
            return [node.value if isinstance(node.value, str) else ""]
        if isinstance(node, ast.JoinedStr):
            return self._joined([self.of(part, local_names) for part in node.values])
        if isinstance(node, ast.FormattedValue):
            inner = node.value
            known = isinstance(inner, ast.Name) and inner.id in self._constants
            return self.of(inner, {}) if known or isinstance(inner, ast.IfExp) else [WILD]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([self.of(node.left, local_names), self.of(node.right, local_names)])
        if isinstance(node, ast.IfExp):
            return [*self.of(node.body, local_names), *self.of(node.orelse, local_names)]
        if isinstance(node, ast.Name):
            # Without itself: a text that is added to would never end.
            others = {name: given for name, given in local_names.items() if name != node.id}
            found = local_names.get(node.id) or self._constants.get(node.id) or []
            return [text for given in found for text in self.of(given, others)] or [WILD]
        if isinstance(node, ast.Call):
            return self._called(node.func, local_names)
        return [WILD]

    def _called(self, function: ast.expr, local_names: dict[str, list[ast.expr]]) -> list[str]:
        """What `text.format(…)` and a function of the module itself return."""
        if isinstance(function, ast.Attribute) and function.attr == "format":
            texts = self.of(function.value, local_names)
            return [re.sub(r"\{\w*\}", WILD, text) for text in texts]
        made = self._functions.get(getattr(function, "id", ""))
        if made is None:
            return [WILD]
        names = _assigned(made.body)
        returned = [n.value for n in ast.walk(made) if isinstance(n, ast.Return)]
        return [text for value in returned for text in self.of(value, names)]

    @staticmethod
    def _joined(parts: list[list[str]]) -> list[str]:
        return ["".join(chosen) for chosen in itertools.product(*parts)]


def _assigned(body: list[ast.stmt]) -> dict[str, list[ast.expr]]:
    """What the statements, and those in them, assign to single names."""
    found: dict[str, list[ast.expr]] = {}
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, []).append(node.value)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and statement is node:
                break  # of a module: its functions' names are their own
    return found


@cache
def modules() -> dict[str, ast.Module]:
    files = sorted((ROOT / "teal_cli").rglob("*.py"))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text("utf-8"))
        for file in files
    }


@cache
def codes() -> dict[str, int]:
    """The exit code of every class of errors, those that a room has of its own too."""
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.TealError)
    }
    classes = [
        n for tree in modules().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)
    ]
    for _ in classes:  # until no class has a base that is not known yet
        for node in classes:
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in found:
                    found.setdefault(node.name, found[base.id])
    return found


def _imported(tree: ast.Module) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules():
            constants = _assigned(modules()[node.module].body)
            found |= {a.name: constants[a.name] for a in node.names if a.name in constants}
    return found


def _raised() -> Iterator[Message]:
    for tree in modules().values():
        texts = Texts(tree, _imported(tree))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            names = _assigned(function.body)
            for call in ast.walk(function):
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                code = codes().get(getattr(call.func, "id", None) or getattr(call.func, "attr", ""))
                if code is None:
                    continue
                hint = next((k.value for k in call.keywords if k.arg == "hint"), None)
                steps = [step for step in texts.of(hint, names) if step.strip(f"{WILD} ")]
                for text in texts.of(call.args[0], names):
                    yield Message(text, code, " Or: ".join(dict.fromkeys(steps)))


def _tabled() -> Iterator[Message]:
    """Messages that tables hold."""
    for sentence, hint in faults._SYSTEM_ERRORS.values():
        yield Message(f"{sentence}: {WILD}", 1, hint)
    for what, hint in local._OLD_GGML.values():
        yield Message(f"{WILD} is {what}, not a GGUF file", 5, hint)
    for what, hint in local._FOREIGN.values():
        yield Message(f"{WILD} is {what}, not a GGUF file", 2, hint)


@cache
def messages() -> tuple[Message, ...]:
    """Every message once, sorted by its first fixed words."""
    found: dict[tuple[str, int], list[str]] = {}
    for message in (*_raised(), *_tabled()):
        text = re.sub(rf"(?:{WILD})+", WILD, " ".join(message.text.split()))
        if len(re.sub(r"\W", "", text)) < 4:
            continue  # another message is passed on whole
        hints = found.setdefault((text, message.code), [])
        hint = " ".join(message.hint.split()).lstrip(WILD)
        if hint and hint not in hints:
            hints.append(hint)
    merged = [Message(text, code, " Or: ".join(hints)) for (text, code), hints in found.items()]
    return tuple(sorted(merged, key=lambda message: (_words(message.text), message.code)))


def _words(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def render() -> str:
    rows = []
    for message in messages():
        fence = "``" if "`" in message.text else "`"
        step = (message.hint or ITSELF[message.code]).replace("|", "\\|")
        text = message.text.replace("|", "\\|")
        rows.append(f"| {fence}{text}{fence} | {message.code} | {step} |\n")
    return INTRODUCTION + "".join(rows)


def test_the_page_lists_every_message() -> None:
    written, heading, listed = PAGE.read_text(encoding="utf-8").partition(HEADING)
    if os.environ.get("UPDATE_DOCS") == "1":
        PAGE.write_text(f"{written.rstrip()}\n\n{render()}", encoding="utf-8")
        heading, listed = render()[: len(HEADING)], render()[len(HEADING) :]
    assert heading + listed == render(), "run it again with UPDATE_DOCS=1"


def test_the_source_is_read_whole() -> None:
    calls = sum(
        text.count(f"raise {name}(")
        for text in ((f.read_text("utf-8")) for f in (ROOT / "teal_cli").rglob("*.py"))
        for name in codes()
    )
    assert len(messages()) > 0.8 * calls > 200


def failure(cause: Callable[[], object]) -> Exception:
    try:
        cause()
    except Exception as error:
        return error
    raise AssertionError("nothing failed")


@pytest.mark.parametrize(
    "cause",
    [
        lambda: models.resolve("no-such-model"),
        lambda: models.resolve(__file__),
        lambda: models.resolve(str(ROOT / "README.md"), "main"),
        lambda: parse_sparsity("40"),
        lambda: Path("no/such/file").read_text(),
        lambda: Path(__file__, "x").read_text(),
        lambda: bytearray(1 << 62),
        lambda: 1 // 0,
    ],
)
def test_what_is_raised_is_found(cause: Callable[[], object]) -> None:
    error = faults.explain(failure(cause))
    found = [m for m in messages() if m.code == error.exit_code and m.says(error.message)]
    assert found, error.message
