"""A profile: what calibration learnt about one model, and the thresholds that follow from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import PROJECTIONS, SITES
from teal_cli.sparsity.histogram import BINS
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.recovery import Recovery
from teal_cli.sparsity.setting import Setting, check_target
from teal_cli.sparsity.shape import ModelShape
from teal_cli.suggestions import did_you_mean, quoted
from teal_cli.version import __version__

_KIND, _SCHEMA = "profile", 4
_READABLE = (3, _SCHEMA)  # 3 has no vectors of recovery
# Prefixes of the tensors that hold what belongs to a method.
_ALLOCATION, _OFFSETS, _RECOVERY = "allocation.", "offsets.", "recovery."

METHODS = ("sensitivity", "greedy", "uniform")  # the best one first

# Targets that are refined on the sparse model; in between, offsets are interpolated.
REFINED_TARGETS = (0.4, 0.5, 0.65, 0.8)


def check_method(method: str) -> None:
    """Make sure that a name is a method's, whether or not a profile has it.

    Raises:
        UsageError: it is not.
    """
    if method not in METHODS:
        raise UsageError(
            f"there is no method {quoted(method)}",
            hint=f"{did_you_mean(method, METHODS)}There are: {', '.join(METHODS)}.",
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Distributions of abs(x) at every layer and site, and ways to share sparsity out.

    `allocations` maps a method to the sparsities [A, num_hidden_layers, 7] that it gives the
    projections, in A steps from nothing to the most that it reaches. The method `uniform`
    (TEAL, arXiv 2408.14690, section 4.3) needs none: every projection gets the same.

    `offsets` maps a method to [REFINED_TARGETS]: what to add to a target for the sparse model to
    realise it. A method without offsets gets thresholds that are right on dense activations.

    `recovery` maps a method to the vectors that were learnt for it.
    """

    model: str
    fingerprint: str | None  # of the checkpoint; None fits any checkpoint of this shape
    shape: ModelShape
    quantiles: Quantiles
    counts: Tensor | None = None  # int64 [num_hidden_layers, 4, BINS], where calibrated here
    allocations: Mapping[str, Tensor] = field(default_factory=dict)
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    recovery: Mapping[str, Recovery] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """The allocation methods that this profile has, the best one first."""
        return (*self.allocations, "uniform")

    @property
    def quick(self) -> bool:
        """Whether it was made in a hurry, from few windows, to be replaced by a better one."""
        return bool(self.provenance.get("quick"))

    @property
    def default_method(self) -> str:
        """The best allocation method that this profile has."""
        return self.methods[0]

    def thresholds(self, sparsity: float, method: str | None = None) -> Tensor:
        """Thresholds for a model-wide target sparsity, weighted by the weights each input feeds.

        Args:
            sparsity: target in [0, 1); 0 skips exact zeros only.
            method: one of `methods`, by default the best.

        Returns:
            float32 [num_hidden_layers, 7], projections in PROJECTIONS order.

        Raises:
            UsageError: the sparsity is out of range, or there is no such method.
            TealError: the method does not reach the sparsity.
        """
        check_target(sparsity)
        method = method or self.default_method
        return self.thresholds_at(self.asked(sparsity, method), method)

    def setting(
        self, sparsity: float, method: str | None = None, *, recover: bool = True
    ) -> Setting:
        """What puts a target sparsity on the model; arguments and errors as `thresholds`.

        With the vectors that were learnt for it, where there are any and `recover` is not off.
        """
        check_target(sparsity)
        method = method or self.default_method
        recovery = self.recovery.get(method) if recover else None
        if recovery is None or not recovery.reaches(sparsity):
            return Setting(method, sparsity, self.thresholds(sparsity, method))
        thresholds = self.thresholds_at(recovery.asked(sparsity), method)
        return Setting(method, sparsity, thresholds, recovery.at(sparsity))

    def recovered(self, method: str, recovery: Recovery) -> Profile:
        """This profile with the vectors of one method."""
        return dataclasses.replace(self, recovery={**self.recovery, method: recovery})

    def thresholds_at(self, asked: float, method: str) -> Tensor:
        """As `thresholds`, of the allocation at a target without any offset."""
        return self.quantiles.thresholds(self.allocation(asked, method)).float()

    def asked(self, sparsity: float, method: str) -> float:
        """The target to take a method's allocation at, for the sparse model to realise `sparsity`.

        Offsets grow with its square up to the first refined target.
        """
        if method not in self.offsets:
            return sparsity
        offsets = self.offsets[method].tolist()
        if sparsity <= REFINED_TARGETS[0]:
            offset = offsets[0] * (sparsity / REFINED_TARGETS[0]) ** 2
        else:
            offset = float(numpy.interp(sparsity, REFINED_TARGETS, offsets))
        return max(sparsity + offset, 0.0)

    def allocation(self, sparsity: float, method: str) -> Tensor:
        """The sparsity of each projection at a target, float64 [num_hidden_layers, 7].

        Raises:
            UsageError: there is no such method.
            TealError: the method does not reach the sparsity.
        """
        rows = self._rows(method)
        totals = self.shape.weighted(rows)
        if sparsity > totals[-1] + 1e-9:  # a mean of equal numbers rounds
            raise TealError(
                f"the {method} allocation of {self.model} ends at sparsity {totals[-1]:.2f}",
                hint="Ask for less, or for --method uniform." if method != "uniform" else None,
            )
        after = int(torch.searchsorted(totals, torch.tensor(sparsity, dtype=torch.float64)))
        if after in (0, len(totals)):
            return rows[min(after, len(totals) - 1)]
        part = (sparsity - totals[after - 1]) / (totals[after] - totals[after - 1])
        return torch.lerp(rows[after - 1], rows[after], part)

    def reach(self, method: str) -> float:
        """The largest target that a method has an allocation for."""
        return float(self.shape.weighted(self._rows(method))[-1])

    def sparsity_at(self, thresholds: Tensor) -> Tensor:
        """The share of inputs that thresholds [num_hidden_layers, 7] skip, same shape, float64.

        On the calibration's dense activations: a sparse model's own can differ.
        """
        return self.quantiles.sparsity(thresholds)

    def model_sparsity(self, sparsity: Tensor) -> float:
        """The model-wide sparsity of a [num_hidden_layers, 7] table, weighted by weights."""
        return float(self.shape.weighted(sparsity))

    def check(self, config: ModelConfig, fingerprint: str | None = None) -> None:
        """Make sure that this profile belongs to a model.

        Raises:
            TealError: it is another model's.
        """
        hint = "Make one for this model with: teal calibrate --force"
        if self.shape != ModelShape.of(config):
            raise TealError(
                f"the profile of {self.model} is for a model of another shape", hint=hint
            )
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise TealError(
                f"the profile of {self.model} was made with other weights than these", hint=hint
            )

    def save(self, path: Path) -> None:
        """Write the profile, atomically."""
        from safetensors.torch import save

        from teal_cli.store import artifacts

        tensors = {_ALLOCATION + name: table.float() for name, table in self.allocations.items()}
        tensors |= {_OFFSETS + name: table.float() for name, table in self.offsets.items()}
        for method, recovery in self.recovery.items():
            found = recovery.tensors().items()
            tensors |= {f"{_RECOVERY}{method}.{name}": tensor for name, tensor in found}
        if self.counts is not None:
            tensors["counts"] = self.counts
        else:
            tensors["shares"] = self.quantiles.shares
            tensors["values"] = self.quantiles.values
        header = {
            "kind": _KIND,
            "schema": _SCHEMA,
            "teal": __version__,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "num_hidden_layers": self.shape.num_hidden_layers,
            "projections": self.shape.projections,
            "methods": list(self.allocations),
            "refined": list(self.offsets),
            "recovery": {method: found.header() for method, found in self.recovery.items()},
            "provenance": dict(self.provenance),
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        artifacts.atomic_write(path, save(tensors, metadata={"teal": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile.

        Raises:
            MissingError: there is none.
            TealError: the file is damaged, or from another version of teal.
        """
        from safetensors import SafetensorError, safe_open

        remake = "Make it again with: teal calibrate --force"
        if not path.is_file():
            raise MissingError(f"no profile at {path}", hint="Make one with: teal calibrate")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["teal"])
                if header["kind"] != _KIND or header["schema"] not in _READABLE:
                    raise TealError(
                        f"{path} was written by another version of teal ({header['teal']})",
                        hint=remake,
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _from_parts(header, tensors)
        except (
            SafetensorError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise TealError(f"the profile {path} is damaged: {error}", hint=remake) from None

    def _rows(self, method: str) -> Tensor:
        """A method's allocations from nothing upwards, float64 [A, num_hidden_layers, 7]."""
        limit = self.quantiles.limit
        if method == "uniform":
            return torch.stack([torch.zeros_like(limit), limit.min().expand_as(limit)])
        if method not in self.allocations:
            check_method(method)
            raise UsageError(
                f"the profile of {self.model} has no allocation {method!r}",
                hint=f"It has: {', '.join(self.methods)}. "
                f"Add one with: teal calibrate {self.model} --method {method}",
            )
        # A published search may ask for more than the published histograms can tell.
        return torch.minimum(self.allocations[method].double(), limit)


def _from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Profile:
    shape = ModelShape(
        int(header["num_hidden_layers"]), tuple((int(i), int(o)) for i, o in header["projections"])
    )
    layers = shape.num_hidden_layers
    counts = tensors.get("counts")
    if counts is not None:
        _check("counts", counts, (layers, len(SITES), BINS))
        if counts.dtype != torch.int64 or not (counts.sum(-1) > 0).all():
            raise ValueError("counts are no histograms")
        quantiles = Quantiles.from_counts(counts)
    else:
        points = tensors["shares"].shape[-1]
        for name in ("shares", "values"):
            _check(name, tensors[name], (layers, len(SITES), points))
            if not (tensors[name].diff() >= 0).all():
                raise ValueError(f"{name} do not ascend")
        quantiles = Quantiles(tensors["shares"], tensors["values"])
    allocations = {name: tensors[_ALLOCATION + name] for name in header["methods"]}
    for name, table in allocations.items():
        _check(name, table, (max(len(table), 1), layers, len(PROJECTIONS)))
        if not (table.diff(dim=0) >= 0).all() or not (table <= 1).all():
            raise ValueError(f"{name} does not rise to at most 1")
    offsets = {name: tensors[_OFFSETS + name] for name in header["refined"]}
    for name, table in offsets.items():
        _check(name, table, (len(REFINED_TARGETS),), least=-1)
    recovery = {
        method: Recovery.of(found, _below(f"{_RECOVERY}{method}.", tensors), shape)
        for method, found in header.get("recovery", {}).items()
    }
    fingerprint = header["fingerprint"]
    if not isinstance(fingerprint, str | None):
        raise TypeError("its fingerprint is no text")
    return Profile(
        model=str(header["model"]),
        fingerprint=fingerprint,
        shape=shape,
        quantiles=quantiles,
        counts=counts,
        allocations=allocations,
        offsets=offsets,
        recovery=recovery,
        provenance=dict(header["provenance"]),
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _check(name: str, tensor: Tensor, expected: tuple[int, ...], *, least: float = 0) -> None:
    """Make sure of a tensor's shape, and that it holds finite numbers of at least `least`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {expected}")
    if not tensor.isfinite().all() or not (tensor >= least).all():
        raise ValueError(f"{name} holds numbers that are none of its kind")
