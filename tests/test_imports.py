"""Imports run one way: commands → chat → … → store → what everyone needs → kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"teal_cli": ROOT / "teal_cli", "teal_kernels": ROOT / "kernels" / "teal_kernels"}
# The rooms, one above the other: a module imports from its own and from those below it.
ORDER = (
    "__main__",
    "app",
    "commands",
    "chat",
    "options",
    "console",
    "process",
    "teal_cli",  # the Python interface
    "sparsified",
    "pipeline",
    "evaluation",
    "benchmark",
    "report",
    "inference",
    "rounding",
    "sparsity",
    "text",
    "model",
    "environment",
    "store",
    "faults",
    "errors",
    "progress",
    "printable",
    "version",
    "teal_kernels",
)


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it: late and for types as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        yield from (name for name in names if name in MODULES)


def room(module: str) -> str:
    """The folder or file below teal_cli that a module is in; the kernels are one."""
    package, *inner = module.split(".")
    return inner[0] if package == "teal_cli" and inner else package


GRAPH = {
    module: {name for name in imported(path) if name != module} for module, path in MODULES.items()
}


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} == set(ORDER)


def test_no_import_points_back() -> None:
    back = [
        f"{module} imports {name}"
        for module, names in sorted(GRAPH.items())
        for name in sorted(names)
        if ORDER.index(room(name)) < ORDER.index(room(module))
    ]
    assert back == []


@pytest.mark.parametrize(
    "package",
    [
        "teal_cli",
        pytest.param(
            "teal_kernels",
            marks=pytest.mark.xfail(strict=True, reason="dispatch.py, which no decoding calls"),
        ),
    ],
)
def test_no_imports_run_in_a_circle(package: str) -> None:
    inside = {module: names for module, names in GRAPH.items() if module.startswith(package)}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
