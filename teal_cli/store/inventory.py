"""What is stored: every model with its checkpoints, profiles and downloads; and its removal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from teal_cli.errors import MissingError, TealError
from teal_cli.progress import Reporter
from teal_cli.store import artifacts, local, models, paths
from teal_cli.store.artifacts import CHECKPOINT, MANIFEST


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A converted model in one data type; `methods` are its profile's, empty without one."""

    folder: Path
    nbytes: int
    methods: tuple[str, ...]


@dataclass(slots=True)
class StoredModel:
    """A model that is here in some form; `download` is its folder in the Hub's cache."""

    name: str
    slug: str | None = None  # None where teal has stored nothing of it
    checkpoints: list[StoredCheckpoint] = field(default_factory=list)
    download: Path | None = None
    last_used: datetime | None = None

    @property
    def owned(self) -> list[Path]:
        """Everything of it that teal has stored, and may remove."""
        if self.slug is None:
            return []
        folders = [
            paths.model_dir(self.slug),
            paths.profile_dir(self.slug),
            paths.cache_dir() / "calibration" / self.slug,
        ]
        if self.name == models.DEMO:
            folders.append(paths.cache_dir() / "demo")
        return [folder for folder in folders if folder.exists()]


def stored_models() -> list[StoredModel]:
    """All models that are here, by name; those that are only downloaded too."""
    found: dict[str, StoredModel] = {}
    for folder in _folders(paths.model_dir("x").parent):
        model = _stored_model(folder)
        found[model.name] = model
    for name, download in _downloads():
        found.setdefault(name, StoredModel(name)).download = download
    return sorted(found.values(), key=lambda model: model.name.lower())


def names() -> list[str]:
    """What `find` accepts of what teal has stored; quick, for the shell's completion."""
    return [_stored_model(folder).name for folder in _folders(paths.model_dir("x").parent)]


def find(text: str) -> StoredModel:
    """The stored model that the user names.

    Raises:
        MissingError: there is none of this name.
    """
    path = os.path.realpath(os.path.expanduser(text))
    with contextlib.suppress(TealError, OSError):  # a folder may stand for the file in it
        path = str(local.model_at(Path(path))[1])
    for model in stored_models():
        if models.ALIASES.get(text, text) in (model.name, model.slug) or path == model.name:
            return model
    raise MissingError(f"no model {text!r} is stored", hint="`teal models` lists what is.")


def remove(model: StoredModel, reporter: Reporter) -> int:
    """Delete what teal has stored of a model; return its bytes. Downloads stay."""
    nbytes = sum(map(folder_bytes, model.owned))
    for checkpoint in model.checkpoints:
        with artifacts.lock(checkpoint.folder, reporter):
            # First what makes it look whole, in case the rest is interrupted.
            (checkpoint.folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.folder)
    for folder in model.owned:
        shutil.rmtree(folder)
    models.forget(model.slug)
    return nbytes


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, those behind links left out."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # another process has just removed it
                status = os.lstat(os.path.join(parent, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _stored_model(folder: Path) -> StoredModel:
    slug = folder.name
    model = StoredModel(slug, slug, last_used=models.last_time(slug))
    for manifest in sorted(folder.glob(f"[!.]*/{MANIFEST}")):
        with contextlib.suppress(TealError):  # damaged: it keeps the folder's name
            content = artifacts.read_manifest(manifest, CHECKPOINT)
            name, parts = str(content["model"]), slug.split("@")
            # Of a revision that was asked for, the folder's name ends in a mark.
            marked = len(parts) == 2 and parts[0] == name.replace("/", "--")
            model.name = f"{name}@{parts[1]}" if marked else name
        profile = paths.profile_path(slug, manifest.parent.name)
        model.checkpoints.append(
            StoredCheckpoint(manifest.parent, folder_bytes(manifest.parent), _methods(profile))
        )
    return model


def _methods(profile: Path) -> tuple[str, ...]:
    """The allocation methods in a profile, from its header alone; empty if it cannot be read."""
    if not profile.is_file():
        return ()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(profile, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["teal"])
            return (*map(str, header["methods"]), "uniform")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return ()


def _downloads() -> Iterator[tuple[str, Path]]:
    """Models in Hugging Face's cache that teal can convert, with their folders there."""
    from huggingface_hub import constants

    from teal_cli.model.config import ModelConfig

    for folder in _folders(Path(constants.HF_HUB_CACHE), "models--*"):
        if not any(folder.glob("snapshots/*/*.safetensors")):
            continue
        for config in folder.glob("snapshots/*/config.json"):
            with contextlib.suppress(TealError, OSError):
                ModelConfig.from_file(config)
                yield folder.name.removeprefix("models--").replace("--", "/"), folder
                break


def _folders(parent: Path, pattern: str = "[!.]*") -> list[Path]:
    return [path for path in sorted(parent.glob(pattern)) if path.is_dir()]
