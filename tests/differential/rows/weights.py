"""Which tensors a checkpoint means: ties, indices, leftovers, names, formats of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from differential.comparisons import EqualOrRefused, Logits, Refused, Tensors
from differential.situations import EVERY, IN_GGUF, Made, Situation, as_gguf, on_folder
from gguf import GGUFEndian
from model.edits import REMOVED, edit_config, edit_weights, rename
from model.families import FAMILIES
from safetensors.torch import load_file, save_file

from teal_cli.errors import MissingError, TealError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_OLD_SHARD = "model-00001-of-00001.safetensors"


def _left_index(*, shard: bool) -> Callable[[Path], None]:
    """An index of an earlier upload, with or without the shard that it names."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        other = {name: tensor + 1 for name, tensor in weights.items()}
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, _OLD_SHARD)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if shard:
            save_file(other, folder / _OLD_SHARD, metadata={"format": "pt"})

    return edit


def _in_shards(made: Made) -> None:
    (made.folder / "model.safetensors").unlink()
    made.model.save_pretrained(made.folder, max_shard_size="60KB")
    assert len(list(made.folder.glob("*.safetensors"))) > 2


def _consolidated(made: Made) -> None:
    """The maker's own format, other names and another order of rows, as Mistral ships it."""
    weights = {f"layers.{i}.attention.wq.weight": torch.ones(64, 64) for i in range(2)}
    save_file(weights, made.folder / "consolidated.safetensors")


