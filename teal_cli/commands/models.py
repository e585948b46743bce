"""`teal models`: what is stored, and its removal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli import console
from teal_cli.amounts import format_amount
from teal_cli.errors import MissingError, UsageError
from teal_cli.options import JsonOption, complete_stored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from teal_cli.model.inventory import StoredModel, StoredProfile

RemoveOption = Annotated[
    str | None,
    typer.Option(
        "--remove",
        metavar="MODEL",
        help="Delete what teal has stored of this model: checkpoints, profiles, half-done"
        " calibrations. Hugging Face's cache stays as it is.",
        autocompletion=complete_stored,
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="With --remove: do not ask.")]


def models(remove: RemoveOption = None, yes: YesOption = False, json: JsonOption = False) -> None:
    """List the models that are stored: how large, how far prepared, last used when.

    Sizes are those of teal's own files; what Hugging Face's cache holds is listed beside them.
    """
    if remove is not None:
        _remove(remove, yes)
        return
    from teal_cli.model import inventory

    stored = inventory.stored_models()
    if json:
        console.print_json([_document(model) for model in stored])
    elif stored:
        console.print_groups([(_title(model), _rows(model)) for model in stored])
        console.print_line(_total(stored))
    else:
        console.print_dim("no models are stored yet; `teal chat` fetches the demo model")


def _remove(name: str, yes: bool) -> None:
    from teal_cli.model import inventory

    model = inventory.find(name)
    if not model.owned:
        raise MissingError(
            f"teal has stored nothing of {model.name}", hint=_cached_hint(model.download)
        )
    for folder in model.owned:
        size = format_amount(inventory.folder_bytes(folder), "B")
        console.print_line(f"{size:>9}  {folder}", to_stderr=True)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "nobody is there to be asked whether to remove this", hint="Say so with --yes."
            )
        if not console.confirm(f"Remove {model.name}?"):
            return
    nbytes = inventory.remove(model, console.reporter())
    console.reporter().note(f"removed {format_amount(nbytes, 'B')} of {model.name}")
    if hint := _cached_hint(model.download):
        console.reporter().note(hint)


def _cached_hint(download: Path | None) -> str | None:
    """What stays in Hugging Face's cache, and what would remove it."""
    if download is None:
        return None
    from teal_cli.model.inventory import folder_bytes

    size = format_amount(folder_bytes(download), "B")
    repository = download.name.replace("models--", "model/", 1).replace("--", "/")
    return f"Hugging Face's cache keeps {size} of it; `hf cache rm {repository}` removes that."


def _title(model: StoredModel) -> str:
    used = f", last used {model.last_used:%Y-%m-%d %H:%M}" if model.last_used else ""
    return f"{model.name}{used}"


def _rows(model: StoredModel) -> list[list[str]]:
    """What is stored of a model: in which form, how large, how far prepared."""
    from teal_cli.model.inventory import folder_bytes

    rows = []
    for checkpoint in model.checkpoints:
        size = format_amount(checkpoint.nbytes, "B")
        rows.append([checkpoint.folder.name, size, _stage(checkpoint.profile)])
    for item in model.others:
        size = format_amount(item.nbytes, "B")
        rows.append([item.path.name, size, item.what])
    if model.download is not None:
        size = format_amount(folder_bytes(model.download), "B")
        rows.append(["Hub's cache", size, "downloaded"])
    return rows


def _stage(profile: StoredProfile) -> str:
    """How far a checkpoint is prepared."""
    if not profile.methods:
        return "converted"
    stage = "quick thresholds" if profile.quick else "calibrated"
    stage += f": {', '.join(profile.methods)}"
    return f"{stage}; vectors for {', '.join(profile.recovered)}" if profile.recovered else stage


def _total(stored: Sequence[StoredModel]) -> str:
    """One line: what teal's own files take, and what is beside them in the Hub's cache."""
    from teal_cli.model.inventory import folder_bytes

    own = sum(folder_bytes(path) for model in stored for path in model.owned)
    cached = sum(folder_bytes(model.download) for model in stored if model.download is not None)
    total = f"total: {format_amount(own, 'B')}"
    if not cached:
        return total
    return f"{total}, and {format_amount(cached, 'B')} in the Hub's cache"


def _document(model: StoredModel) -> dict[str, Any]:
    from teal_cli.model.inventory import folder_bytes

    return {
        "model": model.name,
        "checkpoints": [
            {
                "name": checkpoint.folder.name,
                "path": checkpoint.folder,
                "bytes": checkpoint.nbytes,
                "methods": list(checkpoint.profile.methods),
                "quick": checkpoint.profile.quick,
                "recovered": list(checkpoint.profile.recovered),
            }
            for checkpoint in model.checkpoints
        ],
        "others": [
            {"path": item.path, "bytes": item.nbytes, "what": item.what} for item in model.others
        ],
        "download": model.download,
        "download_bytes": None if model.download is None else folder_bytes(model.download),
        "last_used": model.last_used.isoformat() if model.last_used else None,
    }
