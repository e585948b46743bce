"""Files that results are written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from teal_cli import exports
from teal_cli.errors import MissingError, UsageError


@pytest.mark.parametrize("name", ["x.txt", "x", "json"])
def test_an_unknown_suffix_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"--output .* must end in \.json, \.csv or \.md"):
        exports.check_table(Path(name))
    with pytest.raises(UsageError, match=r"--plot .* must end in \.png, \.pdf or \.svg"):
        exports.check_figure(Path(name))


def test_suffixes_in_capitals_and_no_file_at_all() -> None:
    exports.check_table(Path("x.MD"))
    exports.check_table(None)
    exports.check_figure(None)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="matplotlib") as caught:
        exports.check_figure(Path("x.png"))
    assert caught.value.hint is not None
    assert "teal-cli[plot]" in caught.value.hint
