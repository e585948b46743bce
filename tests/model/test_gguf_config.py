"""GGUF's metadata: what llama.cpp reads of them is honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.families import hf_model
from model.sources import source_of, write_gguf

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import convert
from teal_cli.model.gguf import GgufFile
from teal_cli.progress import Silent

IDS = torch.arange(90)
STATED = 64  # the context that the files state: less than IDS
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", **THETA, "factor": 4.0, "original_max_position_embeddings": 64}


def logits_of(path: Path) -> torch.Tensor:
    checkpoint = Checkpoint(convert(source_of(path), dtype="float32", reporter=Silent()))
    decoder = checkpoint.load()
    with torch.no_grad():
        return decoder.logits(decoder.forward(IDS))


def llama3_table(head_dim: int = 16, **changes: float) -> Any:
    """The divisors that llama.cpp's converter writes, and the scaling that they are of."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        **changes,
    }
    more = {"head_dim": head_dim, "num_hidden_layers": 1}
    scaled = hf_model("llama", rope_parameters=rope, **more).model.rotary_emb.inv_freq
    plain = hf_model("llama", **more).model.rotary_emb.inv_freq
    return (plain / scaled).numpy(), rope


# The keys below `ARCHITECTURE.rope`, and what transformers calls the same.
ROPE: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "nothing": ({}, {"rope_type": "default", **THETA}, 64),
    "old-linear": ({"scale_linear": 4.0}, {"rope_type": "linear", **THETA, "factor": 4.0}, 256),
    "factor-without-type": (
        {"scaling.factor": 2.0},
        {"rope_type": "linear", **THETA, "factor": 2.0},
        128,
    ),
    "linear": (
        {"scaling.type": "linear", "scaling.factor": 4.0, "scaling.finetuned": True},
        {"rope_type": "linear", **THETA, "factor": 4.0},
        256,
    ),
    "factor-goes-before-scale-linear": (
        {"scaling.factor": 4.0, "scale_linear": 8.0},
        {"rope_type": "linear", **THETA, "factor": 4.0},
        256,
    ),
    "factor-of-nothing": (
        {"scaling.factor": 0.0, "scale_linear": 8.0},
        {"rope_type": "default", **THETA},
        64,
    ),
    "type-none": (
        {"scaling.type": "none", "scaling.factor": 4.0},
        {"rope_type": "default", **THETA},
        64,
    ),
    "base": ({"freq_base": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}, 64),
    "attn-factor": (
        {"scaling.attn_factor": 1.25},
        {
            "rope_type": "longrope",
            **THETA,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 64,
        },
        64,
    ),
    "yarn": (
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 64,
            "scaling.yarn_ext_factor": 1.0,
        },
        YARN,
        256,
    ),
    "yarn-without-original": ({"scaling.type": "yarn", "scaling.factor": 4.0}, YARN, 256),
    "yarn-attn-factor": (
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 0.5},
        {**YARN, "attention_factor": 0.5 * (1 + 0.1 * np.log(4.0))},
        256,
    ),
    "yarn-betas": (
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 4096,
            "scaling.yarn_beta_fast": 16.0,
            "scaling.yarn_beta_slow": 2.0,
        },
        {**YARN, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
        16384,
    ),
    "yarn-factor-1": (
        {"scaling.type": "yarn", "scaling.factor": 1.0},
        {"rope_type": "default", **THETA},
        64,
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("situation", ROPE)
def test_rope(situation: str, family: str, tmp_path: Path, teal_home: Path) -> None:
    keys, rope, context = ROPE[situation]
    more = {"max_position_embeddings": STATED, "head_dim": 16, "num_hidden_layers": 2}
    theta = keys.get("freq_base", 10000.0)
    stored = hf_model(family, **more, rope_parameters={"rope_theta": theta})
    metadata = {f"{family}.rope.{k}": v for k, v in keys.items() if k != "freq_base"}
    path = write_gguf(tmp_path / "model.gguf", stored, metadata=metadata)
    with torch.no_grad():
        expected = hf_model(family, **more, rope_parameters=rope)(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(path), expected, atol=2e-5, rtol=1e-4)
    assert ModelConfig.from_dict(GgufFile(path).config).context_length == context


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 32.0},
        {"original_max_position_embeddings": 512},
        {"low_freq_factor": 2.0, "high_freq_factor": 16.0},
    ],
    ids=str,
)
def test_llama3_scaling_is_stored_as_its_effect(
    changes: dict[str, float], tmp_path: Path, teal_home: Path
) -> None:
    table, rope = llama3_table(**changes)
    stored = hf_model("llama", max_position_embeddings=1024)
    path = write_gguf(tmp_path / "model.gguf", stored, tensors={"rope_freqs.weight": table})
    model = hf_model("llama", max_position_embeddings=1024, rope_parameters=rope)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(path), expected, atol=2e-5, rtol=1e-4)
    assert ModelConfig.from_dict(GgufFile(path).config).context_length == 1024


def test_llama3_scaling_and_a_factor_go_together(tmp_path: Path, teal_home: Path) -> None:
    table, _ = llama3_table()
    stored = hf_model("llama", max_position_embeddings=64)
    keys = {"llama.rope.scaling.factor": 2.0, "llama.rope.scaling.attn_factor": 1.5}
    tensors = {"rope_freqs.weight": table}
    path = write_gguf(tmp_path / "model.gguf", stored, metadata=keys, tensors=tensors)
    model = hf_model("llama", max_position_embeddings=64)
    model.model.rotary_emb.inv_freq /= torch.from_numpy(2 * table)
    model.model.rotary_emb.attention_scaling = 1.5
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(path), expected, atol=2e-5, rtol=1e-4)


