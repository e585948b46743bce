"""What a chat does where the user does not say: by the model's size and its files."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.sampling import Sampling
from teal_cli.model.config import ModelConfig

# Below this size a model loses the thread sooner, to sparsity as to temperature.
_SMALL_MODEL_WEIGHTS = 1_000_000_000
_LARGEST = 1e9  # no temperature, top-k or penalty is beyond it
_DRAWING = ("temperature", "top_k", "top_p", "min_p")  # settings that a greedy answer does not use
# What transformers draws with where an author who wants sampling names nothing else
# (GenerationConfig._get_default_generation_params).
_DRAWN_WITH = {"temperature": 1.0, "top_k": 50}

# What else of transformers' settings changes the text, with the value that changes nothing; those
# of the second table only where tokens are drawn.
_LEFT_OUT = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "force_words_ids": None,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}
_LEFT_OUT_DRAWING = {"epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None, "typical_p": 1}


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What chat does where neither the user nor the model's author says otherwise."""

    sparsity: float
    temperature: float
    top_p: float


def chat_defaults(config: ModelConfig) -> ChatDefaults:
    """Defaults by size.

    40 % costs Llama-2-7B 3 % of perplexity and Llama-3-8B 6 % (TEAL, arXiv 2408.14690, table 1);
    on SmolLM2-135M it costs 17 to 20 % and 25 % costs 3 %, so a small model gets 25 %, and always
    its likeliest token: at a temperature of 0.2 SmolLM2-135M names another capital of France than
    Paris with some seeds, dense too. 0.7 is what larger chat models are tuned for.
    """
    per_layer = sum(inputs * outputs for inputs, outputs in config.projection_shapes.values())
    if per_layer * config.num_hidden_layers < _SMALL_MODEL_WEIGHTS:
        return ChatDefaults(sparsity=0.25, temperature=0.0, top_p=0.9)
    return ChatDefaults(sparsity=0.4, temperature=0.7, top_p=0.9)


def left_out(generation_defaults: Mapping[str, Any]) -> list[str]:
    """What a generation_config.json asks for that changes the text and that teal has not."""
    neutral = _LEFT_OUT | (_LEFT_OUT_DRAWING if generation_defaults.get("do_sample") else {})
    return [
        f"{name} {reprlib.repr(generation_defaults[name])}"
        for name, value in neutral.items()
        if generation_defaults.get(name) not in (None, [], {}, value)
    ]


def stop_texts(generation_defaults: Mapping[str, Any]) -> list[str]:
    """The texts at which an answer ends by a generation_config.json.

    Raises:
        TealError: they are no texts.
    """
    stored = generation_defaults.get("stop_strings") or []
    texts = [stored] if isinstance(stored, str) else stored
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _unusable("stop_strings", stored, "stop")
    return texts


def sampling_defaults(
    generation_defaults: Mapping[str, Any], defaults: ChatDefaults, given: Collection[str] = ()
) -> dict[str, Any]:
    """Settings of `Sampling`: the model's own where its author chose sampling, else ours.

    Args:
        generation_defaults: the content of generation_config.json, perhaps empty.
        defaults: what to fall back on.
        given: the settings that the user decides; what is stored of these is not looked at.

    Raises:
        TealError: the author's choice is none that can be followed.
    """
    stored = {name: value for name, value in generation_defaults.items() if value is not None}
    sample = stored.get("do_sample")
    if sample not in (None, True, False):
        if "temperature" not in given:
            raise _unusable("do_sample", sample, "temperature")
        sample = None
    names: tuple[str, ...] = ("repetition_penalty",)
    chosen: dict[str, Any]
    if sample:
        chosen, names = _DRAWN_WITH, (*names, *_DRAWING)
    else:
        temperature = defaults.temperature if sample is None else 0.0
        chosen = {"temperature": temperature, "top_p": defaults.top_p}
    own = {name: stored[name] for name in names if name in stored and name not in given}
    for name, value in own.items():
        number = isinstance(value, int if name == "top_k" else (int, float))
        if not number or isinstance(value, bool) or not -_LARGEST < value < _LARGEST:
            raise _unusable(name, value, name)
        try:
            Sampling(**{name: value})
        except UsageError as error:
            raise _unusable(name, value, name) from error
    return chosen | own


def _unusable(name: str, value: Any, setting: str) -> TealError:
    """The error for a stored value; the option of a setting takes its place."""
    return TealError(
        f"the model's generation_config.json has {name} {reprlib.repr(value)}",
        hint=f"Say what you want with --{setting.replace('_', '-')}.",
    )
