"""`teal --env`: a block that can be pasted anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teal_cli import __version__
from teal_cli.environment import describe


def test_it_says_what_a_maintainer_asks(teal_home: Path) -> None:
    block = describe({})
    first, *lines, last = block.splitlines()
    assert first == last == "```"
    assert lines[0].startswith(f"teal           {__version__}, Python 3.")
    for word in ("torch ", "transformers ", "CPU ", "GPU", "numba (CPU)", str(teal_home)):
        assert word in block
    assert all(len(line) <= 100 or "/" in line for line in lines)


def test_secrets_and_the_users_name_stay_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "stored"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    block = describe({"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://me:pw@x", "OTHER": "1"})
    assert "Hub token      present" in block
    assert "HF_ENDPOINT, HF_TOKEN" in block
    assert "~/stored/data (not there yet" in block
    assert not any(secret in block for secret in ("hf_secret", "me:pw", "OTHER", tmp_path.name))


def test_a_broken_installation_is_described(
    monkeypatch: pytest.MonkeyPatch, teal_home: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    block = describe({})
    assert "torch          ModuleNotFoundError" in block
    assert "Hub token      ModuleNotFoundError" in block


def test_the_program_prints_it(teal_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "teal_cli", "--env"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_TOKEN": "hf_secret"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("```\nteal ")
    assert "hf_secret" not in done.stdout
