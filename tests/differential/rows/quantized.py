"""Checkpoints that came quantized: every weight is the one that the format's formula gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from differential.comparisons import Tensors
from differential.packers import (
    Awq,
    Bits4,
    Bits8,
    CompressedIntegers,
    Float8,
    Gptq,
    Mlx,
    Packed,
    Packer,
)
from differential.situations import Made, Situation, Step
from model.edits import edit_config, edit_weights
from safetensors.torch import load_file, save_file

# Which packer a tensor of this name goes to; None leaves it as it is.
Choice = Callable[[str], Packer | None]


def _projections(packer: Packer) -> Choice:
    return lambda name: packer if name.endswith("proj.weight") else None


def _matrices(packer: Packer) -> Choice:
    """Embedding and head too: MLX leaves nothing out."""
    ends = ("proj.weight", "embed_tokens.weight", "lm_head.weight")
    return lambda name: packer if name.endswith(ends) else None


def _packed(choose: Choice, **extra: torch.Tensor) -> Step:
    """The folder's matrices become packed ones; `extra` stands beside each."""

    def step(made: Made) -> None:
        torch.manual_seed(4)
        path = made.folder / "model.safetensors"
        stored: dict[str, torch.Tensor] = {}
        made.tensors = {}
        for name, tensor in load_file(path).items():
            if (packer := choose(name)) is None:
                stored[name] = tensor.half()
                made.tensors[name] = stored[name].float()
                continue
            stem = name.removesuffix("weight")
            tensors, made.tensors[name] = packer(*tensor.shape)
            for suffix, part in {**tensors, **extra}.items():
                stored[stem + suffix] = part.clone()
        made.tensors.setdefault("lm_head.weight", made.tensors["model.embed_tokens.weight"])
        save_file(stored, path, metadata={"format": "pt"})

    return step


def _says(**config: Any) -> Step:
    return lambda made: edit_config(**config)(made.folder)


def _row(name: str, packer: Any, *families: str, **extra: torch.Tensor) -> Situation:
    return Situation(
        name,
        Tensors(rtol=1e-3),
        (_packed(_projections(packer), **extra), _says(quantization_config=packer.config)),
        families=families or ("llama", "qwen2"),
        model={"intermediate_size": 128},
    )


def _mlx(name: str, packer: Mlx, *keys: str) -> Situation:
    return Situation(
        name,
        Tensors(rtol=1e-3),
        (_packed(_matrices(packer)), _says(**dict.fromkeys(keys, packer.config))),
        families=("llama", "qwen3"),
        model={"intermediate_size": 128, "head_dim": 16},
    )


def _quantize_config(made: Made) -> None:
    """What AutoGPTQ wrote in 2023, and nothing in config.json."""
    fields = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.01}
    (made.folder / "quantize_config.json").write_text(json.dumps(fields))


