"""The dense step for several tokens, against the decoder that takes them one after another.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_gpu_interpreted.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_families import BASE, FAMILIES
from torch import Tensor

from teal_cli.inference.step import step_tensors
from teal_cli.model.cache import KVCache
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import Quantization
from teal_cli.model.random_weights import random_decoder

pytestmark = pytest.mark.gpu

_TOKENS = [3, 49, 0, 17, 17, 8, 25, 31]


def _step(decoder: Decoder, length: int) -> tuple[Any, KVCache, KVCache]:
    """A step, its cache, and another with the same content."""
    from teal_kernels.gpu import VerifyStep

    cache, other = decoder.new_cache(length), decoder.new_cache(length)
    cache.keys.normal_()
    cache.values.normal_()
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    return VerifyStep(step_tensors(decoder, cache)), cache, other


def _expected(decoder: Decoder, cache: KVCache, tokens: list[int], position: int) -> Tensor:
    ids = torch.tensor(tokens, device=decoder.device)
    rows = [
        decoder.logits(decoder.forward(ids[i : i + 1], cache=cache, position=position + i))
        for i in range(len(tokens))
    ]
    return torch.cat(rows)


def _close(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_several_tokens_equal_the_decoder(family: str, device: str) -> None:
    config = ModelConfig.from_dict({**BASE, **FAMILIES[family]})
    decoder = random_decoder(config, device=device, dtype=torch.float32, seed=1)
    step, cache, other = _step(decoder, 72)
    passes = [(60, 8)]  # across the border of two chunks
    if family == "llama":
        passes.append((61, 3))  # what was rejected is written anew
    for position, count in passes:
        expected = _expected(decoder, other, _TOKENS[:count], position)
        _close(step(_TOKENS[:count], position), expected)
        _close(cache.keys, other.keys)
        _close(cache.values, other.values)


def test_rows_beyond_the_tokens_write_nothing(device: str) -> None:
    decoder = random_decoder(
        ModelConfig.from_dict({**BASE, "model_type": "llama"}),
        device=device,
        dtype=torch.float32,
        seed=1,
    )
    step, cache, _ = _step(decoder, 40)
    before = cache.keys.clone()
    step([3, 4], 38)  # six further rows would lie beyond the cache
    assert torch.equal(cache.keys[:, :, :38], before[:, :, :38])
    step([3, 4], 10)
    assert torch.equal(cache.keys[:, :, 12:38], before[:, :, 12:38])
    for tokens, position in (([], 0), ([*_TOKENS, 1], 0), ([50], 0), ([1, 2], 39), ([1], -1)):
        with pytest.raises(ValueError, match="at position"):
            step(tokens, position)


@pytest.mark.parametrize(("head_dim", "group"), [(24, 0), (32, 64), (32, 128), (24, 24)], ids=str)
def test_quantized_weights(head_dim: int, group: int, device: str) -> None:
    config = ModelConfig.from_dict(
        {
            **BASE,
            **FAMILIES["granite"],
            "intermediate_size": 200,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
            "hidden_size": 3 * head_dim,
        }
    )
    decoder = random_decoder(
        config, device=device, dtype=torch.float32, seed=1, kind=Quantization(group, head=True)
    )
    step, _, other = _step(decoder, 40)
    expected = _expected(decoder, other, _TOKENS[:5], 10)
    _close(step(_TOKENS[:5], 10), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, Quantization(0, head=True), Quantization(64)], ids=str)
def test_of_sixteen_bits_the_error_is_that_of_rounding(
    dtype: torch.dtype, kind: Quantization | None, device: str
) -> None:
    """Against the same weights in float32."""
    config = ModelConfig.from_dict({**BASE, "model_type": "llama", "num_hidden_layers": 1})
    decoder = random_decoder(config, device=device, dtype=dtype, seed=1, kind=kind)
    wide = Decoder(config, decoder.weights, compute_dtype=torch.float32)
    step, _, other = _step(decoder, 40)
    expected = _expected(wide, other, _TOKENS[:4], 10)
    for _ in range(1 if device == "cpu" else 2):  # launched, then replayed
        logits = step(_TOKENS[:4], 10)
        bound = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert (logits - expected).norm() < bound * expected.norm()
