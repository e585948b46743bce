"""What teal does not read is named as what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from differential.comparisons import Logits, Refused, Tensors
from differential.situations import Made, Situation, as_gguf, only_for_teal
from model.edits import REMOVED, Edit, edit_config, edit_json, remove, rename, write
from safetensors.torch import save_file

from teal_cli.errors import MissingError, TealError, UnsupportedError

_EXPERTS = ("expert", "mixtral")


def _experts(made: Made) -> dict[str, np.ndarray]:
    shapes = {
        "ffn_gate_inp": (4, 64),
        "ffn_gate_exps": (4, 112, 64),
        "ffn_up_exps": (4, 112, 64),
        "ffn_down_exps": (4, 64, 112),
    }
    return {
        f"blk.{layer}.{name}.weight": np.zeros(shape, np.float32)
        for layer in range(2)
        for name, shape in shapes.items()
    }


def _adapter(folder: Path) -> None:
    """What a LoRA fine-tune leaves: two thin matrices a projection, and the base model's name."""
    for file in folder.glob("*"):
        if not file.name.startswith("tokenizer"):
            file.unlink()
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{stem}A.weight": torch.ones(4, 64), f"{stem}B.weight": torch.ones(64, 4)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _second_part(path: Path) -> Path:
    return next(path.parent.glob("*-00002-of-*"))


def _without_suffix(path: Path) -> Path:
    return path.rename(path.parent / f"sha256-{'0' * 64}")


def _in_a_folder(path: Path) -> Path:
    folder = path.parent / "downloaded"
    folder.mkdir()
    path.rename(folder / path.name)
    return folder


def _as_a_folder(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return edit


def _as_a_pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def _as_a_link(name: str, *, leads: bool) -> Edit:
    """As in the Hub's cache, whose files are links; a cleaner may take what they lead to."""

    def edit(folder: Path) -> None:
        target = folder.parent / f"{folder.name}-{name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)
        if not leads:
            target.unlink()

    return edit


def _refused(
    name: str, error: type[TealError], words: tuple[str, ...], *edits: object
) -> Situation:
    return Situation(name, Refused(error, words), (only_for_teal(*edits),))


def _quantized(**config: object) -> object:
    return edit_config(quantization_config=config)


MODELS = (
    _refused(
        "Mixtral",
        UnsupportedError,
        _EXPERTS,
        edit_config(model_type="mixtral", num_local_experts=8),
    ),
    _refused(
        "Qwen's mixture of experts",
        UnsupportedError,
        ("expert",),
        edit_config(model_type="qwen3_moe", num_experts=8),
    ),
    Situation(
        "GGUF: Mixtral, which calls itself a llama",
        Refused(UnsupportedError, ("mixture of experts", "mixtral")),
        (
            as_gguf(
                {"llama.expert_count": 4, "llama.expert_used_count": 2},
                drop=".mlp.",
                tensors=_experts,
            ),
        ),
    ),
    _refused(
        "code of the model's own",
        UnsupportedError,
        ("code of its own", "remote code", "trust_remote_code"),
        edit_config(
            model_type="internlm9",
            auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
        ),
    ),
    _refused("a model that encodes", UnsupportedError, ("bert",), edit_config(model_type="bert")),
    _refused(
        "a model that sees",
        UnsupportedError,
        ("llava", "images"),
        edit_config(model_type="llava", text_config={"model_type": "llama"}),
    ),
    _refused("an adapter", TealError, ("adapter",), _adapter),
    _refused("MXFP4", UnsupportedError, ("mxfp4",), _quantized(quant_method="mxfp4")),
    _refused("AQLM", UnsupportedError, ("aqlm",), _quantized(quant_method="aqlm")),
    _refused("a quantization without a name", UnsupportedError, ("quantized",), _quantized(bits=3)),
    Situation(
        "GGUF: another architecture",
        Refused(UnsupportedError, ("gemma3",)),
        (as_gguf({"general.architecture": "gemma3"}),),
    ),
    Situation(
        "GGUF: an unknown pre-tokenizer",
        Refused(UnsupportedError, ("made-up",)),
        (as_gguf(pre="made-up"),),
    ),
    Situation(
        "GGUF: a tokenizer of another kind",
        Refused(UnsupportedError, ("bert",)),
        (as_gguf({"tokenizer.ggml.model": "bert"}),),
    ),
)

_NAMES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Each may be left out, but what is there in its place is not passed over.
NO_FILES = (
    *(
        _refused(f"{what} for {name}", TealError, (f"{name} is a folder, a pipe",), edit(name))
        for what, edit in (("a folder", _as_a_folder), ("a pipe", _as_a_pipe))
        for name in (*_NAMES, "generation_config.json", "chat_template.jinja")
    ),
    *(
        _refused(
            f"a link to nothing for {name}",
            TealError,
            (f"{name} is a link that leads nowhere",),
            _as_a_link(name, leads=False),
        )
        for name in _NAMES
    ),
    Situation(
        "links for all files",
        Tensors(),
        (only_for_teal(*(_as_a_link(name, leads=True) for name in (*_NAMES, "config.json"))),),
    ),
    *(
        _refused(f"{text} for {name}", TealError, (f"{name} {said}",), write(name, text))
        for text, said in (("[1]", "does not hold a json object"), ("{", "is not valid json"))
        for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json")
    ),
    _refused(
        "a text for the number of the last token",
        TealError,
        ("eos_token_id",),
        edit_json("generation_config.json", eos_token_id="2"),
    ),
)

FILES = (
    _refused("no config.json", MissingError, ("config.json",), remove("config.json")),
    _refused("no weights", MissingError, ("safetensors",), remove("*.safetensors")),
    _refused(
        "consolidated weights of Meta's own",
        TealError,
        (".pth", "consolidated", "pickle"),
        rename("model.safetensors", "consolidated.00.pth"),
    ),
    _refused("no tokenizer", TealError, ("tokenizer",), remove("tokenizer*")),
    _refused(
        "a size that is not there", TealError, ("hidden_size",), edit_config(hidden_size=REMOVED)
    ),
    Situation("GGUF in parts, the first named", Tensors(), (as_gguf(split_max_tensors=5),)),
    Situation(
        "GGUF in parts, the second named",
        Tensors(),
        (as_gguf(split_max_tensors=5, given=_second_part),),
    ),
    Situation(
        "GGUF in parts, one gone",
        Refused(TealError, ("00002-of",)),
        (as_gguf(split_max_tensors=5, given=lambda path: _second_part(path).unlink() or path),),
    ),
    Situation("a GGUF file without a suffix", Logits(), (as_gguf(given=_without_suffix),)),
    Situation("a folder with one GGUF file", Logits(), (as_gguf(given=_in_a_folder),)),
)

ROWS = (*MODELS, *NO_FILES, *FILES)
