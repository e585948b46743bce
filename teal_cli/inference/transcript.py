"""Conversations on disk: one JSON file each, with a schema version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.errors import MissingError, TealError
from teal_cli.faults import reason
from teal_cli.inference.chat_template import Message
from teal_cli.store import artifacts

_ROLES = ("system", "user", "assistant")
_TEXTS = ("content", "reasoning_content")  # a message's, the second where there was thinking
_LARGEST_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said, and to which model."""

    model: str
    messages: Sequence[Message]

    def save(self, path: Path) -> None:
        """Write the file, atomically; only another conversation is overwritten.

        Raises:
            TealError: something else has this name, or it cannot be written.
        """
        payload = {"model": self.model, "messages": list(self.messages)}
        try:
            if path.exists() and not _is_conversation(path):
                raise TealError(
                    f"{path} exists and is no conversation", hint="Choose another name."
                )
            artifacts.write_manifest(path, artifacts.CHAT, payload, private=True)
        except OSError as error:
            raise TealError(f"{path} cannot be written: {reason(error)[0]}") from None

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read a file.

        Raises:
            MissingError: there is none.
            TealError: it cannot be read, is damaged, or is of another version's format.
        """
        try:
            if not path.is_file():
                raise MissingError(f"there is no conversation {path}")
            if path.stat().st_size > _LARGEST_BYTES:
                raise TealError(f"{path} is too large for a conversation")
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise TealError(f"{path} cannot be read: {reason(error)[0]}") from None
        except (ValueError, RecursionError) as error:
            raise TealError(f"{path} is no conversation: {error}") from None
        if not isinstance(content, dict) or content.get("kind") != artifacts.CHAT:
            raise TealError(f"{path} is no conversation that teal saved")
        if content.get("schema") != artifacts.SCHEMAS[artifacts.CHAT]:
            raise TealError(
                f"{path} has format {content.get('schema')!r}, this version of teal reads "
                f"{artifacts.SCHEMAS[artifacts.CHAT]}"
            )
        messages = content.get("messages")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise TealError(f"{path} is damaged: its messages are not what teal writes")
        if not _in_order([message["role"] for message in messages]):
            raise TealError(f"{path} is damaged: its turns are not in order")
        kept = [{k: m[k] for k in ("role", *_TEXTS) if k in m} for m in messages]
        return cls(str(content.get("model")), kept)


def _is_conversation(path: Path) -> bool:
    try:
        Transcript.load(path)
    except TealError:
        return False
    return True


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        return False
    texts = [value[name] for name in _TEXTS if name in value]
    # Half a surrogate pair passes JSON, but no tokenizer.
    return "content" in value and all(
        isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text) for text in texts
    )


def _in_order(roles: list[str]) -> bool:
    """A system message or none, then turns of user and assistant."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return turns == ["user", "assistant"] * (len(turns) // 2)
