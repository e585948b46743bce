"""The product of the channels above a threshold, for a few inputs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def sparse_product(
    rows: Tensor,
    widths: Sequence[int],
    thresholds: Tensor,
    *,
    factor: Tensor | None,
    bias: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """What multiplies x [M, K] to [M, N] in the dtype of x, each row with its own survivors.

    Args:
        rows: [K, N], contiguous; its device says which kernel it is.
        widths: columns of the P projections that stand side by side in it.
        thresholds: [P] float32 on that device, as are the others.
        factor: [K] float32, of x before it is compared with them.
        bias: [N] float32, added to the product.
    """
    if rows.device.type != "cpu":
        from teal_kernels.gpu.linear import Linear

        return Linear(rows, widths, thresholds, factor=factor, bias=bias)
    from teal_kernels.cpu import Projection

    projection = Projection([rows], widths)

    def on_cpu(x: Tensor) -> Tensor:
        wide = x.float() if factor is None else x.float() * factor
        y = projection(0, wide, thresholds)
        return (y if bias is None else y + bias).to(x.dtype)

    return on_cpu
