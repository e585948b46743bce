"""The errors that a user can cause; everything else is a bug and may raise what it likes.

A `TealError` says what failed and why; `hint` names the next step. The command line prints
both and exits with `exit_code`; no other part of the program prints or exits.
"""

_LONGEST = 600  # characters of a library's text


class TealError(Exception):
    """Something that the user can reach went wrong (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TealError):
    """An argument is out of range or contradicts another (exit code 2)."""

    exit_code = 2


class MissingError(TealError):
    """A model, file or artifact is not there; `hint` names the command that makes it (3)."""

    exit_code = 3


class AccessError(TealError):
    """The Hub refused access: a gated repository or a bad token (exit code 4)."""

    exit_code = 4


class UnsupportedError(TealError):
    """The device or the model's architecture is not supported (exit code 5)."""

    exit_code = 5


def whole(error: BaseException) -> str:
    """A library's error on one line: its last words often say what to do."""
    return on_one_line(str(error)) or type(error).__name__


def on_one_line(text: str) -> str:
    """The text on one line; of a compiler's whole output the beginning and the end."""
    text = " ".join(text.split())
    if len(text) <= _LONGEST:
        return text
    half = (_LONGEST - len(" … ")) // 2
    return f"{text[:half]} … {text[-half:]}"
