"""Where teal keeps its files."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from teal_cli.store import paths


def test_everything_is_below_teal_home(teal_home: Path) -> None:
    assert paths.data_dir() == teal_home / "data"
    assert paths.cache_dir() == teal_home / "cache"
    assert paths.state_dir() == teal_home / "state"
    assert paths.model_dir("org--model").is_relative_to(teal_home / "data")
    assert paths.profile_path("org--model", "float16").is_relative_to(teal_home / "data")
    assert not teal_home.exists()


@pytest.mark.parametrize("home", [None, ""])
def test_without_it_the_platforms_folders_serve(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is None:
        monkeypatch.delenv("TEAL_HOME", raising=False)
    else:
        monkeypatch.setenv("TEAL_HOME", home)
    assert paths.data_dir() == platformdirs.user_data_path("teal", appauthor=False)
    assert paths.cache_dir() == platformdirs.user_cache_path("teal", appauthor=False)


def test_a_home_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_HOME", "~/teal")
    assert paths.data_dir() == Path.home() / "teal" / "data"
