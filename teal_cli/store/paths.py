"""The user's folders: platformdirs' choice, or everything below TEAL_HOME."""

from __future__ import annotations

import os
from pathlib import Path

from teal_cli.errors import UsageError


def data_dir() -> Path:
    """Converted checkpoints and sparsity profiles."""
    return _folder("data")


def cache_dir() -> Path:
    """What can be fetched or measured again."""
    return _folder("cache")


def state_dir() -> Path:
    """What the user did last."""
    return _folder("state")


def model_dir(slug: str) -> Path:
    """The folder of a model's converted checkpoints, one below it for each way of storing them."""
    return data_dir() / "models" / slug


def checkpoint_dir(slug: str, dtype: str, quantization: str | None = None) -> Path:
    """The folder of a model's checkpoint in this dtype, its matrices quantized or not."""
    return model_dir(slug) / "-".join(filter(None, (dtype, quantization)))


def profile_dir(slug: str) -> Path:
    """The folder of a model's profiles."""
    return data_dir() / "profiles" / slug


def profile_path(slug: str, checkpoint: str) -> Path:
    """The sparsity profile of a model's checkpoint, which is named by its folder."""
    return profile_dir(slug) / f"{checkpoint}.safetensors"


def check_name(path: Path, what: str) -> None:
    """Refuse a path that is no text: the libraries that read weights and tokenizers take none.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what} is a name that is not UTF-8 text: {path}",
            hint="Rename it, or make a link to it with a plain name in a folder with one.",
        ) from None


def _folder(kind: str) -> Path:
    if home := os.environ.get("TEAL_HOME"):
        check_name(Path(home), "TEAL_HOME")
        return Path(home).expanduser() / kind
    import platformdirs

    dirs = platformdirs.PlatformDirs("teal", appauthor=False)
    return Path(getattr(dirs, f"user_{kind}_dir"))
