"""GPTQ through a whole model: a layer is rounded on what the rounded layers before it give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from teal_kernels.quantized import QuantizedMatrix
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import FloatWeights, Rounder
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import Quantization, Quantized
from teal_cli.model.sites import FUSED, SITE_OF
from teal_cli.model.weights import LayerWeights, build_weights, layer_shapes
from teal_cli.progress import Reporter
from teal_cli.rounding.gptq import gptq
from teal_cli.sparsity.spool import DiskStates

# Windows int64 [N, T] for a tokenizer and a model, and what names the text that they are cut from.
Text = Callable[[Any, ModelConfig], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Gptq:
    """Rounds int4 matrices with GPTQ."""

    kind: Quantization
    text: Text
    device: torch.device
    asked: Mapping[str, Any] = field(default_factory=dict)

    def begin(
        self,
        floats: FloatWeights,
        tokenizer: Callable[[], Any],
        work_dir: Path,
        reporter: Reporter,
    ) -> tuple[Rounder, dict[str, Any]]:
        windows, record = self.text(tokenizer(), floats.config)
        reporter.note(
            f"rounding on {record['dataset']} ({record['dataset_part']}): "
            f"{len(windows)} windows of {windows.shape[1]} tokens, on {self.device}"
        )
        layers = _Layers(self.kind, floats, windows, work_dir, self.device)
        return layers, {"method": "gptq", **record}


class _Layers:
    """Gives the rounded matrices of one layer after another; memory holds one layer."""

    def __init__(
        self,
        kind: Quantization,
        floats: FloatWeights,
        windows: Tensor,
        work_dir: Path,
        device: torch.device,
    ) -> None:
        self._kind, self._floats, self._device = kind, floats, device
        self._rounded: dict[str, QuantizedMatrix] = {}

        def outside_layers(name: str) -> Tensor | None:
            return floats(name).to(device) if name == "embed_tokens" else None

        weights = build_weights(floats.config, outside_layers)
        self._decoder = Decoder(floats.config, weights)
        embedded = [self._decoder.embed(window) for window in windows]
        self._states = DiskStates(
            work_dir,
            key="",
            like=embedded[0],
            count=len(windows),
            steps=floats.config.num_hidden_layers,
        )
        self._states.write(0, embedded)

    def __call__(self, name: str) -> Quantized:
        if name == "lm_head":
            return self._kind.round(name, self._floats(name))
        _, index, matrix = name.split(".")
        if not self._rounded:
            with torch.inference_mode():
                self._rounded = self._layer(int(index))
        return self._rounded.pop(matrix)

    def _layer(self, index: int) -> dict[str, QuantizedMatrix]:
        """Round a layer, and pass the windows through it."""
        names = layer_shapes(self._floats.config)
        tensors: dict[str, Any] = dict.fromkeys(LayerWeights.__dataclass_fields__)
        for name in names:
            tensors[name] = self._floats(f"layers.{index}.{name}").to(self._device)
        layers, layer = self._decoder.weights.layers, LayerWeights(**tensors)
        hollow, layers[index] = layers[index], layer
        for name, hessian in self._hessians(index).items():
            setattr(layer, name, gptq(getattr(layer, name), hessian, self._kind.group))
        if index + 1 < len(layers):
            inputs = self._states.read(index)
            outputs = (self._decoder.layer(index, hidden) for hidden in inputs)
            self._states.write(index + 1, outputs)
        layers[index] = hollow
        return {name: getattr(layer, name).to("cpu") for name in FUSED}

    def _hessians(self, index: int) -> dict[str, Tensor]:
        """X^T X of the inputs of a layer's matrices, [K, K] float32 each."""
        found: dict[str, Tensor] = {}

        def observe(layer: int, site: str, x: Tensor) -> None:
            x = x.float()
            name = next(name for name, parts in FUSED.items() if SITE_OF[parts[0]] == site)
            found[name] = found[name].addmm_(x.T, x) if name in found else x.T @ x

        for hidden in self._states.read(index):
            self._decoder.layer(index, hidden, observe=observe)
        for name, hessian in found.items():
            if not hessian.isfinite().all():
                raise TealError(
                    f"layer {index}: an input of {name} is not finite",
                    hint="Activations overflow in this dtype; try --dtype bfloat16 or float32.",
                )
        return found
