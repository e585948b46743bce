"""ModelConfig against transformers' own reading of a config.json, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import FAMILIES, hf_model, our_config

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.config import ModelConfig
from teal_cli.model.rope import attention_scaling, inverse_frequencies

MINIMAL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}


TYPES = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "granite", "smollm3")


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_shapes_equal_those_of_transformers(family: str) -> None:
    from teal_cli.model.hf_layout import hf_shapes

    model = hf_model(family)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert hf_shapes(our_config(model)) == expected


@pytest.mark.parametrize(
    "family",
    [name for name in FAMILIES if "rope" in name] + ["qwen3", "phi3-longrope", "ministral3"],
)
def test_rotary_frequencies_equal_those_of_transformers(family: str) -> None:
    model, config = hf_model(family), our_config(hf_model(family))
    rotary = model.model.rotary_emb
    torch.testing.assert_close(inverse_frequencies(config.rope, config.rotary_dim), rotary.inv_freq)
    assert attention_scaling(config.rope) == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("model_type", TYPES)
def test_defaults_equal_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type, **MINIMAL)
    ours = ModelConfig.from_dict({"model_type": model_type, **MINIMAL})
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    window = getattr(theirs, "sliding_window", None)
    assert ours.sliding_windows == (window,) * 32
    assert ours.attention_scale == getattr(theirs, "attention_multiplier", ours.head_dim**-0.5)
    rotated = getattr(theirs, "no_rope_layers", [1] * 32)
    assert [size > 0 for size in ours.rotary_dims] == list(map(bool, rotated))
    assert ours == ModelConfig.from_dict(theirs.to_dict())


def test_rope_reads_alike_in_both_forms() -> None:
    old = {
        "model_type": "llama",
        **MINIMAL,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    }
    new = {key: value for key, value in old.items() if not key.startswith("rope")}
    scaling = {key: value for key, value in old["rope_scaling"].items() if key != "type"}  # type: ignore[attr-defined]
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(new).rope.factor == 8.0


def test_sliding_windows() -> None:
    def windows(model_type: str, **more: Any) -> set[int | None]:
        return set(
            ModelConfig.from_dict(
                {"model_type": model_type, **MINIMAL, **more, **heads}
            ).sliding_windows
        )

    heads = {"num_key_value_heads": 4}
    assert windows("llama", sliding_window=8) == {None}
    assert windows("mistral", sliding_window=8) == {8}
    assert windows("mistral", sliding_window=None) == {None}
    assert windows("qwen2", sliding_window=8) == {None}
    assert windows("qwen2", sliding_window=8, use_sliding_window=True) == {None, 8}
    assert windows("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=0) == {8}


def test_windows_of_layers_without_rope() -> None:
    """SmolLM3's, where its config does not name the layers' kinds."""
    from transformers import AutoConfig

    own = {"sliding_window": 8, "use_sliding_window": True, "no_rope_layer_interval": 3}
    ours = ModelConfig.from_dict({"model_type": "smollm3", **MINIMAL, **own})
    kinds = AutoConfig.for_model("smollm3", **MINIMAL, **own).layer_types
    assert [size is not None for size in ours.sliding_windows] == [
        kind == "sliding_attention" for kind in kinds
    ]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model_type": "gpt2"}, UnsupportedError, "gpt2"),
        ({"model_type": None}, UnsupportedError, "None"),
        ({"model_type": ["llama"]}, UnsupportedError, "llama"),
        ({"hidden_act": "gelu"}, UnsupportedError, "gelu"),
        ({"mlp_bias": True}, UnsupportedError, "mlp_bias"),
        ({"model_type": "mixtral", "num_local_experts": 8}, UnsupportedError, "mixture of experts"),
        ({"model_type": "granitemoe", "num_local_experts": 8}, UnsupportedError, "of experts"),
        ({"model_type": "phimoe", "num_local_experts": 16}, UnsupportedError, "of experts"),
        ({"model_type": "phi4mm", "auto_map": {"AutoConfig": "c.C"}}, UnsupportedError, "its own"),
        ({"model_type": "phi4_multimodal"}, UnsupportedError, "'phi4_multimodal' is not"),
        ({"model_type": "granite", "logits_scaling": 0}, TealError, "logits_scaling"),
        ({"model_type": "granite", "residual_multiplier": -1}, TealError, "residual_multiplier"),
        ({"model_type": "granite", "embedding_multiplier": "x"}, TealError, "config.json"),
        ({"model_type": "granite", "mlp_bias": True}, UnsupportedError, "mlp_bias"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, TealError, "names 2 layers of 32"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, TealError, "config.json"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.1}, TealError, "0 of 8 channels"),
        ({"model_type": "odd", "auto_map": {"AutoConfig": "c.C"}}, UnsupportedError, "its own"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, TealError, "short_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, TealError, "factor"),
        ({"rope_scaling": "linear"}, TealError, "rope"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"num_hidden_layers": 0}, TealError, "num_hidden_layers"),
        ({"num_hidden_layers": "many"}, TealError, "config.json"),
        ({"num_key_value_heads": 5}, TealError, "key-value"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, TealError, "num_attention_heads"),
        ({"head_dim": 15}, TealError, "head_dim"),
        ({"vocab_size": float("inf")}, TealError, "config.json"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], error: type[TealError], match: str) -> None:
    with pytest.raises(error, match=match):
        ModelConfig.from_dict({"model_type": "llama", **MINIMAL, **change})


def test_missing_field_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(TealError, match="vocab_size"):
        ModelConfig.from_dict({"model_type": "llama", **MINIMAL, "vocab_size": None})
    path = tmp_path / "config.json"
    with pytest.raises(MissingError):
        ModelConfig.from_file(path)
    for content in ("{", "[]", '"llama"', "\xff"):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(TealError):
            ModelConfig.from_file(path)
    path.write_text(json.dumps({"model_type": "llama", **MINIMAL}))
    assert ModelConfig.from_file(path).q_size == 256
