"""TEAL's block-wise greedy allocation (arXiv 2408.14690, section 4.3, algorithm 1)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder, Pass, threshold
from teal_cli.model.sites import FUSED, PROJECTIONS
from teal_cli.model.weights import Matrix, floats
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

    Nothing is computed twice: trials differ from the level reached in one threshold. That leaves
    40 % of the time on SmolLM2-135M, with the same result.

    Args:
        decoder: the model.
        layer: the block's index.
        hidden: its inputs, [T, hidden_size] a window.
    """

    def __init__(self, decoder: Decoder, layer: int, hidden: list[Tensor]) -> None:
        self.layer = layer
        self._decoder = decoder
        self._position = len(hidden[0]) * 3 // 4
        self._tails = [row[self._position :] for row in hidden]
        self._wide: dict[str, Tensor] = {}
        self._kept: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()
        self._caches = []
        self._dense = []
        for row, tail in zip(hidden, self._tails, strict=True):
            cache = decoder.new_cache(len(row))
            decoder.layer(layer, row[: self._position], cache=cache)
            self._caches.append(cache)
            self._dense.append(decoder.layer(layer, tail, cache=cache, position=self._position))

    def error(self, thresholds: Tensor) -> float:
        """Mean over tokens of the output error's norm over the hidden axis."""
        levels = thresholds[self.layer].tolist()
        windows = zip(self._tails, self._caches, self._dense, strict=True)
        return sum(
            float((self._sparse(tail, cache, levels) - dense).float().norm(dim=-1).mean())
            for tail, cache, dense in windows
        )

    def _sparse(self, tail: Tensor, cache: KVCache, levels: list[float]) -> Tensor:
        """The block's output for a window, at a threshold for each projection."""
        project = partial(self._project, cache, levels)
        run = Pass(cache=cache, position=self._position, project=project)
        attention = partial(self._decoder.attention, self.layer, tail, run)
        hidden = tail + self._once((cache, *levels[:4]), attention)
        return hidden + self._decoder.mlp(self.layer, hidden, run)

    def _project(
        self, cache: KVCache, levels: list[float], _: int, fused: str, x: Tensor, weight: Matrix
    ) -> Tensor:
        if fused not in self._wide:  # as they are computed with, a copy on a CPU
            self._wide[fused] = floats(weight, x.dtype)
        wide, first = self._wide[fused], PROJECTIONS.index(FUSED[fused][0])
        parts = []
        for number, (a, b) in enumerate(itertools.pairwise(self._decoder.offsets[fused])):
            level = levels[first + number]
            key = (cache, fused, number, *levels[:first], level)
            parts.append(self._once(key, partial(_product, x, level, wide[:, a:b])))
        return torch.cat(parts, dim=-1)

    def _once(self, key: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        found = self._kept.pop(key, None)
        self._kept[key] = made = make() if found is None else found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return made


def _product(x: Tensor, level: float, weight: Tensor) -> Tensor:
    return threshold(x, level) @ weight