def _add(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return edit_weights(lambda weights: weights.update(tensors))


def _renamed(weights: dict[str, Any]) -> None:
    for name in [name for name in weights if name.startswith("model.")]:
        weights[name.removeprefix("model.")] = weights.pop(name)
    weights.pop(_HEAD, None)


def _as_dtypes(made: Made) -> None:
    """Norms in float32 beside matrices in bfloat16, as some trainers save them."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor if tensor.ndim == 1 else tensor.bfloat16()

    edit_weights(change)(made.folder)


def _in_float64(made: Made) -> None:
    """As numpy makes them, and some merges of models are saved."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor.double()

    edit_weights(change)(made.folder)


def _shard_of_leftovers(made: Made) -> None:
    """The index names a shard that holds nothing of the model."""
    _in_shards(made)
    save_file({"step": torch.tensor(3)}, made.folder / "extra.safetensors")
    index = made.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["step"] = "extra.safetensors"
    index.write_text(json.dumps(content))


def _gguf_kinds() -> tuple[Situation, ...]:
    """A file of each format that the gguf package quantizes to; it also decodes the oracle."""
    kinds = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
    blocks = {"TQ1_0": 256, "TQ2_0": 256}
    return tuple(
        Situation(
            f"GGUF's format {kind}",
            Tensors(rtol=1e-6),
            (as_gguf(quantization=kind), _dequantized(kind)),
            families=("llama", "qwen2"),
            model={
                "hidden_size": blocks.get(kind, 64),
                "intermediate_size": blocks.get(kind, 128),
                "num_hidden_layers": 1,
            },
        )
        for kind in kinds
    )


def _dequantized(kind: str) -> Callable[[Made], None]:
    """The folder's matrices become what the gguf package reads back from the file."""

    def step(made: Made) -> None:
        import gguf

        def change(weights: dict[str, torch.Tensor]) -> None:
            number = gguf.GGMLQuantizationType[kind]
            for name, tensor in weights.items():
                if tensor.ndim == 2:
                    stored = gguf.quantize(tensor.numpy(), number)
                    weights[name] = torch.from_numpy(gguf.dequantize(stored, number).copy())

        edit_weights(change)(made.folder)

    return step


def _gguf_blocks() -> tuple[Situation, ...]:
    """Formats that the package decodes but does not make: random bytes are a valid block."""
    kinds = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")
    kinds += ("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4")
    return tuple(
        Situation(
            f"GGUF's blocks {kind}",
            Tensors(rtol=1e-6),
            (_with_blocks(kind),),
            model={
                "hidden_size": 256,
                "intermediate_size": 256,
                "num_hidden_layers": 1,
            },
        )
        for kind in kinds
    )


def _with_blocks(kind: str) -> Callable[[Made], None]:
    def step(made: Made) -> None:
        import gguf
        import numpy as np

        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        rows, columns = 256, 256
        raw = np.random.default_rng(3).integers(
            0, 256, (rows, columns // block * size), dtype=np.uint8
        )
        # A random scale may be NaN or beyond float16; blocks that decode to small numbers do.
        values = gguf.dequantize(raw, number)
        tame = np.isfinite(values).all(-1) & (np.abs(values) < 6e4).all(-1)
        raw = raw[np.resize(np.flatnonzero(tame), rows)]
        values = gguf.dequantize(raw, number)
        name = "model.layers.0.mlp.down_proj.weight"
        edit_weights(lambda weights: weights.update({name: torch.from_numpy(values.copy())}))(
            made.folder
        )
        as_gguf(drop="mlp.down_proj", tensors={"blk.0.ffn_down.weight": (raw, number)})(made)

    return step


TIES = (
    Situation(
        "a head of its own beside the tie flag",
        Logits(),
        (on_folder(edit_config(tie_word_embeddings=True)),),
        families=EVERY,
    ),
    Situation(
        "a copy of the embedding beside the tie flag",
        Tensors(),
        (on_folder(edit_weights(lambda w: w.update({_HEAD: w[_EMBEDDING].clone()}))),),
        families=("llama", "qwen2"),
        model={"tie_word_embeddings": True},
    ),
    Situation(
        "tied, without a head", Tensors(), families=EVERY, model={"tie_word_embeddings": True}
    ),
    Situation(
        "GGUF: a head of its own",
        Logits(),
        (as_gguf(),),
        families=IN_GGUF,
    ),
    Situation(
        "GGUF: every fourth layer without rope",
        Logits(),
        (as_gguf(),),
        families=("smollm3",),
        model={"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]},
    ),
    Situation(
        "GGUF: longrope, within the original context",
        Logits(prompt=60),
        (as_gguf(),),
        families=("phi3-longrope",),
    ),
    Situation(
        "GGUF: numbers of the other byte order",
        EqualOrRefused(Logits(), ("endian", "byte order")),
        (as_gguf(endianess=GGUFEndian.BIG),),
    ),
    Situation("GGUF: no head", Tensors(), (as_gguf(),), model={"tie_word_embeddings": True}),
)

FILES = (
    Situation("one file", Tensors(), families=EVERY),
    Situation("shards", Tensors(), (_in_shards,), families=("llama", "qwen3")),
    Situation("an old index, its shard there", Tensors(), (on_folder(_left_index(shard=True)),)),
    Situation("an old index, its shard gone", Tensors(), (on_folder(_left_index(shard=False)),)),
    Situation("matrices in bfloat16, norms in float32", Tensors(), (_as_dtypes,)),
    Situation("all in float64", Tensors(), (_in_float64,)),
    Situation("a shard of leftovers", Tensors(), (_shard_of_leftovers,)),
    Situation(
        "another complete copy beside the shards",
        Tensors(),
        (_in_shards, _consolidated),
        families=("mistral",),
    ),
    Situation("as transformers saves it", Logits(prompt=40), families=tuple(FAMILIES)),
    # What a config leaves out is the family's default, and some leave out nearly all.
    Situation(
        "a short config",
        Logits(),
        (
            on_folder(
                edit_config(
                    **dict.fromkeys(
                        ("head_dim", "rms_norm_eps", "rope_parameters", "attention_bias"), REMOVED
                    ),
                    **dict.fromkeys(("tie_word_embeddings", "layer_types", "hidden_act"), REMOVED),
                )
            ),
        ),
        families=("llama", "mistral", "qwen2"),
        model={"rms_norm_eps": 1e-6, "sliding_window": 4096},
    ),
    Situation(
        "no number of key-value heads",
        Logits(),
        (on_folder(edit_config(num_key_value_heads=REMOVED)),),
        model={"num_key_value_heads": 4},
    ),
    Situation("decoded by the fused step", Logits(backend="auto"), families=EVERY),
)

LEFTOVERS = (
    Situation(
        "layers beyond num_hidden_layers",
        Logits(),
        (on_folder(edit_config(num_hidden_layers=1, layer_types=REMOVED)),),
        families=EVERY,
    ),
    Situation(
        "a value head",
        Tensors(),
        (on_folder(_add(**{"v_head.summary.weight": torch.ones(1, 64)})),),
    ),
    Situation(
        "rotary tables",
        Tensors(),
        (
            on_folder(
                _add(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
            ),
        ),
        families=("llama", "mistral"),
    ),
    Situation(
        "one rotary table for the model",
        Tensors(),
        (on_folder(_add(**{"model.rotary_emb.inv_freq": torch.ones(8)})),),
        families=("llama", "qwen2"),
    ),
    Situation(
        "layers that predict further tokens",
        Tensors(),
        (on_folder(_add(**{"mtp.layers.0.input_proj.weight": torch.ones(64, 128)})),),
        families=("qwen3",),
    ),
    Situation(
        "attention masks",
        Tensors(),
        (on_folder(_add(**{"model.layers.1.self_attn.masked_bias": torch.ones(1)})),),
    ),
    Situation(
        "names of the base model, without a head",
        Logits(),
        (on_folder(edit_weights(_renamed)),),
        families=("llama", "qwen2"),
        model={"tie_word_embeddings": True},
    ),
)

REFUSED = (
    Situation(
        "a tensor missing",
        Refused(TealError, ("lacks model.layers.1.mlp.down_proj.weight",)),
        (on_folder(edit_weights(lambda w: w.pop("model.layers.1.mlp.down_proj.weight"))),),
        families=EVERY,
    ),
    Situation(
        "no head where none is tied",
        Refused(TealError, ("lacks lm_head.weight",)),
        (on_folder(edit_weights(lambda w: w.pop(_HEAD))),),
    ),
    Situation(
        "a matrix of another shape",
        Refused(TealError, ("shape [112, 64]",)),
        (on_folder(edit_config(intermediate_size=128)),),
        families=("llama", "qwen3"),
    ),
    Situation(
        "a shard missing",
        Refused(MissingError, ("model-00002-of",)),
        (
            _in_shards,
            on_folder(lambda folder: next(iter(sorted(folder.glob("model-00002-of-*")))).unlink()),
        ),
    ),
    Situation(
        "PyTorch's pickles alone",
        Refused(TealError, (".bin", "pickle")),
        (on_folder(rename("model.safetensors", "pytorch_model.bin")),),
    ),
)

ROWS = (*TIES, *FILES, *LEFTOVERS, *_gguf_kinds(), *_gguf_blocks(), *REFUSED)
