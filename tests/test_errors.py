"""What is passed on of a library's error."""

from __future__ import annotations

import pytest

from teal_cli.errors import whole


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a first line\n  and what to do"), "a first line and what to do"),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_an_error_is_one_line(error: Exception, said: str) -> None:
    assert whole(error) == said


def test_of_a_long_error_both_ends_are_kept() -> None:
    said = whole(RuntimeError("it begins\n" + "and goes on\n" * 1000 + "install a compiler"))
    assert len(said) < 700
    assert said.startswith("it begins and")
    assert said.endswith("install a compiler")
