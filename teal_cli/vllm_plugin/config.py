"""An exported model's `quantization_config` as vLLM's: which method each linear layer gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from teal_cli.vllm_plugin import NEWEST, OLDEST
from teal_cli.vllm_plugin.linear import TealLinearMethod

_FORMAT = 1
# The projections that stand side by side in vLLM's layers.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What the config holds: by projection, one for each layer; empty is dense."""

    by_projection: Mapping[str, Sequence[float]]
    max_sequences: int

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Thresholds:
        """Read a `quantization_config`.

        Raises:
            ValueError: it is of another format, or damaged.
        """
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"quantization_config has format {content.get('format')!r}, this version of teal "
                f"reads {_FORMAT}: export the model again with it"
            )
        found, most = content.get("thresholds") or {}, content.get("max_sequences")
        sizes = {len(found[name]) for name in _PROJECTIONS if name in found}
        if found and (set(found) != set(_PROJECTIONS) or len(sizes) != 1):
            raise ValueError(
                "quantization_config is damaged: it must have thresholds of "
                f"{', '.join(_PROJECTIONS)} for every layer"
            )
        if not isinstance(most, int) or most < 1:
            raise ValueError("quantization_config is damaged: max_sequences must be 1 or more")
        return cls(found, most)

    def of(self, prefix: str) -> tuple[float, ...] | None:
        """Those of a linear layer by its name in the model, a number for each projection in it."""
        place = _LAYER.fullmatch(prefix)
        if not self.by_projection or place is None:
            return None
        layer, name = int(place[1]), place[2]
        names = _FUSED.get(name, (name,))
        if any(part not in self.by_projection for part in names):
            return None
        return tuple(self.by_projection[part][layer] for part in names)


@register_quantization_config("teal")
class TealConfig(QuantizationConfig):
    """TEAL's thresholds on the inputs of a decoder's projections; weights stay as they are."""

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__()
        self.thresholds = thresholds

    def get_name(self) -> str:
        return "teal"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TealConfig:
        """Read an exported model's config.

        Raises:
            RuntimeError: this vLLM is another one than the plug-in was made for.
            ValueError: the config is of another format, or damaged.
        """
        version = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
        if not OLDEST <= version < NEWEST:
            raise RuntimeError(
                f"teal serves with vLLM from {_dotted(OLDEST)} to before {_dotted(NEWEST)}, "
                f"this is {vllm.__version__}: install another of the two"
            )
        return cls(Thresholds.read(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        levels = self.thresholds.of(prefix)
        if levels is None:
            return UnquantizedLinearMethod()
        return TealLinearMethod(levels, self.thresholds.max_sequences)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
