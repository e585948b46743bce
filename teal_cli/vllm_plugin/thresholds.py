"""What an exported model's `quantization_config` holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_FORMAT = 1
# The projections that stand side by side in vLLM's layers.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


class Place(NamedTuple):
    """A linear layer of the model."""

    layer: int
    projections: tuple[str, ...]  # that stand side by side in it

    @classmethod
    def of(cls, prefix: str) -> Place | None:
        """By its name in the model; None is one that is none of a decoder layer's."""
        found = _LAYER.fullmatch(prefix)
        if found is None:
            return None
        return cls(int(found[1]), _FUSED.get(found[2], (found[2],)))


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What the config holds: by projection, one for each layer; empty is dense."""

    by_projection: Mapping[str, Sequence[float]]
    vectors: bool  # whether they came with vectors of recovery, which lie in a file
    max_sequences: int

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Thresholds:
        """Read a `quantization_config`.

        Raises:
            ValueError: it is of another format, or damaged.
        """
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"quantization_config has format {content.get('format')!r}, this version of teal "
                f"reads {_FORMAT}: export the model again with it"
            )
        found, most = content.get("thresholds") or {}, content.get("max_sequences")
        sizes = {len(found[name]) for name in _PROJECTIONS if name in found}
        if found and (set(found) != set(_PROJECTIONS) or len(sizes) != 1):
            raise ValueError(
                "quantization_config is damaged: it must have thresholds of "
                f"{', '.join(_PROJECTIONS)} for every layer"
            )
        if not isinstance(most, int) or most < 1:
            raise ValueError("quantization_config is damaged: max_sequences must be 1 or more")
        return cls(found, bool(content.get("vectors")), most)

    def of(self, place: Place) -> tuple[float, ...] | None:
        """Those of a linear layer, a number for each projection in it; None is dense."""
        if any(name not in self.by_projection for name in place.projections):
            return None
        return tuple(self.by_projection[name][place.layer] for name in place.projections)
