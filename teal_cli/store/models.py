"""Which model the user means: a Hub id, a folder, a GGUF file, the demo, or the last one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.progress import Silent
from teal_cli.store import artifacts, local, paths

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIASES = {"demo": DEMO}
# What people call the models that `teal bench --random-weights` knows by shape.
SHORT_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.1",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "smollm2-135m": DEMO,
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
_LONGEST_BYTES = 100  # of a local model's name in its folder's
# The Hub's own rule.
_HUB_ID = re.compile(r"(?=.{3,96}$)(?!.*(?:--|\.\.))\w[\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)
# How browsers, llama.cpp and ollama name a model of the Hub.
_ADDRESS = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)(?:[:/].*)?", re.ASCII
)
_OLLAMA_NAME = re.compile(r"(?:[\w.-]+/)*[\w.-]+:[\w.-]+", re.ASCII)
_OLLAMA = (
    "A name with a tag is ollama's: its file, which `ollama show NAME --modelfile` names, is "
    "taken as it is. "
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by name; `path` is set for a local folder or file, `revision` for the Hub's."""

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: Path | None = None
    revision: str | None = None

    @property
    def slug(self) -> str:
        """A folder name of its own for every model (and revision that was asked for)."""
        if self.path is not None:
            # A name need not be text, and may be as long as the file system allows.
            name = os.fsencode(self.path.name)[:_LONGEST_BYTES].decode("utf-8", "ignore")
            return f"{name}-{_short_hash(str(self.path))}"
        slug = self.name.replace("/", "--")
        return f"{slug}@{_short_hash(self.revision)}" if self.revision else slug


def resolve(text: str | None, revision: str | None = None) -> ModelRef:
    """The model that the user names; None is the last one used, at first the demo model.

    Raises:
        MissingError: `text` is neither a folder, a GGUF file, an alias nor a Hub id.
        UsageError: a revision is asked of a local model, or the path holds no model, or several.
        UnsupportedError: the file is a model in a format that is not read.
    """
    if text is None:
        ref = last_used() or ModelRef("hub", DEMO)
        text = str(ref.path) if ref.path is not None else ref.name
        revision = revision or ref.revision
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):  # pathlib's own would raise on a name that is too long
        if revision is not None:
            raise UsageError(f"--revision goes with a model on the Hub, {text} is local")
        kind, path = local.model_at(path)
        return ModelRef(kind, str(path), path)
    name = ALIASES.get(text, text)
    if not _HUB_ID.fullmatch(name):
        raise MissingError(
            f"there is no model {text!r}",
            hint=_hint(text) + "Name a Hub id (org/name), a local folder, a .gguf file, or 'demo'.",
        )
    return ModelRef("hub", name, revision=revision)


def _hint(text: str) -> str:
    """What may have been meant by a name that is none, as sentences; empty if nothing is known."""
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        return f"On the Hub that is {address['id']}. "
    name, colon, _ = text.partition(":")
    if colon and _OLLAMA_NAME.fullmatch(text):
        return _guess(name) + _OLLAMA
    return _guess(text)


def _guess(text: str) -> str:
    """The model on the Hub that a short name may mean, as a question; empty if there is none."""
    import difflib

    close = difflib.get_close_matches(text.lower(), SHORT_NAMES, n=1, cutoff=0.8)
    return f"Did you mean {SHORT_NAMES[close[0]]}? " if close else ""


def remember(ref: ModelRef) -> None:
    """Make `ref` the model that commands use when none is named, and note the time."""
    path = str(ref.path) if ref.path is not None else None
    record = {"kind": ref.kind, "name": ref.name, "path": path, "revision": ref.revision}
    with contextlib.suppress(OSError, TealError):  # a folder that takes nothing stops no one
        _mark(ref.slug).parent.mkdir(parents=True, exist_ok=True)
        _mark(ref.slug).touch()
        if ref == last_used():
            return
        with artifacts.lock(_last_model(), Silent()):
            artifacts.remove_leftovers(_last_model())
            artifacts.atomic_write(_last_model(), json.dumps(record).encode())


def last_used() -> ModelRef | None:
    """The model used last; None if there is none, or if it is gone."""
    try:
        record = json.loads(_last_model().read_text(encoding="utf-8"))
        path = Path(record["path"]) if record["path"] else None
        ref = ModelRef(record["kind"], record["name"], path, record["revision"])
        known = _HUB_ID.fullmatch(ref.name) if path is None else path.exists()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return ref if known and isinstance(ref.revision, str | None) else None


def last_time(slug: str) -> datetime | None:
    """When a model was last used, in local time; None if never."""
    try:
        return datetime.fromtimestamp(_mark(slug).stat().st_mtime)
    except OSError:
        return None


def forget(slug: str | None) -> None:
    """Take back that a model was used."""
    if slug is None:
        return
    _mark(slug).unlink(missing_ok=True)
    last = last_used()
    if last is not None and last.slug == slug:
        _last_model().unlink()


def _mark(slug: str) -> Path:
    return paths.state_dir() / "used" / slug


def _last_model() -> Path:
    return paths.state_dir() / "last-model.json"


def _short_hash(text: str) -> str:
    # A path need not be text: what is no UTF-8 in it comes as halves of surrogate pairs.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
