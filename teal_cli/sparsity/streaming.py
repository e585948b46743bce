"""A decoder whose layers come to the device one at a time, for models larger than its memory.

Calibration visits a layer with all windows before the next one, so that each layer's weights
cross to the device once a pass.
"""

from __future__ import annotations

import dataclasses
from typing import SupportsIndex

import torch

from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder
from teal_cli.model.weights import LayerWeights
from teal_cli.progress import Reporter

# What activations, a layer's float32 gradients and the logits of one window may take.
_SPARE_BYTES = 4 << 30


class StreamedLayers(list[LayerWeights]):
    """Layers in memory, of which the one that is asked for is copied to `device`."""

    def __init__(self, layers: list[LayerWeights], device: torch.device) -> None:
        super().__init__(layers)
        self._device = device
        self._held: tuple[int, LayerWeights] | None = None

    def __getitem__(self, index: SupportsIndex) -> LayerWeights:  # type: ignore[override]
        number = index.__index__()
        if self._held is None or self._held[0] != number:
            self._held = None  # its memory goes before the next layer's is taken
            self._held = number, _moved(super().__getitem__(number), self._device)
        return self._held[1]


def streamed(decoder: Decoder, device: torch.device) -> Decoder:
    """A decoder on `device` that reads its layers from another one's memory."""
    weights = decoder.weights
    embed_tokens = weights.embed_tokens.to(device)
    tied = weights.lm_head is weights.embed_tokens
    return Decoder(
        decoder.config,
        dataclasses.replace(
            weights,
            embed_tokens=embed_tokens,
            layers=StreamedLayers(weights.layers, device),
            norm=weights.norm.to(device),
            lm_head=embed_tokens if tied else weights.lm_head.to(device),
        ),
    )


def load(checkpoint: Checkpoint, device: torch.device, reporter: Reporter) -> Decoder:
    """A checkpoint's decoder for calibration: on the device, or streamed where it has no room."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if checkpoint.nbytes + _SPARE_BYTES > free_bytes:
            reporter.note(
                f"{checkpoint.nbytes / 1e9:.0f} GB of weights, {free_bytes / 1e9:.0f} GB free on "
                f"{device}: one layer at a time goes there"
            )
            return streamed(checkpoint.load(), device)
    return checkpoint.load(device)


def _moved(layer: LayerWeights, device: torch.device) -> LayerWeights:
    tensors = {
        field.name: tensor.to(device)
        for field in dataclasses.fields(LayerWeights)
        if (tensor := getattr(layer, field.name)) is not None
    }
    return dataclasses.replace(layer, **tensors)
