"""Rotary embedding's numbers, read from a config.json as transformers reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teal_cli.errors import TealError, UnsupportedError

LARGEST = 2**31 - 1  # far beyond any model, and small enough to count with
_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_VARYING = ("dynamic", "su")
# What transformers reads of each.
_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
# Who obeys what transformers reads for no other family of ours.
_PARTIAL, _GROWING = ("phi3",), ("ministral3",)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base `theta` and, for models stretched past their training, the scaling."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope
    truncate: bool = True  # yarn: whole channels begin and end the blend
    divisors: tuple[float, ...] | None = None  # longrope: of each frequency
    partial_rotary_factor: float = 1.0  # share of a head's channels that is rotated
    most_positions: int | None = None  # longrope: beyond them other divisors would hold
    # Queries grow by 1 + this * log(1 + floor(position / original_max_position_embeddings)).
    llama_4_scaling_beta: float | None = None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("type", "truncate", "divisors") or value is None:
                continue
            if not _is_positive(value):
                raise TealError(f"config.json: rope's {name} must be above 0, got {value!r}")
        if not all(map(_is_positive, self.divisors or ())):
            raise TealError("config.json: rope's short_factor holds what is not above 0")
        if self.theta <= 1:  # the frequencies are its negative powers
            raise TealError(f"config.json: rope_theta must be above 1, got {self.theta:g}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise TealError(
                "config.json: rope's low_freq_factor must be below its high_freq_factor"
            )

    def context_length(self, stated: int) -> int:
        """Positions that a config with these max_position_embeddings promises.

        Some authors state the stretched length there, some the original one.
        """
        original = self.original_max_position_embeddings or stated
        if self.most_positions is not None:
            return min(stated, self.most_positions)
        # Llama 3.2's factor of 32 on 8192 is more than the 131072 that it was trained for.
        if self.type == "llama3" and stated > original:
            return stated
        return max(stated, int(min(original * self.factor, LARGEST)))


def _is_positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= LARGEST


def rope_config(raw: Mapping[str, Any]) -> RopeConfig:
    """Rope of a config.json without nulls, in `rope_parameters` or as transformers 4 wrote it.

    Raises:
        UnsupportedError: the frequencies are of a kind that the decoder does not compute.
        TealError, KeyError, TypeError, ValueError: a field is missing or none of its kind.
    """
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope parameters must be an object, got {parameters!r}")
    parameters = {k: v for k, v in parameters.items() if v is not None}
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedError(
            f"rope of its own for each kind of layer ({', '.join(nested)}) is not supported"
        )
    family = raw.get("model_type")
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if family == "phi3" and rope_type in ("su", "yarn"):  # its names of earlier days
        rope_type = "longrope"
    if rope_type not in _TYPES:
        why = ", whose frequencies change with the text's length," if rope_type in _VARYING else ""
        raise UnsupportedError(
            f"rope scaling {rope_type!r}{why} is not supported; teal knows {', '.join(_TYPES)}"
        )
    rotated = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotated != 1 and family not in _PARTIAL:
        raise UnsupportedError(
            f"rope with partial_rotary_factor={rotated} is not supported in a {family}"
        )
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
    common: dict[str, Any] = {"theta": theta, "partial_rotary_factor": rotated}
    stated = raw["max_position_embeddings"]
    if family in _GROWING and (beta := parameters.get("llama_4_scaling_beta")):
        common["llama_4_scaling_beta"] = beta
    if rope_type == "default":
        original = parameters.get("original_max_position_embeddings", stated)
        growing = "llama_4_scaling_beta" in common
        return RopeConfig(**common, original_max_position_embeddings=original if growing else None)
    scaling = {name: parameters[name] for name in _FIELDS[rope_type] if name in parameters}
    original = parameters.get("original_max_position_embeddings")
    if rope_type != "linear":
        original = raw.get("original_max_position_embeddings", original) or stated
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if rope_type in ("yarn", "longrope") and original != stated:
        scaling.setdefault("factor", stated / original)
    if rope_type == "yarn":
        scaling |= _yarn(parameters, scaling)
    if rope_type == "longrope":
        scaling |= _longrope(parameters, scaling)
    if "factor" not in scaling:
        raise KeyError("rope_parameters.factor")
    return RopeConfig(type=rope_type, **common, **scaling)


def _yarn(parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    # 0 means the default too, as in transformers.
    found = {name: parameters[name] for name in ("beta_fast", "beta_slow") if parameters.get(name)}
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim and "attention_factor" not in scaling and "factor" in scaling:
        factor = scaling["factor"]
        found["attention_factor"] = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
    return found


def _longrope(parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    factor, original = scaling.get("factor", 1.0), scaling["original_max_position_embeddings"]
    divisors = tuple(parameters["short_factor"])
    found = {"factor": factor, "divisors": divisors}
    # Beyond the original context every position of a text turns by other divisors, those that are
    # cached too. Equal ones are of any text: GGUF stores Llama 3.1's rope so.
    if divisors != tuple(parameters["long_factor"]):
        found["most_positions"] = original
    if "attention_factor" not in scaling and factor > 1:
        found["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original))
    return found


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature of the attention (arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
