"""A converted checkpoint on disk: what `convert` writes and every other command reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.model.config import ModelConfig, read_object
from teal_cli.model.decoder import Decoder
from teal_cli.model.huge_pages import placing
from teal_cli.model.quantization import QUANTIZATIONS, Quantization, quantization
from teal_cli.model.tokenizer import load_tokenizer
from teal_cli.model.weights import load_weights, stored_tensors
from teal_cli.store.artifacts import CHECKPOINT as KIND
from teal_cli.store.artifacts import MANIFEST, read_manifest

_MEND = "Make it again: `teal convert {name} --force`."
# What every manifest holds.
_FIELDS = {"model": str, "source": str, "fingerprint": str, "dtype": str, "shards": dict}
_DTYPES = ("float16", "bfloat16", "float32")


class Checkpoint:
    """One model in one dtype and quantization, in the decoder's layout.

    Raises:
        MissingError: the folder holds no checkpoint.
        TealError: it was written by an incompatible version, or a shard is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = read_manifest(folder / MANIFEST, KIND)
        if wrong := _wrong_field(self._manifest):
            raise TealError(
                f"{folder / MANIFEST} is damaged: {wrong} is missing or wrong",
                hint="Make it again: `teal convert --force`.",
            )
        self.config = ModelConfig.from_file(folder / "config.json")
        for shard, size in self._manifest["shards"].items():
            path = folder / shard
            if not path.is_file() or path.stat().st_size != size:
                raise TealError(
                    f"{path} is missing or cut short", hint=_MEND.format(name=self.name)
                )

    @property
    def name(self) -> str:
        """The model's name, as the user gives it."""
        return str(self._manifest["model"])

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        dtype = getattr(torch, self._manifest["dtype"])
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def in_own_dtype(self) -> bool:
        """Whether that is the dtype that its source converts to when nobody asks for another.

        Versions before did not record it: what they made counts as made so.
        """
        return bool(
            self._manifest.get("own_dtype", self._manifest["dtype"]) == self._manifest["dtype"]
        )

    @property
    def quantization(self) -> Quantization | None:
        """How the matrices are stored; None is in `dtype`."""
        return quantization(self._manifest.get("quantization"))

    @property
    def rounding(self) -> dict[str, Any]:
        """How they were rounded, and on what text; empty if they were not."""
        return dict(self._manifest.get("rounding", {}))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor; profiles carry it."""
        return str(self._manifest["fingerprint"])

    @property
    def source_fingerprint(self) -> str:
        """Names the exact files that it was converted from."""
        return str(self._manifest["source"])

    @property
    def revision(self) -> str | None:
        """The Hub's commit that it came from; None where that is not known."""
        revision = self._manifest.get("revision")
        return None if revision is None else str(revision)

    @property
    def reading(self) -> int:
        """The version of how its source was read."""
        return self._version("reading")

    @property
    def companions(self) -> int:
        """The version of what made the files beside the weights, tokenizer included."""
        return self._version("companions")

    def _version(self, name: str) -> int:
        version = self._manifest.get(name, 1)
        return version if isinstance(version, int) else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self._manifest["shards"].values())

    def load(self, device: str | torch.device = "cpu") -> Decoder:
        """The decoder; on a CPU its weights are copied into huge pages, or else memory-mapped.

        Raises:
            TealError: a shard is damaged or does not hold what the config asks for.
        """
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Tensor] = {}
        place = placing(device, self.nbytes)
        try:
            for shard in self._manifest["shards"]:
                with safe_open(self.folder / shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        tensors[name] = place(file.get_tensor(name).to(device))
        except (SafetensorError, OSError) as error:
            raise TealError(
                f"{self.folder / shard} is damaged: {error}", hint=_MEND.format(name=self.name)
            ) from None
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != stored_tensors(self.config, self.dtype, self.quantization):
            raise TealError(
                f"the tensors in {self.folder} are not those of its config.json",
                hint=_MEND.format(name=self.name),
            )
        return Decoder(self.config, load_weights(self.config, tensors, self.quantization))

    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            TealError: the checkpoint came without a usable one.
        """
        return load_tokenizer(self.folder, self.name)

    def generation_defaults(self) -> dict[str, Any]:
        """What the model's authors put in generation_config.json; empty if nothing."""
        path = self.folder / "generation_config.json"
        return read_object(path) if path.is_file() else {}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the generation config's, else the config's.

        Numbers that are no token of the vocabulary, such as -1, stand for none.

        Raises:
            TealError: they are not token ids.
        """
        return eos_token_ids(self.folder, self.config, self.name)


def eos_token_ids(folder: Path, config: ModelConfig, name: str) -> tuple[int, ...]:
    """What `Checkpoint.eos_token_ids` are of the model `name` in a folder."""
    path = folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    for content in (generation, read_object(folder / "config.json")):
        ids = content.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TealError(f"eos_token_id of {name} is {ids!r}, not numbers of tokens")
        if found := tuple(i for i in ids if 0 <= i < config.vocab_size):
            return found
    return ()


def _wrong_field(manifest: dict[str, Any]) -> str | None:
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            return name
    if manifest["dtype"] not in _DTYPES:
        return "dtype"
    if not all(isinstance(size, int) for size in manifest["shards"].values()):
        return "shards"
    if manifest.get("quantization") not in (None, *QUANTIZATIONS):
        return "quantization"
    return None if isinstance(manifest.get("rounding", {}), dict) else "rounding"
