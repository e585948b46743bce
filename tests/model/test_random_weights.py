"""Random decoders: real shapes, sane activations, no runs of zeros to profit from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from teal_cli.model.random_weights import SHAPES, random_decoder
from teal_cli.model.weights import tensor_shapes

# Billions of parameters as the models' authors give them.
PARAMETERS = {
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "llama-3.1-8b": 8.030,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "mistral-7b": 7.242,
    "mistral-small-24b": 23.572,
    "ministral-3-8b": 8.490,
    "phi-3-mini": 3.821,
    "phi-4-mini": 3.836,
    "granite-3.3-2b": 2.534,
    "granite-3.3-8b": 8.171,
    "smollm3-3b": 3.075,
    "tinyllama-1.1b": 1.100,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.191,
    "smollm2-135m": 0.135,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.711,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_models_parameters(name: str) -> None:
    count = sum(math.prod(shape) for shape in tensor_shapes(SHAPES[name]).values())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], abs=6e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_activations_keep_their_size(name: str, dtype: torch.dtype) -> None:
    config = dataclasses.replace(
        SHAPES[name], num_hidden_layers=4, vocab_size=500, sliding_windows=(None,) * 4
    )
    decoder = random_decoder(config, device="cpu", dtype=dtype, seed=0)
    for _, tensor in decoder.weights.named_tensors():
        assert tensor.dtype == dtype
        assert (tensor == 0).float().mean() < 0.01
    sizes = []
    with torch.no_grad():
        hidden = decoder.forward(
            torch.arange(20), observe=lambda _layer, _site, x: sizes.append(x.std().item())
        )
    assert all(0.05 < size < 3 for size in sizes)
    assert 0.3 < decoder.logits(hidden).std() < 3


def test_seeds() -> None:
    config = dataclasses.replace(
        SHAPES["smollm2-135m"], num_hidden_layers=1, vocab_size=500, sliding_windows=(None,)
    )
    first, again, other = (
        random_decoder(config, device="cpu", dtype=torch.float16, seed=seed).weights.layers[0].o
        for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)
