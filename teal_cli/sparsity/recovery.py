"""What a profile holds to win back what sparsity loses: vectors at a few targets.

In between they are interpolated, from no vectors at all at target 0. Beyond the last target there
are none.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor

from teal_cli.model.decoder import Decoder
from teal_cli.sparsity.shape import ModelShape

TARGETS = (0.25, 0.4, 0.5, 0.65)
FIELDS = tuple(entry.name for entry in fields(RecoveryVectors))
BIASES = ("qkv", "o", "gate_up", "down")

# Half a millionth of the largest activations; a profile of an 8B model grows by 3 MB a target.
_STORED = torch.float16


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """Vectors of one method at rising targets, on the CPU.

    The first target is 0, with no biases and the model's own norms. `offsets` are what to add to
    each target for the model that has the vectors to realise it.
    """

    targets: tuple[float, ...]
    offsets: tuple[float, ...]
    vectors: tuple[RecoveryVectors, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def nothing(cls, decoder: Decoder, provenance: Mapping[str, Any]) -> Recovery:
        """What is known of a model before anything is learnt."""
        return cls((0.0,), (0.0,), (own_vectors(decoder),), provenance)

    def reaches(self, target: float) -> bool:
        """Whether there are vectors for a target."""
        return 0 < target <= self.targets[-1] + 1e-9

    def at(self, target: float) -> RecoveryVectors:
        """The vectors of a target; beyond the last one, the last ones."""
        after, part = self._place(target)
        before = self.vectors[after - 1]
        pairs = ((getattr(before, n), getattr(self.vectors[after], n)) for n in FIELDS)
        return RecoveryVectors(*(torch.lerp(a, b, part) for a, b in pairs))

    def asked(self, target: float) -> float:
        """The target to take the method's allocation at, as `Profile.asked`."""
        after, part = self._place(target)
        low, high = self.offsets[after - 1], self.offsets[after]
        return max(target + low + part * (high - low), 0.0)

    def sizes(self, target: float) -> dict[str, list[float]]:
        """How large a target's vectors are, by layer: biases and changes of norms' weights.

        Root mean squares; a norm's changes count in the weights' own.
        """
        found: dict[str, list[float]] = {}
        own, vectors = self.vectors[0], self.at(target)
        for name in FIELDS[:-1]:  # the last norm belongs to no layer
            before = getattr(own, name)
            size = _rms(getattr(vectors, name) - before)
            found[name] = (size if name in BIASES else size / _rms(before)).tolist()
        return found

    def learnt(self, target: float, offset: float, vectors: RecoveryVectors) -> Recovery:
        """This, and what was learnt at one target, in the place of what there was."""
        known = dict(zip(self.targets, zip(self.offsets, self.vectors, strict=True), strict=True))
        known[target] = offset, vectors
        targets = tuple(sorted(known))
        offsets, found = zip(*(known[t] for t in targets), strict=True)
        return Recovery(targets, offsets, found, self.provenance)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: [targets, ...] of each field."""
        return {n: torch.stack([getattr(v, n) for v in self.vectors]).to(_STORED) for n in FIELDS}

    def header(self) -> dict[str, Any]:
        """What a file says of them."""
        return {
            "targets": self.targets,
            "offsets": self.offsets,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def of(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: ModelShape
    ) -> Recovery:
        """The inverse of `header` and `tensors`.

        Raises:
            ValueError: they do not belong together, or to a model of this shape.
        """
        targets = tuple(float(t) for t in header["targets"])
        offsets = tuple(float(o) for o in header["offsets"])
        rising = all(a < b < 1 for a, b in itertools.pairwise(targets))
        if len(targets) < 2 or targets[0] != 0 or not rising or len(offsets) != len(targets):
            raise ValueError("targets of recovery do not rise from 0 to below 1")
        if not all(-1 < offset < 1 for offset in offsets):
            raise ValueError("offsets of recovery are no shares")
        for name, expected in shapes(shape).items():
            if tuple(tensors[name].shape) != (len(targets), *expected):
                raise ValueError(f"recovery's {name} is {tuple(tensors[name].shape)}")
            if not tensors[name].isfinite().all():
                raise ValueError(f"recovery's {name} is not finite")
        columns = (tensors[name].float().unbind() for name in FIELDS)
        vectors = tuple(RecoveryVectors(*row) for row in zip(*columns, strict=True))
        return cls(targets, offsets, vectors, dict(header["provenance"]))

    def _place(self, target: float) -> tuple[int, float]:
        """The entry after a target, and how far the target is from the one before to it."""
        after = min(max(bisect.bisect_left(self.targets, target), 1), len(self.targets) - 1)
        if after == 0:
            raise ValueError("nothing has been learnt")
        low, high = self.targets[after - 1], self.targets[after]
        return after, min((target - low) / (high - low), 1.0)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()


def shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shape of each field of a model's vectors."""
    q, k, v, o, gate, up, down = (outputs for _, outputs in shape.projections)
    layers, hidden = shape.num_hidden_layers, shape.projections[0][0]
    biases = {"qkv": q + k + v, "o": o, "gate_up": gate + up, "down": down}
    norms = ("input_layernorm", "post_attention_layernorm")
    found: dict[str, tuple[int, ...]] = {name: (layers, n) for name, n in biases.items()}
    return found | dict.fromkeys(norms, (layers, hidden)) | {"norm": (hidden,)}


def own_vectors(decoder: Decoder) -> RecoveryVectors:
    """Vectors that change nothing, on the CPU: no biases, and the model's own norms."""
    weights = decoder.weights
    zeros = {n: torch.zeros(s) for n, s in shapes(ModelShape.of(decoder.config)).items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows = [getattr(layer, name).float().cpu() for layer in weights.layers]
        zeros[name] = torch.stack(rows)
    return RecoveryVectors(**(zeros | {"norm": weights.norm.float().cpu()}))
