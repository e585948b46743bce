"""The safetensors files of a folder: which of them are the model, and what they hold as it stands.

Names are those of a transformers model, whatever was saved: the headless model, a compiled one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.config import DAMAGED, read_object
from teal_cli.model.safetensors_file import StoredTensor, read_header
from teal_cli.store.local import has_file

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What torch.compile, DDP and FSDP put into the names of the module that they wrap.
_WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
# Where a model of several parts has its language model, as transformers 4 and 5 wrote it.
_LANGUAGE_MODEL = re.compile(r"^(?:model\.)?language_model\.")
_HEADLESS = ("embed_tokens.", "layers.", "norm.")
_ROWS = 4096  # compared at a time


class TensorFiles:
    """The tensors of a folder's safetensors as they are stored, read one at a time.

    Raises:
        MissingError: the folder holds no safetensors, or lacks a shard.
        UnsupportedError: it holds an adapter, not a model.
        TealError: an index or shard is damaged or names a file outside the folder.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        for shard in _shards(folder, config):
            self._open(shard)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there."""
        if name not in self.shapes:
            raise TealError(f"{self.folder} lacks {name}", hint=DAMAGED)
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        self.shape(name)
        return self._tensors[name].read()

    def equal(self, first: str, second: str) -> bool:
        """Whether two matrices of one shape hold the same values, read a few rows at a time."""
        pairs = zip(self._rows(first), self._rows(second), strict=True)
        return all(a.float().equal(b.float()) for a, b in pairs)

    def _rows(self, name: str) -> Iterator[Tensor]:
        for start in range(0, self.shapes[name][0], _ROWS):
            yield self._tensors[name].rows(start, start + _ROWS)

    def _open(self, path: Path) -> None:
        if not has_file(path):
            raise MissingError(f"{path.name!r} is missing from {self.folder}", hint=DAMAGED)
        for stored, tensor in read_header(path).items():
            name = _name(stored)
            if name in self._tensors:
                raise TealError(f"{name} is in {self.folder} twice")
            self._tensors[name] = tensor


def _name(stored: str) -> str:
    """transformers' name: it adds or takes away one `model.`, and we what a wrapper added."""
    name = _LANGUAGE_MODEL.sub("", _WRAPPERS.sub("", stored))
    if name.startswith(("model.model.", "model.lm_head.")):
        return name.removeprefix("model.")
    return f"model.{name}" if name.startswith(_HEADLESS) else name


def _shards(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files that transformers would read, in its order of preference."""
    first = config.get("transformers_weights")
    for name in (first, _SINGLE, _INDEX) if first is not None else (_SINGLE, _INDEX):
        _check_inside(name, "config.json")
        if has_file(folder / name):
            return _indexed(folder / name) if name.endswith(".json") else [folder / name]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1 and (folder / "quantize_config.json").is_file():
        return others  # AutoGPTQ gave files names of its own
    raise _no_weights(folder, [other.name for other in others])


def _indexed(index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise TealError(f"{index} has no weight_map", hint=DAMAGED)
    for name in names.values():
        _check_inside(name, str(index))
    return [index.parent / name for name in sorted(set(names.values()))]


def _check_inside(name: object, where: str) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise TealError(f"{where} names a shard outside its folder: {name!r}")


def _no_weights(folder: Path, others: list[str]) -> TealError:
    """What a folder without a model's safetensors holds instead, and what to do with it."""
    if (error := _other_format(folder)) is not None:
        return error
    if others:
        listed = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        return MissingError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, only {listed}",
            hint=f"Rename a file that is the whole model to {_SINGLE}; "
            "several need their index, which the repository has.",
        )
    return MissingError(
        f"no model.safetensors and no index of shards in {folder}",
        hint="Name a model that is published as safetensors, or a .gguf file.",
    )


def _other_format(folder: Path) -> TealError | None:
    if any(folder.glob("consolidated*")):
        return UnsupportedError(
            f"{folder} holds only the makers' own format (consolidated), not Hugging Face's",
            hint="Take config.json and the model*.safetensors files, where the repository has "
            "them; Meta's and Mistral's models have a repository or a folder in both formats.",
        )
    if any(folder.glob("*.npz")):
        return UnsupportedError(
            f"{folder} holds weights.npz, MLX's format of 2023, and no safetensors",
            hint="Take a repository of mlx-community that has model.safetensors, or the original.",
        )
    if any(path for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}")):
        return MissingError(
            f"{folder} holds PyTorch pickles and no safetensors; teal reads no pickles",
            hint="If you trust them, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), "
            "and copy the tokenizer's files beside.",
        )
    return None


def check_is_model(folder: Path) -> None:
    """Folders of another kind are named as what they are, before their config.json is missed.

    Raises:
        UnsupportedError: the folder holds a LoRA adapter alone, or a model in another format.
        MissingError: it holds pickles alone.
    """
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        return
    if (settings := folder / "adapter_config.json").is_file():
        base = read_object(settings).get("base_model_name_or_path")
        raise UnsupportedError(
            f"{folder} holds an adapter (LoRA) of {base or 'another model'}, not a model",
            hint="Merge it first: peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
            ".merge_and_unload().save_pretrained(NEW), with the tokenizer's files beside.",
        )
    if not (folder / "config.json").is_file() and (error := _other_format(folder)) is not None:
        raise error
