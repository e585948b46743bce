"""Allocation by sensitivity: what dropping a projection's smallest inputs does to the loss.

The loss is the divergence from the dense model, and its curvature the Fisher matrix (Martens, arXiv
1412.1193). To second order, zeroing the set S of a projection's inputs at one token costs half the
mean square of the sum over S of g_i x_i, where g is the gradient at that projection's input of the
cross-entropy with tokens drawn from the model itself. The sum is squared, not its terms: q and k
lose two to three times as much at 0.8 as independent channels would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import FUSED, PROJECTIONS, SITE_OF
from teal_cli.model.weights import Matrix, floats
from teal_cli.progress import Reporter
from teal_cli.sparsity.observe import SKIPPED_POSITIONS, collect
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.shape import ModelShape
from teal_cli.sparsity.spool import sweep
from teal_cli.sparsity.workspace import Workspace

LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
_TARGETS = torch.linspace(0, 0.95, 96, dtype=torch.float64)

# In forward passes: 85 s against 23 s on SmolLM2-135M and two cores of an AMD EPYC.
BACKWARD_COST = 4

# Only ratios of costs matter; float16 gradients would vanish below 6e-8.
_LOSS_SCALE = 256.0


def allocate(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    workspace: Workspace,
    reporter: Reporter,
) -> Tensor:
    """The sparsities whose loss is least at each target, float64 [A, num_hidden_layers, 7].

    Raises:
        TealError: the loss or a gradient is not finite, or the disk is full.
    """
    return equalise(costs(decoder, windows, profile, workspace, reporter), profile.shape)


def costs(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    workspace: Workspace,
    reporter: Reporter,
) -> Tensor:
    """What dropping each projection's smallest inputs costs, alone, at LEVELS of sparsity.

    A backward pass that holds one layer's graph at a time: each layer is computed again from
    its input, which waits on disk.

    Returns:
        float64 [num_hidden_layers, 19, 7], in arbitrary units.
    """
    layers = decoder.config.num_hidden_layers
    size = decoder.embed(windows[0]).nbytes * len(windows) * layers
    reporter.note(
        f"sensitivity: backward through {len(windows)} windows, one layer's graph at a time; "
        f"{size / 1e9:.2f} GB of layer inputs wait "
        f"{'in memory' if workspace.folder is None else 'on disk'}"
    )
    # On disk, the pass that made the histograms has left them.
    inputs = workspace.dense_states(decoder, windows, keep_all=True)
    collect(decoder, windows, inputs, label="forward", reporter=reporter)
    shape = (layers, len(PROJECTIONS))
    thresholds = torch.stack(
        [profile.quantiles.thresholds(level.expand(shape)) for level in LEVELS]
    ).float()

    def backward(step: int, gradients: Iterable[Tensor], found: Tensor) -> Iterator[Tensor]:
        layer = layers - 1 - step
        before = inputs.read(layer) if layer else (decoder.embed(row) for row in windows)
        levels = thresholds[:, layer].to(decoder.device)
        for hidden, gradient in zip(before, gradients, strict=True):
            passed, projections = layer_gradients(decoder, layer, hidden, gradient)
            found += _layer_costs(projections, levels).cpu()
            yield passed

    def start() -> Iterator[Tensor]:
        generator = torch.Generator(decoder.device).manual_seed(0)
        for hidden in inputs.read(layers):
            yield _loss_gradient(decoder, hidden, generator)

    found = torch.zeros(layers, len(LEVELS), len(PROJECTIONS), dtype=torch.float64)
    states = workspace.states("gradients", decoder, windows, depends_on=thresholds)
    return sweep(found, states, start, backward, label="backward", reporter=reporter).flip(0)


def equalise(found: Tensor, shape: ModelShape) -> Tensor:
    """Share sparsity out so that one more weight costs the same in every projection.

    Args:
        found: costs as from `costs`, [num_hidden_layers, 19, 7].
        shape: the model's.

    Returns:
        float64 [A, num_hidden_layers, 7] at targets from 0 upwards, met to 1e-9.
    """
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), LEVELS])
    curve = torch.cat([torch.zeros_like(found[:, :1]), found.double()], dim=1)
    slope = curve.diff(dim=1) / levels.diff()[:, None] / shape.weight_shares
    # Noise can bend a curve down; the cheapest weights go first all the same.
    slope = slope.clamp_min(1e-30).cummax(1).values.log().transpose(1, 2).contiguous()
    # Beyond the first and last midpoint the curve goes steeply to no and to full sparsity.
    slope = torch.cat([slope[..., :1] - 20, slope, slope[..., -1:] + 20], dim=-1)
    middles = torch.tensor(0.0, dtype=torch.float64), (levels[1:] + levels[:-1]) / 2
    shares = torch.cat([middles[0][None], middles[1], torch.ones(1, dtype=torch.float64)])
    low = slope.min().expand(len(_TARGETS)).clone()
    high = slope.max().expand(len(_TARGETS)).clone()
    for _ in range(60):
        middle = (low + high) / 2
        table = _shares_below(slope, shares, middle)
        below = shape.weighted(table) < _TARGETS
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    table = _shares_below(slope, shares, high)
    table[0] = 0
    return table


def _shares_below(slope: Tensor, shares: Tensor, level: Tensor) -> Tensor:
    """Where rising curves [L, 7, n] over `shares` [n] reach each level [A]: [A, L, 7]."""
    wanted = level.expand(*slope.shape[:2], -1).contiguous()
    after = torch.searchsorted(slope, wanted).clamp(1, slope.shape[-1] - 1)
    x0, x1 = slope.gather(-1, after - 1), slope.gather(-1, after)
    part = torch.where(x1 > x0, (wanted - x0) / (x1 - x0), 1.0).clamp(0, 1)
    return torch.lerp(shares[after - 1], shares[after], part).permute(2, 0, 1)


def _loss_gradient(decoder: Decoder, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at the last layer's output of a window's cross-entropy with drawn tokens, summed."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        normed = decoder.final_norm(hidden)
    chances = decoder.logits(normed.detach()).softmax(-1)
    if not chances.sum().isfinite():
        raise TealError(
            "the loss of the dense model is not finite",
            hint="The weights overflow in this dtype; try --dtype bfloat16 or float32.",
        )
    drawn = torch.multinomial(chances, 1, generator=generator)
    # Of the cross-entropy at the logits: each token's chance, less 1 for the one that was drawn.
    slope = chances.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=chances.dtype))
    scaled = decoder.logits_gradient(slope.mul_(_LOSS_SCALE).to(normed.dtype))
    (gradient,) = torch.autograd.grad(normed, hidden, scaled)
    return gradient


def layer_gradients(
    decoder: Decoder, layer: int, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients at a dense layer's input and, with the inputs, at its projections'.

    Args:
        decoder: the model.
        layer: the layer's index.
        hidden: its input, [T, hidden_size].
        gradient: the loss's gradient at its output, [T, hidden_size].

    Returns:
        [T, hidden_size], and (x, gradient) [T, channels] in PROJECTIONS order.

    Raises:
        TealError: a gradient is not finite.
    """
    read: list[Tensor] = []

    def project(_: int, fused: str, x: Tensor, weight: Matrix) -> Tensor:
        """The product, of which each projection reads a tensor of its own."""
        whole = floats(weight, x.dtype)
        own = [x.view_as(x) for _ in FUSED[fused]]
        read.extend(own)
        parts = zip(own, itertools.pairwise(decoder.offsets[fused]), strict=True)
        return torch.cat([z @ whole[:, a:b] for z, (a, b) in parts], dim=-1)

    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        out = decoder.layer(layer, hidden, project=project)
        first, *rest = torch.autograd.grad(out, [hidden, *read], gradient)
    if not first.sum(dtype=torch.float32).isfinite():
        raise TealError(
            f"layer {layer}: a gradient is not finite",
            hint="Gradients overflow in this dtype; try --dtype bfloat16 or float32.",
        )
    return first, list(zip((x.detach() for x in read), rest, strict=True))


def _layer_costs(projections: list[tuple[Tensor, Tensor]], levels: Tensor) -> Tensor:
    """Mean over tokens of the squared first-order loss of what each level drops.

    Args:
        projections: (x, gradient) [T, channels] in PROJECTIONS order.
        levels: thresholds [n, 7], ascending.

    Returns:
        float64 [n, 7].
    """
    found = torch.empty(levels.shape, dtype=torch.float64, device=levels.device)
    site = bins = None
    for index, (name, (x, gradient)) in enumerate(zip(PROJECTIONS, projections, strict=True)):
        x, gradient = x[SKIPPED_POSITIONS:].float(), gradient[SKIPPED_POSITIONS:].float()
        if SITE_OF[name] != site:
            site, bins = SITE_OF[name], torch.bucketize(x.abs(), levels[:, index].contiguous())
        assert bins is not None
        sums = torch.zeros(len(x), len(levels) + 1, device=x.device)
        dropped = sums.scatter_add_(1, bins, gradient * x).cumsum(1)[:, :-1]
        found[:, index] = dropped.double().square().mean(0)
    return found
