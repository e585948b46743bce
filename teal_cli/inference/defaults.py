"""What a chat does where the user does not say: by the model's size and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.sampling import Sampling
from teal_cli.model.config import ModelConfig

# Below this size a model loses the thread sooner, to sparsity as to temperature.
_SMALL_MODEL_WEIGHTS = 1_000_000_000
_LARGEST = 1e9  # no temperature or top-k is beyond it


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What chat does where neither the user nor the model's author says otherwise."""

    sparsity: float
    temperature: float
    top_p: float


def chat_defaults(config: ModelConfig) -> ChatDefaults:
    """Defaults by size.

    40 % costs Llama-2-7B 3 % of perplexity and Llama-3-8B 6 % (TEAL, arXiv 2408.14690, table 1);
    on SmolLM2-135M it costs 17 to 20 % and 25 % costs 3 %, so a small model gets 25 %. 0.2 is
    the temperature that SmolLM2's authors use; 0.7 is what larger chat models are tuned for.
    """
    per_layer = sum(inputs * outputs for inputs, outputs in config.projection_shapes.values())
    if per_layer * config.num_hidden_layers < _SMALL_MODEL_WEIGHTS:
        return ChatDefaults(sparsity=0.25, temperature=0.2, top_p=0.9)
    return ChatDefaults(sparsity=0.4, temperature=0.7, top_p=0.9)


def sampling_defaults(
    generation_defaults: Mapping[str, Any], defaults: ChatDefaults
) -> dict[str, Any]:
    """Temperature, top-k and top-p: the model's own where its author chose any, else ours.

    Args:
        generation_defaults: the content of generation_config.json, perhaps empty.
        defaults: what to fall back on.

    Raises:
        TealError: the author's choice is none that can be followed.
    """
    names = ("temperature", "top_k", "top_p")
    chosen = {n: generation_defaults[n] for n in names if generation_defaults.get(n) is not None}
    if not generation_defaults.get("do_sample") or not chosen:
        return {"temperature": defaults.temperature, "top_p": defaults.top_p}
    for name, value in chosen.items():
        number = isinstance(value, int if name == "top_k" else (int, float))
        if not number or isinstance(value, bool) or not -_LARGEST < value < _LARGEST:
            raise TealError(f"the model's generation_config.json has {name} {value!r}")
    chosen = {"temperature": 1.0, **chosen}
    try:
        Sampling(**chosen)
    except UsageError as error:
        raise TealError(f"the model's generation_config.json is wrong: {error}") from None
    return chosen
