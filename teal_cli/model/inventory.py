"""What is stored: every model with its checkpoints, profiles and downloads; and its removal.

Everything below teal's folders belongs to a model by its slug: what was made for it, and what
killed runs left. So nothing is there that is not listed, and all that is listed can be removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from teal_cli.errors import MissingError, TealError
from teal_cli.printable import printable
from teal_cli.progress import Reporter
from teal_cli.store import artifacts, local, models, paths
from teal_cli.store.artifacts import CHECKPOINT, MANIFEST
from teal_cli.store.models import ModelRef
from teal_cli.suggestions import did_you_mean, quoted

_HALF_DONE = "being made, or left by a run that was killed"


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """What a profile's header says; all empty where there is none, or it cannot be read."""

    model: str = ""
    methods: tuple[str, ...] = ()
    quick: bool = False
    recovered: tuple[str, ...] = ()  # methods that have vectors


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A converted model in one data type, and its profile."""

    folder: Path
    nbytes: int
    profile: StoredProfile


@dataclass(frozen=True, slots=True)
class StoredItem:
    """Anything else that is stored of a model, and what it is, in words."""

    path: Path
    nbytes: int
    what: str


@dataclass(slots=True)
class StoredModel:
    """A model that is here in some form; `download` is its folder in the Hub's cache."""

    name: str
    slug: str | None = None  # None where teal has stored nothing of it
    checkpoints: list[StoredCheckpoint] = field(default_factory=list)
    others: list[StoredItem] = field(default_factory=list)
    download: Path | None = None
    last_used: datetime | None = None

    @property
    def owned(self) -> list[Path]:
        """Everything of it that teal has stored, and may remove; of a link, the link."""
        found = [path for slug, path in _entries() if slug == self.slug]
        if self.slug == _DEMO_SLUG and os.path.lexists(_demo_dir()):
            found.append(_demo_dir())
        return found


_DEMO_SLUG = ModelRef("hub", models.DEMO).slug


def stored_models() -> list[StoredModel]:
    """All models that are here, by name; those that are only downloaded too."""
    found = _own_models()
    named = {model.name: model for model in reversed(found)}
    for name, download in _downloads():
        if name not in named:
            found.append(StoredModel(name))
            named[name] = found[-1]
        named[name].download = download
    return sorted(found, key=lambda model: model.name.lower())


def names() -> list[str]:
    """What `find` accepts of what teal has stored; quick, for the shell's completion."""
    return [model.name for model in _own_models()]


def find(text: str) -> StoredModel:
    """The stored model that the user names.

    Raises:
        MissingError: there is none of this name.
    """
    name, path = models.hub_name(text), os.path.realpath(os.path.expanduser(text))
    with contextlib.suppress(TealError, OSError):  # a folder may stand for the file in it
        path = str(local.model_at(Path(path))[1])
    # Where a manifest is gone, the folder's name is all that says what it was made for.
    slugs = (name, ModelRef("hub", name).slug, ModelRef("folder", path, Path(path)).slug)
    stored = stored_models()
    for model in stored:
        if model.name in (name, path) or printable(model.name) == name:
            return model
    for model in stored:
        if model.slug is not None and (model.slug in slugs or printable(model.slug) == name):
            return model
    known = {model.name for model in stored}
    short = [name for name in models.names() if models.hub_name(name) in known]
    near = did_you_mean(text, [*short, *sorted(known)])
    raise MissingError(
        f"no model {quoted(text)} is stored", hint=f"{near}`teal models` lists what is."
    )


def remove(model: StoredModel, reporter: Reporter) -> int:
    """Delete what teal has stored of a model; return its bytes. Downloads stay.

    What a run that is killed leaves is listed, and removed by the next.

    Raises:
        TealError: another process is making something of it.
    """
    nbytes = sum(map(folder_bytes, model.owned))
    with contextlib.ExitStack() as held:
        for made in _locked(model.owned):
            held.enter_context(artifacts.lock(made, reporter, wait=False))
        for path in model.owned:
            artifacts.discard(path)
    models.forget(model.slug)
    return nbytes


