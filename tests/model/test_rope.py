"""Rope of every form against transformers: frequencies, attention factor, logits, and context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.families import hf_model, our_config, our_decoder

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.cache import KVCache
from teal_cli.model.config import ModelConfig
from teal_cli.model.rope import attention_scaling, inverse_frequencies

# Rope parameters, max_position_embeddings, and the context that they promise together.
SITUATIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({"rope_type": "default"}, 256, 256),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 64, 256),
    "linear-fraction": ({"rope_type": "linear", "factor": 2.5}, 64, 160),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
    "yarn-stretched-already": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        256,
        256,
    ),
    "yarn-between": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        80,
        256,
    ),
    "yarn-without-original": ({"rope_type": "yarn", "factor": 4.0}, 64, 256),
    "yarn-null-factor": (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
        256,
        256,
    ),
    "yarn-attention-factor": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 0.7,
        },
        64,
        256,
    ),
    "yarn-mscale": (
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
        },
        64,
        512,
    ),
    "yarn-mscale-alone": (
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.707,
        },
        64,
        512,
    ),
    "yarn-betas": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        4096,
        16384,
    ),
    "yarn-untruncated": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        4096,
        16384,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        1024,
        1024,
    ),
    "llama3-unstretched": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        64,
        256,
    ),
    "longrope-steady": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.3, 2.0, 2.5, 3.5, 4.0, 4.0],
            "long_factor": [1.0, 1.0, 1.3, 2.0, 2.5, 3.5, 4.0, 4.0],
            "original_max_position_embeddings": 64,
        },
        256,
        256,
    ),
    "longrope-short": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.3, 2.0, 2.5, 3.5, 4.0, 4.0],
            "long_factor": [1.0, 2.0, 3.3, 5.0, 8.5, 9.5, 9.0, 9.0],
            "original_max_position_embeddings": 120,
        },
        256,
        120,
    ),
}
BEYOND = 100  # tokens, more than the 64 that most of them were trained for


def model_of(situation: str, family: str = "llama", **more: Any) -> Any:
    rope, stated, _ = SITUATIONS[situation]
    parameters = {"rope_theta": 10000.0, **rope}
    return hf_model(family, rope_parameters=parameters, max_position_embeddings=stated, **more)


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_frequencies_are_those_of_transformers(situation: str, head_dim: int) -> None:
    if "longrope" in situation and head_dim != 16:
        pytest.skip("its table is for heads of 16")
    model = model_of(situation, head_dim=head_dim, num_hidden_layers=1)
    config, theirs = our_config(model), model.model.rotary_emb
    assert torch.equal(inverse_frequencies(config.rope, config.head_dim), theirs.inv_freq)
    assert attention_scaling(config.rope) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_context_is_the_one_that_the_config_promises(situation: str) -> None:
    context = SITUATIONS[situation][2]
    config = our_config(model_of(situation, num_hidden_layers=1))
    assert config.context_length == context
    kept = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert KVCache(config, context, **kept).length == context
    with pytest.raises(TealError, match=f"1 to {context}"):
        KVCache(config, context + 1, **kept)


@pytest.mark.parametrize(
    ("situation", "family"),
    [
        *((name, "llama") for name in SITUATIONS),
        *(("yarn", family) for family in ("mistral", "qwen2", "qwen3")),
    ],
)
def test_logits_beyond_the_original_context(situation: str, family: str) -> None:
    model = model_of(situation, family, head_dim=16)
    decoder, ids = our_decoder(model), torch.arange(BEYOND) % 90
    with torch.no_grad():
        expected, found = model(ids[None]).logits[0], decoder.logits(decoder.forward(ids))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


RAW = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 32768,
}


def test_the_original_context_beside_the_parameters_goes_before_theirs() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    beside = {"rope_scaling": scaling, "original_max_position_embeddings": 4096}
    config = ModelConfig.from_dict(
        {**RAW, "head_dim": 64, "max_position_embeddings": 8192, **beside}
    )  # first: transformers writes into the parameters
    model = hf_model("qwen2", head_dim=64, max_position_embeddings=8192, **beside)
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    assert config.context_length == 16384


@pytest.mark.parametrize(
    "scaling",
    [None, {}, {"rope_type": None}, {"type": "default"}, {"rope_type": "default", "factor": 4.0}],
    ids=str,
)
def test_no_scaling(scaling: dict[str, Any] | None) -> None:
    config = ModelConfig.from_dict({**RAW, "rope_scaling": scaling})
    assert config.rope.type == "default"
    assert config.context_length == 32768


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic.*length"),
        ({"type": "su", "factor": 2.0}, "su.*length"),
        ({"rope_type": "proportional", "factor": 2.0}, "proportional"),
        ({"rope_type": "mrope", "mrope_section": [2, 3, 3]}, "mrope"),
        ({"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial.*0.5"),
        (
            {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
            "full_attention, sliding_attention",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_what_is_refused_is_named(rope: dict[str, Any], match: str, key: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        ModelConfig.from_dict({**RAW, key: rope})


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": -4.0}, "factor"),
        ({"rope_type": "yarn", "factor": "4"}, "factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "frequencies"),
        ({"rope_type": "longrope", "short_factor": [0.0], "long_factor": [0.0]}, "above 0"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "x"}, "config"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_sentence(rope: dict[str, Any], match: str) -> None:
    with pytest.raises(TealError, match=match):
        ModelConfig.from_dict({**RAW, "rope_parameters": rope})
