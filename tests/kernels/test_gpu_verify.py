"""Several tokens at once against the decoder, and their choices against a step's.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_gpu_interpreted.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teal_cli.inference.step import step_tensors
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import quantization
from teal_cli.model.random_weights import random_decoder

pytestmark = pytest.mark.gpu

_BASE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
}
# Widths off every block, one head group of three, biases, q/k norm, a window.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2-odd": {
        "model_type": "qwen2",
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "intermediate_size": 97,
    },
    "qwen3": {"model_type": "qwen3", "attention_bias": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 16},
}
TEXT = torch.randint(0, 50, (120,), generator=torch.Generator().manual_seed(5)).tolist()


def _decoder(family: str, device: str, dtype: torch.dtype = torch.float32) -> Decoder:
    config = ModelConfig.from_dict({**_BASE, **_FAMILIES[family]})
    return random_decoder(config, device=device, dtype=dtype, seed=1)


def _bound(decoder: Decoder, length: int = 120) -> tuple[Any, Any]:
    """A step for several tokens, and its cache, which nobody wrote."""
    from teal_kernels.gpu import VerifyStep

    cache = decoder.new_cache(length)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return VerifyStep(step_tensors(decoder, cache)), cache


@pytest.mark.parametrize("family", _FAMILIES)
def test_logits_and_cache_are_the_decoders(family: str, device: str) -> None:
    """At the beginning, within a chunk of positions and across two, and up to the cache's end."""
    decoder = _decoder(family, device)
    step, cache = _bound(decoder, 81)
    expected = decoder.new_cache(81)
    position = 0
    for count in (5, 1, 9, 2, 9, 9, 9, 9, 9, 3, 9, 2, 4):
        tokens = TEXT[position : position + count]
        with torch.inference_mode():
            hidden = decoder.forward(torch.tensor(tokens), cache=expected, position=position)
            logits = decoder.logits(hidden)
        found = step(tokens, position)
        assert (found - logits).abs().max() < 1e-4 * logits.std(), (position, count)
        position += count
    for ours, theirs in ((cache.keys, expected.keys), (cache.values, expected.values)):
        torch.testing.assert_close(ours[:, :, :position], theirs[:, :, :position])
        assert ours[:, :, position:].isnan().all()


def test_what_was_rejected_is_overwritten(device: str) -> None:
    decoder = _decoder("mistral", device)
    (step, _), (fresh, _) = _bound(decoder), _bound(decoder)
    for position in range(0, 40, 4):
        step(TEXT[position : position + 4], position)
        fresh(TEXT[position : position + 4], position)
        step([7, 9, 11, 13, 15], position + 4)
    expected = fresh(TEXT[40:45], 40)
    assert torch.equal(step(TEXT[40:45], 40), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.3},
        {"temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "penalty", "temperature", "all"],
)
def test_choices_are_those_of_a_step(settings: dict[str, float], device: str) -> None:
    """With the noise of the same positions, and of guesses up to the first that is wrong."""
    from teal_kernels.gpu import DecodeStep

    sampling: dict[str, Any] = {
        "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **settings, "seed": 11
    }  # fmt: skip
    decoder = _decoder("llama", device)
    alone = DecodeStep(step_tensors(decoder, decoder.new_cache(120)))
    step, _ = _bound(decoder)
    for position in range(6):
        alone(TEXT[position], position)
        step([TEXT[position]], position)
    alone.start(TEXT[6], 6, tokens=TEXT[:6], **sampling)
    said = []
    for position in range(6, 12):
        alone.advance()
        said.append(alone.chosen(position))
    found = step.choose([TEXT[6], *said[:5]], 6, before=TEXT[:6], **sampling)
    assert found == said
    wrong = [*said[:2], (said[2] + 1) % 50, 3]
    found = step.choose([TEXT[6], *wrong], 6, before=TEXT[:6], **sampling)
    assert found[:3] == said[:3]
    later = step.choose(said[2:5], 9, before=[*TEXT[:7], *said[:2]], **sampling)
    assert later == said[3:6]


def test_logits_that_are_not_finite_have_no_token(device: str) -> None:
    decoder = _decoder("llama", device)
    step, cache = _bound(decoder)
    step(TEXT[:4], 0)
    cache.values[0, 0, 2, 1] = torch.nan
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert step.choose([3, 4], 4, before=TEXT[:4], seed=0, **plain) == [-1, -1]


def test_what_does_not_fit_is_refused(device: str) -> None:
    decoder = _decoder("llama", device)
    step, _ = _bound(decoder)
    for tokens, position in (([1] * 10, 0), ([], 0), ([1, 2], 119), ([1], -1), ([50], 0)):
        with pytest.raises(ValueError, match="outside"):
            step(tokens, position)
    kind = quantization("int8")
    assert kind is not None
    quantized = random_decoder(
        ModelConfig.from_dict(_BASE | {"model_type": "llama"}),
        device=device, dtype=torch.float32, seed=1, kind=kind,
    )  # fmt: skip
    with pytest.raises(ValueError, match="not quantized"):
        _bound(quantized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    """Within a few roundings of the same weights in float32."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    decoder = _decoder("qwen3", device, dtype)
    exact = Decoder(decoder.config, decoder.weights, compute_dtype=torch.float32)
    step, _ = _bound(decoder)
    with torch.inference_mode():
        cache = decoder.new_cache(120)
        expected = exact.logits(exact.forward(torch.tensor(TEXT[:9]), cache=cache))
    found = step(TEXT[:9], 0)
    assert (found - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()
