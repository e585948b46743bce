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
from teal_cli.suggestions import did_you_mean, quoted

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Short names, and what they mean on the Hub: the variant that chats. As ollama and people write
# them, upper or lower case, with or without a hyphen or colon before the size.
SHORT_NAMES = {
    "demo": DEMO,
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistral-small-24b": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "ministral-3-3b": "mistralai/Ministral-3-3B-Instruct-2512",
    "ministral-3-8b": "mistralai/Ministral-3-8B-Instruct-2512",
    "ministral-3-14b": "mistralai/Ministral-3-14B-Instruct-2512",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3-medium": "microsoft/Phi-3-medium-4k-instruct",
    "phi-4": "microsoft/phi-4",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-instruct",
    "granite-3.3-8b": "ibm-granite/granite-3.3-8b-instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B-Instruct",
    "qwen2-1.5b": "Qwen/Qwen2-1.5B-Instruct",
    "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
    "qwen2-72b": "Qwen/Qwen2-72B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "smollm2-135m": DEMO,
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
# A family's name alone is the size that most people run.
FAMILIES = {
    "llama-2": "llama-2-7b",
    "llama-3": "llama-3-8b",
    "llama-3.1": "llama-3.1-8b",
    "llama-3.2": "llama-3.2-3b",
    "llama-3.3": "llama-3.3-70b",
    "mistral": "mistral-7b",
    "mistral-small": "mistral-small-24b",
    "ministral-3": "ministral-3-8b",
    "phi-3": "phi-3-mini",
    "granite-3.3": "granite-3.3-8b",
    "smollm3": "smollm3-3b",
    "tinyllama": "tinyllama-1.1b",
    "qwen2": "qwen2-7b",
    "qwen2.5": "qwen2.5-7b",
    "qwen3": "qwen3-8b",
    "smollm2": "smollm2-1.7b",
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
    name = hub_name(text)
    if not _HUB_ID.fullmatch(name):
        raise MissingError(f"there is no model {quoted(text)}", hint=_hint(text))
    return ModelRef("hub", name, revision=revision)


def names() -> list[str]:
    """Every short name, as it is written most."""
    return [*SHORT_NAMES, *FAMILIES]


def short_name(text: str) -> str | None:
    """The key of SHORT_NAMES that a user means; None if it is none of them."""
    plain = _plain(text)
    if plain in _BY_PLAIN:
        return _BY_PLAIN[plain]
    return _BY_PLAIN.get(re.sub(r"^meta|(instruct|chat|it|latest)$", "", plain))


def hub_name(text: str) -> str:
    """What a short name means on the Hub; any other text as it is."""
    name = short_name(text)
    return text if name is None else SHORT_NAMES[name]


def _plain(name: str) -> str:
    """A name without case, hyphens and colons, which everyone sets elsewhere."""
    return re.sub(r"[-_: ]", "", name.lower())


_BY_PLAIN = {_plain(name): name for name in SHORT_NAMES} | {
    _plain(family): name for family, name in FAMILIES.items()
}


def _hint(text: str) -> str:
    """What may have been meant by a name that is none, as sentences."""
    usual = "Name a Hub id (org/name), a local folder, a .gguf file, or 'demo'."
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        return f"On the Hub that is {address['id']}. {usual}"
    if " " in text and not os.path.dirname(text):
        return "A prompt goes behind the model's name: teal chat demo 'Hello.' " + usual
    if ":" in text and _OLLAMA_NAME.fullmatch(text):
        family, _, size = text.partition(":")
        near = did_you_mean(f"{family}-{size.partition('-')[0]}", names(), cutoff=0.7)
        return (near or did_you_mean(family, names(), cutoff=0.7)) + _OLLAMA + usual
    return did_you_mean(text, [*names(), *_neighbours(text)], cutoff=0.7) + usual


def _neighbours(text: str) -> list[str]:
    """The files and folders beside the one that a path would name."""
    folder = os.path.dirname(text)
    try:
        return [os.path.join(folder, name) for name in os.listdir(folder or ".")]
    except (OSError, ValueError):
        return []


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
