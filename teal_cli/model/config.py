"""A model's architecture, read from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.errors import MissingError, TealError
from teal_cli.model.families import FAMILIES, MULTIPLIERS, Family, family_of, language_model
from teal_cli.model.rope_config import LARGEST, RopeConfig, rope_config
from teal_cli.store.local import read_regular

DAMAGED = "Download the model again."
# Where null says something other than leaving the field out.
_NULLABLE = ("num_key_value_heads", "sliding_window")
_MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that define a decoder, under their Hugging Face names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # one a layer; None attends to everything
    # In what follows a model may depart from Llama; each is Llama's unless it is given.
    hidden_act: str = "silu"
    layers_without_rope: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # of the scores; None is head_dim ** -0.5
    residual_multiplier: float = 1.0  # of what attention and MLP add
    logits_scaling: float = 1.0  # a divisor

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            most = _MOST_LAYERS if name == "num_hidden_layers" else LARGEST
            if not 1 <= value <= most:
                raise TealError(
                    f"config.json: {name} must be at least 1 and at most {most}, got {value}"
                )
        if not 0 <= self.rms_norm_eps < 1:
            raise TealError(f"config.json: rms_norm_eps is {self.rms_norm_eps}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise TealError(
                f"config.json: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise TealError(f"config.json: head_dim must be even, got {self.head_dim}")
        for name in MULTIPLIERS:
            if (value := getattr(self, name)) is not None and not 0 < value <= LARGEST:
                raise TealError(f"config.json: {name} must be above 0, got {value}")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise TealError(
                f"config.json: rope would rotate {self.rotary_dim} of {self.head_dim} channels"
            )
        if self.rope.divisors is not None and 2 * len(self.rope.divisors) != self.rotary_dim:
            raise TealError(
                f"config.json: rope has {len(self.rope.divisors)} frequencies, "
                f"a head of {self.head_dim} needs {self.rotary_dim // 2}"
            )

    @property
    def context_length(self) -> int:
        """Positions that the model was made for, stretched rope included."""
        return self.rope.context_length(self.max_position_embeddings)

    @property
    def fused(self) -> bool:
        """Whether a Hugging Face checkpoint has q, k, v in one tensor, gate and up in another."""
        return FAMILIES[self.model_type].fused

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated, the first ones, in layers with rope."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """The same of each layer, 0 without rope."""
        return tuple(
            0 if index in self.layers_without_rope else self.rotary_dim
            for index in range(self.num_hidden_layers)
        )

    @property
    def attention_scale(self) -> float:
        """Factor on the scores of attention."""
        given = self.attention_multiplier
        return self.head_dim**-0.5 if given is None else given

    @property
    def q_size(self) -> int:
        """Width of the query projection, and of the attention output."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each of the seven projections, in their fixed order."""
        h, i = self.hidden_size, self.intermediate_size
        return {
            "q": (h, self.q_size),
            "k": (h, self.kv_size),
            "v": (h, self.kv_size),
            "o": (self.q_size, h),
            "gate": (h, i),
            "up": (h, i),
            "down": (i, h),
        }

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of a layer's four matrices: projections side by side."""
        h, i = self.hidden_size, self.intermediate_size
        return {
            "qkv": (h, self.q_size + 2 * self.kv_size),
            "o": (self.q_size, h),
            "gate_up": (h, 2 * i),
            "down": (i, h),
        }

    @property
    def site_sizes(self) -> dict[str, int]:
        """Channels at each of the four input sites, in their fixed order."""
        return {
            "attn_in": self.hidden_size,
            "attn_out": self.q_size,
            "mlp_in": self.hidden_size,
            "mlp_act": self.intermediate_size,
        }

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a config.json.

        Raises:
            MissingError: there is no such file.
            TealError: it is not JSON, or a field is missing or out of range.
            UnsupportedError: the architecture is not one that the decoder covers.
        """
        return cls.from_dict(read_object(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build the config from the content of a config.json (either way of writing rope)."""
        raw = language_model(raw)
        family = family_of(raw)
        given = {k: v for k, v in raw.items() if v is not None or k in _NULLABLE}
        try:
            return cls._parse(given, family)
        except KeyError as error:
            raise TealError(f"config.json lacks {error.args[0]!r}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise TealError(f"config.json: {error}") from None

    @classmethod
    def _parse(cls, raw: Mapping[str, Any], family: Family) -> ModelConfig:
        raw = {**family.assumed, **raw}
        heads = int(raw["num_attention_heads"])
        hidden_size = int(raw["hidden_size"])
        layers = int(raw["num_hidden_layers"])
        bias = family.attention_bias and bool(raw.get("attention_bias", False))
        return cls(
            model_type=raw["model_type"],
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_key_value_heads(raw, heads),
            head_dim=int(raw.get("head_dim") or hidden_size // max(heads, 1)),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=rope_config(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            qk_norm=family.qk_norm,
            sliding_windows=_sliding_windows(raw, family, layers),
            layers_without_rope=_layers_without_rope(raw, layers) if family.no_rope_layers else (),
            **(_multipliers(raw) if family.multipliers else {}),
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a model holds.

    Raises:
        MissingError: there is no such file.
        TealError: it is not JSON, no object, no regular file, or too large.
    """
    try:
        content = json.loads(read_regular(path).decode())
    except FileNotFoundError:
        raise MissingError(
            f"no {path.name} in {path.parent}",
            hint="Name a folder that holds a Hugging Face model.",
        ) from None
    except (ValueError, RecursionError) as error:
        raise TealError(f"{path} is not valid JSON: {error}", hint=DAMAGED) from None
    if not isinstance(content, dict):
        raise TealError(f"{path} does not hold a JSON object", hint=DAMAGED)
    return content


def _key_value_heads(raw: Mapping[str, Any], heads: int) -> int:
    """Absent means the family's default; null means one for each attention head."""
    count = raw.get("num_key_value_heads")
    return heads if count is None else int(count)


def _multipliers(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(raw[name]) for name in MULTIPLIERS if name in raw}


def _layers_without_rope(raw: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Those where `no_rope_layers` has a 0; without it, every fourth or so."""
    interval = int(raw.get("no_rope_layer_interval", 4))
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        rotated = [(index + 1) % interval for index in range(layers)]
    if len(rotated) < layers:
        raise ValueError(f"no_rope_layers names {len(rotated)} layers of {layers}")
    return tuple(index for index, has_rope in enumerate(rotated[:layers]) if not has_rope)


def _sliding_windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if family.windows is None or not window:
        return (None,) * layers
    if family.windows == "all":  # transformers ignores layer_types here
        return (int(window),) * layers
    if not raw.get("use_sliding_window", False):
        return (None,) * layers
    types = raw.get("layer_types")
    if types is None:
        limited: Collection[int] = range(int(raw.get("max_window_layers", 28)), layers)
        if family.no_rope_layers:
            limited = _layers_without_rope(raw, layers)
        types = ["sliding_attention" if i in limited else "full_attention" for i in range(layers)]
    if len(types) < layers:
        raise ValueError(f"layer_types names {len(types)} layers of {layers}")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types[:layers])