def _scales_in_bfloat16(made: Made) -> None:
    """As models are quantized whose own dtype is bfloat16."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if name.endswith(("scales", "biases", "weight_scale")):
                weights[name] = tensor.bfloat16()

    edit_weights(change)(made.folder)


def _cache_scales(made: Made) -> None:
    """Scales of the key-value cache, by all the names that they have had."""
    names = ("k_scale", "v_scale", "attn.kv_scale", "k_proj.k_scale", "v_proj.output_scale")
    scales = {f"model.layers.{i}.self_attn.{name}": torch.ones(1) for i in (0, 1) for name in names}
    edit_weights(lambda weights: weights.update(scales))(made.folder)


def _biased(outputs: int, inputs: int) -> Packed:
    """GPTQ of early 2023: a bias of zeros beside every matrix."""
    tensors, weight = Gptq()(outputs, inputs)
    return {**tensors, "bias": torch.zeros(outputs).half()}, weight


GPTQ = (
    _row("GPTQ, 4 bits", Gptq()),
    _row("GPTQ, 8 bits", Gptq(bits=8)),
    _row("GPTQ, act-order", Gptq(act_order=True)),
    _row("GPTQ, one group", Gptq(group_size=-1)),
    _row("GPTQ, version 2", Gptq(version=2)),
    _row("GPTQ, symmetric", Gptq(symmetric=True)),
    _row("GPTQ, version 2, 8 bits, act-order", Gptq(bits=8, act_order=True, version=2)),
    Situation(
        "GPTQ of 2023, with quantize_config.json",
        Tensors(rtol=1e-3),
        (_packed(_projections(Gptq())), _quantize_config),
        model={"intermediate_size": 128},
    ),
)
AWQ = (_row("AWQ", Awq()), _row("AWQ, groups of 64", Awq(group_size=64)))
COMPRESSED = (
    _row("compressed-tensors, 4 bits in groups", CompressedIntegers()),
    _row("compressed-tensors, 4 bits with zeros", CompressedIntegers(symmetric=False)),
    _row("compressed-tensors, 4 bits, act-order", CompressedIntegers(act_order=True)),
    _row("compressed-tensors, 4 bits a channel", CompressedIntegers(group_size=None)),
    _row("compressed-tensors, 8 bits in words", CompressedIntegers(bits=8)),
    _row("compressed-tensors, int8", CompressedIntegers(8, None, packed=False)),
    _row("compressed-tensors, float8, one scale", Float8("tensor", compressed=True)),
    _row("compressed-tensors, float8, a scale a channel", Float8("channel", compressed=True)),
    _row("compressed-tensors, float8 in blocks", Float8("block", compressed=True)),
    _row(
        "compressed-tensors, float8 with scales of activations",
        Float8("tensor", compressed=True),
        "llama",
        input_scale=torch.ones(1),
    ),
)
FLOAT8 = (_row("float8 in blocks", Float8(), "llama", "qwen3"),)
MLX = (
    _mlx("MLX, 4 bits", Mlx(), "quantization"),
    _mlx("MLX, 8 bits", Mlx(bits=8), "quantization"),
    _mlx("MLX, 4 bits, both keys", Mlx(group_size=64), "quantization", "quantization_config"),
)
BITSANDBYTES = (
    _row("bitsandbytes, nf4", Bits4()),
    _row("bitsandbytes, nf4 twice", Bits4(nested=True)),
    _row("bitsandbytes, fp4", Bits4(kind="fp4"), "llama"),
    _row("bitsandbytes, int8", Bits8()),
)


def _parts(
    name: str, choose: Choice, config: Mapping[str, Any], key: str, *steps: Step, **model: Any
) -> Situation:
    own = {"intermediate_size": 128, **model}
    made = (_packed(choose), _says(**{key: dict(config)}), *steps)
    return Situation(name, Tensors(rtol=1e-3), made, model=own)


def _second_layer(name: str) -> Packer | None:
    return Awq() if "layers.1" in name and name.endswith("proj.weight") else None


def _eight_bits_down(name: str) -> Packer | None:
    return Mlx(bits=8) if "down_proj" in name else _matrices(Mlx())(name)


def _groups_of_64_up(name: str) -> Packer | None:
    return Mlx(group_size=64) if "up_proj" in name else _matrices(Mlx())(name)


def _head_too(name: str) -> Packer | None:
    return Gptq() if name.endswith(("proj.weight", "lm_head.weight")) else None


_KEY = "quantization_config"
PARTS = (
    _parts(
        "AWQ, a layer left as it was",
        _second_layer,
        {**Awq().config, "modules_to_not_convert": ["model.layers.0."]},
        _KEY,
    ),
    _parts("AWQ, a tied head", _projections(Awq()), Awq().config, _KEY, tie_word_embeddings=True),
    _parts(
        "MLX, a tied head", _matrices(Mlx()), Mlx().config, "quantization", tie_word_embeddings=True
    ),
    _parts(
        "MLX, two numbers of bits",
        _eight_bits_down,
        {
            **Mlx().config,
            **{f"model.layers.{i}.mlp.down_proj": Mlx(bits=8).config for i in range(2)},
        },
        "quantization",
    ),
    _parts(
        "GPTQ, the head too", _head_too, {**Gptq().config, "lm_head": True}, _KEY, vocab_size=320
    ),
    # Its zero points are those of version 2; as the middle they can't be another's.
    _parts(
        "GPTQ, symmetric, version 2 by another name",
        _projections(Gptq(version=2, symmetric=True)),
        Gptq(symmetric=True).config,
        _KEY,
    ),
    _parts("GPTQ, biases of zero", _projections(_biased), Gptq().config, _KEY),
    _parts(
        "MLX, two sizes of groups",
        _groups_of_64_up,
        {
            **Mlx().config,
            **{f"model.layers.{i}.mlp.up_proj": Mlx(group_size=64).config for i in range(2)},
        },
        "quantization",
    ),
    _parts(
        "MLX, embedding and head left as they were",
        _projections(Mlx()),
        {**Mlx().config, "model.embed_tokens": False, "lm_head": False},
        "quantization",
    ),
    _parts(
        "compressed-tensors, scales of the cache",
        _projections(CompressedIntegers()),
        {**CompressedIntegers().config, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        _KEY,
        _cache_scales,
    ),
    *(
        _parts(
            f"{name}, scales in bfloat16", choose(packer), packer.config, key, _scales_in_bfloat16
        )
        for name, packer, choose, key in (
            ("GPTQ", Gptq(), _projections, _KEY),
            ("AWQ", Awq(), _projections, _KEY),
            ("compressed-tensors", CompressedIntegers(), _projections, _KEY),
            ("MLX", Mlx(), _matrices, "quantization"),
        )
    ),
)

ROWS = (*GPTQ, *AWQ, *COMPRESSED, *FLOAT8, *MLX, *BITSANDBYTES, *PARTS)
