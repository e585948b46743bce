"""Histograms of what every layer and site sees, of the dense model or of a sparse one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import SITES
from teal_cli.progress import Reporter
from teal_cli.sparsity import histogram
from teal_cli.sparsity.spool import States, sweep

# The first positions of a context are attention sinks (arXiv 2309.17453): activations there are
# up to a thousand times the usual ones, and decoding after a prompt never sees them.
SKIPPED_POSITIONS = 4


def collect(
    decoder: Decoder,
    windows: Tensor,
    states: States,
    *,
    thresholds: Tensor | None = None,
    label: str,
    reporter: Reporter,
) -> Tensor:
    """Histograms of abs(x) at every layer and site, the first positions left out.

    Args:
        decoder: the model.
        windows: int64 [N, T].
        states: where hidden states wait between layers.
        thresholds: [num_hidden_layers, 7] float32 of the sparse model; None is the dense one.
        label: names the work.
        reporter: follows the layers.

    Returns:
        int64 [num_hidden_layers, 4, BINS] on the CPU.

    Raises:
        TealError: an activation is not finite, or the disk is full.
    """

    def visit(layer: int, inputs: Iterable[Tensor], counts: Tensor) -> Iterator[Tensor]:
        def observe(_: int, site: str, x: Tensor) -> None:
            seen = x[SKIPPED_POSITIONS:]
            # The sum tells as much as isfinite() does of every element, in a tenth of the time.
            if not seen.sum(dtype=torch.float32).isfinite():
                raise TealError(
                    f"layer {layer}, site {site}: an activation is not finite",
                    hint="The weights overflow in this dtype; try --dtype bfloat16 or float32.",
                )
            counts[SITES.index(site)] += histogram.count(seen).cpu()

        for hidden in inputs:
            yield decoder.layer(
                layer,
                hidden,
                thresholds=thresholds,
                sparse_from=SKIPPED_POSITIONS,
                observe=observe,
            )

    counts = torch.zeros(
        decoder.config.num_hidden_layers, len(SITES), histogram.BINS, dtype=torch.int64
    )
    return sweep(
        counts,
        states,
        lambda: (decoder.embed(row) for row in windows),
        visit,
        label=label,
        reporter=reporter,
    )
