"""An exported model's `quantization_config` as vLLM's: which method each linear layer gets."""

from __future__ import annotations

import re
from typing import Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from teal_cli.vllm_plugin import vectors
from teal_cli.vllm_plugin.thresholds import Place, Thresholds
from teal_cli.vllm_plugin.versions import NEWEST, OLDEST, known


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
                f"this vLLM, {vllm.__version__}, is not known to the plug-in of teal: install one "
                f"{known()}, or another teal-cli"
            )
        return cls(Thresholds.read(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        # Imported when the first of our models is built, not in every process of every other.
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from teal_cli.vllm_plugin.linear import TealLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        place = Place.of(prefix)
        levels = None if place is None else self.thresholds.of(place)
        if place is None or levels is None:
            return UnquantizedLinearMethod()
        found = None
        if self.thresholds.vectors:
            config = get_current_vllm_config()
            model = config.model_config
            file = vectors.find(model.model, model.revision, config.load_config.download_dir)
            found = vectors.read(file, *place)
        return TealLinearMethod(levels, found, self.thresholds.max_sequences)
