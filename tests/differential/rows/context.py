"""How positions turn the heads, and how many of them there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from differential.answers import Answer
from differential.comparisons import EqualOrRefused, Logits, Refused
from differential.situations import EVERY, Made, Situation, as_gguf, on_folder
from model.edits import REMOVED, edit_config
from model.families import hf_model

from teal_cli.errors import UnsupportedError

_BASE = {"rope_theta": 10000.0, "factor": 4.0}
_LINEAR = {"rope_type": "linear", **_BASE}
_YARN = {"rope_type": "yarn", **_BASE, "original_max_position_embeddings": 64}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_UNSTRETCHED = {"rope_type": "yarn", **_BASE, "original_max_position_embeddings": 128}


def _old_spelling(kind: str, **more: Any) -> Callable[[Made], None]:
    """rope_theta beside rope_scaling, as every config.json before transformers 5 has it."""
    scaling = {"type": kind, "factor": 4.0, **more}
    return on_folder(edit_config(rope_parameters=REMOVED, rope_theta=10000.0, rope_scaling=scaling))


def _folder(
    name: str, rope: Mapping[str, Any], same: Any = None, *steps: Any, **more: Any
) -> Situation:
    own = {"rope_parameters": dict(rope), **more}
    same = same or Logits(prompt=100)
    return Situation(name, same, steps, families=("llama", "mistral", "qwen2"), model=own)


def _short(name: str, **fields: Any) -> Situation:
    """What a config leaves out, or says in another place."""
    families = ("llama", "mistral", "qwen2", "qwen3")
    edits = on_folder(edit_config(**fields))
    return Situation(name, Logits(prompt=100), (edits,), families=families)


STRETCHED = (
    _folder("linear", _LINEAR),
    _folder("linear, spelt the old way", _LINEAR, None, _old_spelling("linear")),
    _folder("yarn, positions stretched", _YARN),
    _folder(
        "yarn, spelt the old way",
        _YARN,
        None,
        _old_spelling("yarn", original_max_position_embeddings=64),
    ),
    _folder("yarn with its own speeds", {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    _folder("yarn with its own attention factor", {**_YARN, "attention_factor": 1.3}),
    # The makers add the scaling and leave max_position_embeddings as it was.
    _folder(
        "yarn beyond max_position_embeddings",
        _UNSTRETCHED,
        Logits(prompt=199),
        max_position_embeddings=128,
    ),
    _folder(
        "yarn beyond max_position_embeddings, spelt the old way",
        _UNSTRETCHED,
        Logits(prompt=199),
        _old_spelling("yarn", original_max_position_embeddings=128),
        max_position_embeddings=128,
    ),
    Situation(
        "an answer beyond max_position_embeddings",
        Answer(prompt="Hi " * 60, options=("-t", "0", "--context", "500")),
        families=("qwen2",),
        model={"max_position_embeddings": 128, "rope_parameters": _UNSTRETCHED},
        chain={"Ċ": {"O": 2.0}, "O": {"K": 2.0}, "K": {"<|im_end|>": 2.0}},
    ),
    Situation(
        "Llama 3's",
        Logits(prompt=100),
        model={"rope_parameters": _LLAMA_3, "max_position_embeddings": 131072},
    ),
    Situation(
        "dynamic, within the context",
        EqualOrRefused(Logits(prompt=100), ("dynamic",)),
        model={
            "rope_parameters": {"rope_type": "dynamic", **_BASE},
            "max_position_embeddings": 256,
        },
    ),
    Situation(
        "longrope, within the original context",
        Logits(prompt=100),
        model={
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.5] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            },
            "max_position_embeddings": 256,
        },
    ),
    _short("no max_position_embeddings", max_position_embeddings=REMOVED),
    _short("no rope", rope_parameters=REMOVED),
    _short("rope_scaling null", rope_parameters=REMOVED, rope_scaling=None, rope_theta=5000.0),
    _short(
        "rope_theta beside rope_parameters",
        rope_parameters={"rope_type": "linear", "factor": 2},
        rope_theta=5000.0,
    ),
    _short(
        "rope_parameters beside rope_scaling",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    _short(
        "Llama 3's, the original context beside it",
        rope_parameters={
            k: v for k, v in _LLAMA_3.items() if k != "original_max_position_embeddings"
        },
        original_max_position_embeddings=64,
        max_position_embeddings=2048,
    ),
    Situation(
        "a sliding window that is switched off",
        Logits(prompt=100),
        (
            on_folder(
                edit_config(
                    use_sliding_window=False,
                    sliding_window=8,
                    max_window_layers=0,
                    layer_types=REMOVED,
                )
            ),
        ),
        families=("qwen2", "qwen3"),
    ),
    Situation("another theta", Logits(prompt=100), families=EVERY, model={"rope_theta": 1e6}),
)


def _gguf(
    name: str, rope: Mapping[str, Any], keys: Mapping[str, Any], same: Any = None, **more: Any
) -> Situation:
    """The oracle is the folder with transformers' words for what llama.cpp documents."""
    own = {"rope_parameters": dict(rope), **more}
    return Situation(
        f"GGUF: {name}",
        same or Logits(prompt=100),
        (as_gguf({f"{{arch}}.rope.{key}": value for key, value in keys.items()}),),
        families=("llama", "qwen2", "qwen3"),
        model=own,
    )


def _divisors(made: Made) -> dict[str, Any]:
    """Llama 3.1's scaling as GGUF stores it: a divisor for each frequency."""
    plain = hf_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    ratio = plain.model.rotary_emb.inv_freq / made.model.model.rotary_emb.inv_freq
    return {"rope_freqs.weight": ratio.numpy().astype(np.float32)}


_YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}

GGUF = (
    _gguf("scale_linear, as files of 2023 have it", _LINEAR, {"scale_linear": 4.0}),
    _gguf("a linear factor", _LINEAR, {"scaling.type": "linear", "scaling.factor": 4.0}),
    # llama.cpp takes a scaling for linear where the file does not name its kind.
    _gguf("a factor without a kind", _LINEAR, {"scaling.factor": 4.0}),
    _gguf(
        "a factor and no scaling",
        {"rope_type": "default", "rope_theta": 10000.0},
        {"scaling.type": "none", "scaling.factor": 4.0},
    ),
    _gguf("yarn", _YARN, _YARN_KEYS),
    _gguf(
        "yarn with its own speeds",
        {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {**_YARN_KEYS, "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0},
    ),
    _gguf(
        "yarn with its own attention factor",
        {**_YARN, "attention_factor": 1.3 * (0.1 * math.log(4.0) + 1.0)},
        {**_YARN_KEYS, "scaling.attn_factor": 1.3},
        EqualOrRefused(Logits(prompt=100), ("attn_factor",)),
    ),
    _gguf(
        "yarn beyond context_length",
        _UNSTRETCHED,
        {**_YARN_KEYS, "scaling.original_context_length": 128},
        max_position_embeddings=512,
    ),
    Situation(
        "GGUF: Llama 3.1's divisors",
        Logits(prompt=100),
        (as_gguf(tensors=_divisors),),
        model={"rope_parameters": _LLAMA_3, "max_position_embeddings": 131072},
    ),
    Situation(
        "GGUF: longrope",
        Refused(UnsupportedError, ("longrope",)),
        (as_gguf({"{arch}.rope.scaling.type": "longrope", "{arch}.rope.scaling.factor": 4.0}),),
    ),
)

ROWS = (*STRETCHED, *GGUF)
