"""Vectors that win back what sparsity loses: a file beside the weights, and a rank's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# In a folder of its own, where no loader of weights looks for any. Float32: `NAME.bias` [layers,
# outputs] of each projection, and `SITE.factor` [layers, hidden_size] of what norms hand on.
FILE = "teal/vectors.safetensors"
# Of projections that read a norm's output; the others' inputs have no factor.
SITES = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
}


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """What sparse rows of a linear layer get, float32."""

    factor: Tensor | None  # [inputs], of the input before the thresholds
    biases: tuple[Tensor, ...]  # [outputs] of each projection in the layer, beside the model's own

    def bias(self, widths: Sequence[int], rank: int, ranks: int) -> Tensor:
        """A rank's part of the biases, [sum of widths].

        Args:
            widths: this rank's columns of each projection. Where ranks outnumber the heads of keys
                and values, neighbours have the same ones.
            rank: of tensor parallelism, from 0.
            ranks: how many there are.

        Raises:
            ValueError: the biases are not whole parts of such widths.
        """
        own = []
        for bias, width in zip(self.biases, widths, strict=True):
            parts = len(bias) // width
            if parts * width != len(bias) or not 1 <= parts <= ranks:
                raise ValueError(
                    f"{FILE} has {len(bias)} biases of a projection that has {width} columns on "
                    f"each of {ranks} ranks: export the model again"
                )
            own.append(bias.split(width)[rank * parts // ranks])
        return torch.cat(own)


def find(model: str, revision: str | None, cache: str | None) -> Path:
    """The file of an exported model: in its folder, or of a repository of the Hub.

    Args:
        model: a folder, or a repository's name.
        revision: of the repository.
        cache: where its files are kept; None is the Hub's own place.
    """
    if Path(model).is_dir():
        return Path(model) / FILE
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, FILE, revision=revision, cache_dir=cache))


def read(file: Path, layer: int, names: Sequence[str]) -> Vectors:
    """The vectors of the projections, `q_proj` and so on, that stand side by side in a layer.

    Raises:
        ValueError: the file is not there, or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            biases = tuple(opened.get_slice(f"{name}.bias")[layer] for name in names)
            site = SITES.get(names[0])
            factor = None if site is None else opened.get_slice(f"{site}.factor")[layer]
    except (OSError, SafetensorError, IndexError) as error:
        raise ValueError(f"{file} cannot be read ({error}): export the model again") from error
    return Vectors(factor, biases)
