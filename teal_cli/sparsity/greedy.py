"""TEAL's block-wise greedy allocation (arXiv 2408.14690, section 4.3, algorithm 1)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from teal_cli.model.decoder import Decoder, _Pass, threshold
from teal_cli.model.sites import FUSED, PROJECTIONS
from teal_cli.model.weights import LayerWeights, Matrix, floats
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.spool import sweep
from teal_cli.sparsity.workspace import Workspace

# A step is so much of a block's weights: steps of k and v, with a thirtieth of the weights each
# where heads are grouped, still are a third of their own.
_STEP = 0.01
_STEPS = 85
_MOST = 0.99
_WINDOWS = 2
_KEPT = 128  # results; a step makes and reads some 60


def allocate(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    workspace: Workspace,
    reporter: Reporter,
) -> Tensor:
    """The search of every block, float64 [steps + 1, num_hidden_layers, 7]; one for all targets.

    Raises:
        TealError: the disk is full.
    """
    windows = windows[:_WINDOWS]
    layers = decoder.config.num_hidden_layers

    def visit(layer: int, inputs: Iterable[Tensor], found: Tensor) -> Iterator[Tensor]:
        hidden = list(inputs)
        block = _Block(decoder, layer, hidden)
        found.copy_(search(block, profile, _STEP, _STEPS))
        return (decoder.layer(layer, row) for row in hidden)

    found = torch.zeros(layers, _STEPS, len(PROJECTIONS), dtype=torch.float64)
    states = workspace.states("greedy", decoder, windows, depends_on=profile.quantiles.values)
    sweep(
        found,
        states,
        lambda: (decoder.embed(row) for row in windows),
        visit,
        label="greedy search",
        reporter=reporter,
    )
    return torch.cat([torch.zeros_like(found[:, :1]), found], dim=1).transpose(0, 1)


def search(block: _Block, profile: Profile, step: float, steps: int) -> Tensor:
    """Algorithm 1 on one block: each step sparsifies the projection that hurts least.

    Args:
        block: tells the error of thresholds.
        profile: of the dense model.
        step: share of the block's weights that a step adds (alpha); it is a share step / f of a
            projection with the share f of the weights.
        steps: how many.

    Returns:
        Sparsities after each step, float64 [steps, 7].
    """
    shares = profile.shape.weight_shares
    table = torch.zeros_like(profile.quantiles.limit)
    level = table[block.layer]
    rows = []
    for _ in range(steps):
        trials = []
        for index in range(len(PROJECTIONS)):
            before = float(level[index])
            after = min(before + step / float(shares[index]), _MOST)
            if after > before:
                level[index] = after
                error = block.error(profile.quantiles.thresholds(table).float())
                trials.append((error, index, after))
                level[index] = before
        if trials:
            _, index, after = min(trials)
            level[index] = after
        rows.append(level.clone())
    return torch.stack(rows)


class _Block:
    """One layer on a few windows: the last quarter of each sparse, after a dense context.

    Args:
        decoder: the model.
        layer: the block's index.
        hidden: its inputs, [T, hidden_size] a window.
    """

    def __init__(self, decoder: Decoder, layer: int, hidden: list[Tensor]) -> None:
        self.layer = layer
        self._decoder = _Reusing(decoder)
        self._position = len(hidden[0]) * 3 // 4
        self._tails = [row[self._position :] for row in hidden]
        self._caches = []
        for row in hidden:
            cache = decoder.new_cache(len(row))
            decoder.layer(layer, row[: self._position], cache=cache)
            self._caches.append(cache)
        self._dense = self._outputs(None)

    def error(self, thresholds: Tensor) -> float:
        """Mean over tokens of the output error's norm over the hidden axis."""
        pairs = zip(self._outputs(thresholds), self._dense, strict=True)
        return sum(float((ours - dense).float().norm(dim=-1).mean()) for ours, dense in pairs)

    def _outputs(self, thresholds: Tensor | None) -> list[Tensor]:
        return [
            self._decoder.layer(
                self.layer, tail, cache=cache, position=self._position, thresholds=thresholds
            )
            for tail, cache in zip(self._tails, self._caches, strict=True)
        ]


class _Reusing(Decoder):
    """A layer that computes nothing twice: trials differ from the level reached in one threshold.

    That leaves 40 % of the time on SmolLM2-135M, with the same result.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.config, decoder.weights)
        self._wide: dict[str, Tensor] = {}
        self._kept: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()

    def _attention(self, index: int, layer: LayerWeights, x: Tensor, run: _Pass) -> Tensor:
        make = partial(super()._attention, index, layer, x, run)
        if run.thresholds is None:
            return make()
        return self._once((run.cache, *run.thresholds[index, :4].tolist()), make)

    def _project(
        self, fused: str, index: int, x: Tensor, weight: Matrix, bias: Tensor | None, run: _Pass
    ) -> Tensor:
        if run.thresholds is None:
            return super()._project(fused, index, x, weight, bias, run)
        if fused not in self._wide:  # as they are computed with, a copy on a CPU
            self._wide[fused] = floats(weight, x.dtype)
        wide, offsets = self._wide[fused], self.offsets[fused]
        levels = run.thresholds[index].tolist()
        first = PROJECTIONS.index(FUSED[fused][0])
        parts = []
        for number, (a, b) in enumerate(itertools.pairwise(offsets)):
            level = levels[first + number]
            key = (run.cache, fused, number, *levels[:first], level)
            parts.append(self._once(key, partial(_product, x, level, wide[:, a:b])))
        y = torch.cat(parts, dim=-1)
        return y if bias is None else y + bias.to(x.dtype)

    def _once(self, key: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        found = self._kept.pop(key, None)
        self._kept[key] = made = make() if found is None else found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return made


def _product(x: Tensor, level: float, weight: Tensor) -> Tensor:
    return threshold(x, level) @ weight