def test_a_sliding_window_of_a_llama_makes_it_a_mistral(tmp_path: Path, teal_home: Path) -> None:
    window = {"llama.attention.sliding_window": 16}
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"), metadata=window)
    with torch.no_grad():
        expected = hf_model("mistral-window")(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(path), expected, atol=2e-5, rtol=1e-4)


def test_a_llama_with_biases_on_q_k_and_v_alone(tmp_path: Path, teal_home: Path) -> None:
    model = hf_model("llama-bias")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
        expected = model(IDS[None]).logits[0]
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = None
    path = write_gguf(tmp_path / "model.gguf", model)
    torch.testing.assert_close(logits_of(path), expected, atol=2e-5, rtol=1e-4)


NEUTRAL = {
    "llama.attention.causal": True,
    "llama.attention.head_count_kv": [2, 2, 2],
    "llama.attention.key_length": 16,
    "llama.attention.scale": 0.25,
    "llama.attention.value_length": 16,
    "llama.expert_count": 0,
    "llama.logit_scale": 1.0,
    "llama.rope.dimension_count": 16,
    "llama.rope.scaling.yarn_ext_factor": -1.0,
    "llama.rope.scaling.yarn_log_multiplier": 0.0,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.vocab_size": 97,
    "general.type": "model",
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_metadata_that_say_what_is_usual_are_taken(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_changed(tmp_path / "model.gguf", {key: NEUTRAL[key]}, monkeypatch)
    assert GgufFile(path).config["num_key_value_heads"] == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"general.type": "adapter"}, "LoRA adapter"),
    "projector": ({"general.type": "mmproj"}, "projector"),
    "clip": ({"general.architecture": "clip"}, "projector"),
    "imatrix": ({"general.type": "imatrix"}, "importance matrix"),
    "architecture": ({"general.architecture": "mamba"}, "mamba"),
    "moe-architecture": ({"general.architecture": "qwen3moe"}, "mixture of experts"),
    "experts": ({"llama.expert_count": 8}, "mixture of experts.*Mixtral"),
    "layers": ({"llama.attention.head_count_kv": [2, 1, 2]}, "different sizes.*head_count_kv"),
    "value-length": ({"llama.attention.value_length": 8}, "value_length"),
    "partial-rope": ({"llama.rope.dimension_count": 8}, "dimension_count"),
    "attention-scale": ({"llama.attention.scale": 0.5}, "attention.scale"),
    "logit-scale": ({"llama.logit_scale": 0.0625}, "logit_scale"),
    "embedding-scale": ({"llama.embedding_scale": 12.0}, "embedding_scale"),
    "residual-scale": ({"llama.residual_scale": 0.22}, "residual_scale"),
    "softcapping": ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "causal": ({"llama.attention.causal": False}, "attention.causal"),
    "rope-type": ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    "sections": ({"llama.rope.dimension_sections": [4, 4, 8, 0]}, "dimension_sections"),
    "ext-factor": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
        "yarn_ext_factor",
    ),
    "log-multiplier": ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
    "yarn-attn-factor": ({"llama.rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor"),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_metadata_that_change_the_computation_are_refused_by_name(
    situation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, match = REFUSED[situation]
    path = write_changed(tmp_path / "model.gguf", metadata, monkeypatch)
    with pytest.raises(UnsupportedError, match=match):
        GgufFile(path)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blk.0.ffn_gate.3.weight", "ffn_gate.3"),
        ("blk.0.ffn_gate_inp.weight", "mixture of experts"),
        ("blk.1.ffn_up_exps.weight", "mixture of experts"),
        ("blk.0.ffn_up.bias", r"ffn_up\.bias"),
        ("blk.0.attn_sub_norm.weight", "attn_sub_norm"),
        ("rope_factors_long.weight", "rope_factors_long"),
        ("cls.output.weight", "cls.output"),
    ],
)
def test_tensors_that_a_model_does_not_have_are_refused_by_name(
    name: str, match: str, tmp_path: Path
) -> None:
    more = {name: np.ones((2, 4), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"), tensors=more)
    with pytest.raises(UnsupportedError, match=match):
        GgufFile(path)


@pytest.mark.parametrize(
    ("table", "match"),
    [([1.0, 2.0], "2 frequencies"), ([0.0] * 8, "above 0"), ([np.nan] * 8, "above 0")],
    ids=str,
)
def test_rope_tables_that_are_none(table: list[float], match: str, tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.array(table, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"), tensors=tensors)
    with pytest.raises(TealError, match=match):
        GgufFile(path)


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    tokens = {"tokens": [f"t{n}" for n in range(120)], "types": [1] * 120}
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"), tokenizer=tokens)
    with pytest.raises(TealError, match="120 tokens, the embedding 97 rows"):
        GgufFile(path)


def write_changed(path: Path, metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny llama's file with these metadata in place of its own."""
    import gguf

    add = gguf.GGUFWriter.add_key_value

    def changed(self: Any, key: str, value: Any, kind: Any, *rest: Any, **named: Any) -> None:
        if key in metadata:
            value, kind = metadata[key], gguf.GGUFValueType.get_type(metadata[key])
            if key in self.kv_data[0]:
                return
        add(self, key, value, kind, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_key_value", changed)
        return write_gguf(path, hf_model("llama"), metadata=metadata)