def folder_bytes(folder: Path) -> int:
    """Bytes of a file, or of all files below a folder, those behind links left out."""
    if folder.is_symlink():
        return 0
    total = 0
    files = os.walk(folder) if folder.is_dir() else [(folder.parent, (), (folder.name,))]
    for parent, _, names_ in files:
        for name in names_:
            with contextlib.suppress(OSError):  # another process has just removed it
                status = os.lstat(os.path.join(parent, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _roots() -> tuple[Path, Path, Path]:
    """The folders that hold checkpoints, profiles and half-done calibrations by slug."""
    return (
        paths.model_dir("x").parent,
        paths.profile_dir("x").parent,
        paths.cache_dir() / "calibration",
    )


def _demo_dir() -> Path:
    return paths.cache_dir() / "demo"


def _entries() -> Iterator[tuple[str, Path]]:
    """All that is stored by slug, what killed runs left of it too."""
    for root in _roots():
        for path in _children(root):
            yield artifacts.leftover_of(path.name) or path.name, path


def _children(folder: Path) -> list[Path]:
    """What a folder holds but for locks; nothing where there is none."""
    try:
        found = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in found if not artifacts.is_lock(name)]


def _own_models() -> list[StoredModel]:
    """What teal has stored; folders that hold locks alone are none."""
    slugs = {slug for slug, path in _entries() if _holds_anything(path)}
    if _holds_anything(_demo_dir()):
        slugs.add(_DEMO_SLUG)
    return [_stored_model(slug) for slug in sorted(slugs)]


def _holds_anything(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return os.path.lexists(path)
    return any(map(_holds_anything, _children(path)))


def _locked(owned: list[Path]) -> Iterator[Path]:
    """What processes lock while they make it, in these folders."""
    for folder in owned:
        for lock in sorted(folder.glob(".*")):
            if (name := artifacts.is_lock(lock.name)) is not None:
                yield lock.with_name(name)


def _stored_model(slug: str) -> StoredModel:
    name = models.DEMO if slug == _DEMO_SLUG else slug
    model = StoredModel(name, slug, last_used=models.last_time(slug))
    checkpoints, profiles, calibrations = (root / slug for root in _roots())
    for folder in _children(checkpoints):
        if not (folder / MANIFEST).is_file():
            _add(model, folder, "not a checkpoint")
            continue
        with contextlib.suppress(TealError, KeyError):  # damaged: it keeps the folder's name
            content = artifacts.read_manifest(folder / MANIFEST, CHECKPOINT)
            model.name = _name(str(content["model"]), slug)
        profile = _header(paths.profile_path(slug, folder.name))
        model.checkpoints.append(StoredCheckpoint(folder, folder_bytes(folder), profile))
    made = {checkpoint.folder.name for checkpoint in model.checkpoints}
    for path in _children(profiles):
        if path.suffix != ".safetensors" or artifacts.leftover_of(path.name):
            _add(model, path, "not a profile")
        elif path.stem not in made:
            header = _header(path)
            if header.model and model.name == slug:
                model.name = _name(header.model, slug)
            methods = ", ".join(header.methods) or "?"
            _add(model, path, f"profile without its checkpoint: {methods}")
    for work in _children(calibrations):
        _add(model, work, "a calibration that is not finished")
    for name, path in _entries():
        if name == slug and (path.name != slug or path.is_symlink() or not path.is_dir()):
            _add(model, path, "a link" if path.is_symlink() else "a file")
    if slug == _DEMO_SLUG:
        for file in _children(_demo_dir()):
            _add(model, file, "fetched")
    return model


def _add(model: StoredModel, path: Path, what: str) -> None:
    if not _holds_anything(path):
        return
    what = _HALF_DONE if artifacts.leftover_of(path.name) else what
    model.others.append(StoredItem(path, folder_bytes(path), what))


def _name(name: str, slug: str) -> str:
    """A model's name; of a revision that was asked for, the folder's name ends in a mark."""
    parts = slug.split("@")
    marked = len(parts) == 2 and parts[0] == name.replace("/", "--")
    return f"{name}@{parts[1]}" if marked else name


def _header(profile: Path) -> StoredProfile:
    """A profile, from its header alone."""
    if not profile.is_file():
        return StoredProfile()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(profile, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["teal"])
            return StoredProfile(
                str(header.get("model", "")),
                (*map(str, header["methods"]), "uniform"),
                bool(header.get("provenance", {}).get("quick")),
                tuple(map(str, header.get("recovery", {}))),
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return StoredProfile()


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
