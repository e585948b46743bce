"""The Python in the documents runs as it is printed; only the models' names become a tiny one's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from teal_cli import pipeline
from teal_cli.progress import Silent
from teal_cli.sparsity import stored
from teal_cli.store import models
from teal_cli.text.sample import SampleSettings

ROOT = Path(__file__).parents[1]
_PYTHON = re.compile(r"^```py(?:thon)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return _PYTHON.findall(page.read_text(encoding="utf-8"))


PAGES = [page for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]) if blocks(page)]


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A home where the tiny model has a profile, and the folder that holds it."""
    home = tmp_path_factory.mktemp("home")
    where: dict[str, Any] = {"device": "cpu", "offline": True, "reporter": Silent()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(home))
        checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), **where)
        pipeline.make_profile(
            checkpoint,
            SampleSettings(dataset="pydoc", samples=2, seq_len=64),
            method="uniform",
            **where,
        )
        return home, stored.profile_path(checkpoint).parent


def run(page: Path, model: Path) -> dict[str, Any]:
    """Run a page's blocks one after the other, as a reader would; return what they define."""
    names = "|".join(map(re.escape, sorted(models.SHORT_NAMES.values(), key=len, reverse=True)))
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks(page), 1):
        code = re.sub(names, model.as_posix(), block)
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path,
    calibrated: tuple[Path, Path],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, folder = calibrated
    monkeypatch.setenv("TEAL_HOME", str(home))
    monkeypatch.chdir(folder)
    made = run(page, tiny_model)
    if page.name == "python.md":
        assert made["sparse"].shape == made["dense"].shape
        assert (made["sparse"] != made["dense"]).any()
    if page.name == "formats.md":
        assert made["counts"].shape == (3, 4, 2562)
        assert made["header"]["fingerprint"]


def test_pages_with_python_are_found() -> None:
    assert {"python.md", "formats.md"} <= {page.name for page in PAGES}
