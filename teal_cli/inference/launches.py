"""Launches of the GPU step that were found by measurement on this machine's device.

`teal bench --tune` writes them, one file a device below the user's cache; a session that decodes
there takes what fits its dtype and shapes, and the kernels' own table for the rest.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_cli.environment import device_name
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import FUSED
from teal_cli.progress import Reporter
from teal_cli.store import paths
from teal_cli.store.artifacts import atomic_write
from teal_cli.version import __version__

if TYPE_CHECKING:
    from teal_kernels.gpu.launch import StepLaunches

SCHEMA = 1
KIND = "launches"
MATRICES = tuple(FUSED)

Entries = dict[str, dict[str, Any]]  # key → the launch's fields


def shapes(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every matrix that the step multiplies, by its name in the step."""
    config = decoder.config
    return config.matrix_shapes | {"logits": (config.hidden_size, config.vocab_size)}


def matrix_key(decoder: Decoder, name: str, regime: float) -> str:
    """Under which a matrix's launch is stored; the lm_head's is the same in every regime."""
    inputs, outputs = shapes(decoder)[name]
    start = "" if name == "logits" else f" from {regime:g}"
    return f"{_dtype(decoder)} {name} {inputs}x{outputs}{start}"


def table_launches(decoder: Decoder) -> dict[float, StepLaunches]:
    """What the kernels' own table says, by the sparsity from which it holds."""
    from teal_kernels.gpu.launch import REGIMES, DeviceClass, StepLaunches
    from teal_kernels.tensors import bits_of

    weights = decoder.weights
    return {
        regime: StepLaunches.choose(
            shapes(decoder),
            bits_of(weights.layers[0].qkv),
            logits_bits=bits_of(weights.lm_head),
            regime=regime,
            device=DeviceClass.of(decoder.device),
        )
        for regime in REGIMES
    }


def stored_launches(decoder: Decoder, reporter: Reporter) -> dict[float, StepLaunches] | None:
    """What was found on this device for these shapes; None where nothing was.

    Args:
        decoder: the model.
        reporter: told of a file that cannot be used.
    """
    entries = read(decoder, reporter)
    if not entries:
        return None
    table = table_launches(decoder)
    found = {
        regime: merged(decoder, entries, launches, regime) for regime, launches in table.items()
    }
    return None if found == table else found


def merged(
    decoder: Decoder, entries: Entries, launches: StepLaunches, regime: float
) -> StepLaunches:
    """`launches` with the entries that are for this decoder in their place."""
    changes = {}
    for name in (*MATRICES, "logits"):
        if entry := entries.get(matrix_key(decoder, name, regime)):
            changes[name] = getattr(launches, name)._replace(**entry)
    return launches._replace(**changes)


def path(decoder: Decoder) -> Path:
    """The file of a decoder's device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(decoder.device).lower()).strip("-")
    return paths.cache_dir() / "launches" / f"{slug}.json"


def read(decoder: Decoder, reporter: Reporter) -> Entries:
    """The entries of a decoder's device; those of other kernels or of a damaged file are none."""
    file = path(decoder)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA or content["kind"] != KIND:
            raise ValueError("another format")
        if content["made_for"] != _made_for():
            raise ValueError("other kernels")
        return {key: _checked(entry) for key, entry in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        reporter.note(
            f"the launches in {file} are of other kernels, or damaged: not used; "
            "`teal bench --tune` makes them anew"
        )
        return {}


def write(decoder: Decoder, entries: Entries) -> Path:
    """Store the entries of a decoder's device, all of them; return where."""
    file = path(decoder)
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "teal": __version__,
        "device": device_name(decoder.device),
        "made_for": _made_for(),
        "entries": entries,
    }
    atomic_write(file, json.dumps(content, indent=2).encode())
    return file


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry whose fields are those that this version's launches have."""
    from teal_kernels.gpu.launch import Launch

    if set(entry) != set(Launch._fields):
        raise ValueError("other fields")
    if not all(value is None or isinstance(value, int) for value in entry.values()):
        raise ValueError("not numbers")
    return entry


def _made_for() -> dict[str, str]:
    """The kernels and the compiler that timings depend on."""
    # Not imported for its contents: the compiled modules may be unusable where this is read.
    folder = Path(importlib.import_module("teal_kernels").__path__[0]) / "gpu"
    digest = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    return {"kernels": digest.hexdigest()[:16], "triton": metadata.version("triton")}


def _dtype(decoder: Decoder) -> str:
    """What the matrices are stored as."""
    kind = decoder.weights.quantization
    return kind.name if kind else str(decoder.dtype).removeprefix("torch.")
