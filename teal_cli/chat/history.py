"""The prompts of earlier chats: one JSON string a line, bounded, for the user alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import History

from teal_cli.store import artifacts

_KEPT = 1000  # prompts that stay when the file is cut
_MOST = 2 * _KEPT
_LONGEST = 4000  # characters; a longer prompt was pasted, and is kept until the chat ends


class FileHistory(History):
    """A history in a file with mode 0600; where that cannot be had, of this chat alone."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """The newest first; what is damaged is left out."""
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return
        with suppress(OSError):
            if not self._path.is_symlink():
                self._path.chmod(0o600)  # it may have been copied here
            if len(lines) > _MOST:
                lines = lines[-_KEPT:]
                artifacts.atomic_write(self._path, b"\n".join([*lines, b""]), private=True)
        for line in reversed(lines):
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, str):
                    yield entry

    def store_string(self, string: str) -> None:
        """Add one at the end; chats that run at once do not mix their lines."""
        if len(string) > _LONGEST:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(file, "ab") as opened:
                opened.write(json.dumps(string).encode() + b"\n")
