# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""One projection that stands alone: for engines whose other operations are their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal_kernels.gpu.launch import DeviceClass, linear_launch
from teal_kernels.gpu.products import _words
from teal_kernels.gpu.stored import Stored
from teal_kernels.gpu.tiles import Matrix, Tile, _accumulate, _columns
from teal_kernels.quantized import QuantizedMatrix
from teal_kernels.tensors import bits_of


@triton.jit(do_not_specialize_on_alignment=["thresholds_ptr"])
def linear_kernel(
    y_ptr,
    x_ptr,
    factor_ptr,
    w_ptr,
    grid_ptr,
    groups,
    w_scales_ptr,
    thresholds_ptr,
    K,
    N,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
):
    """y [M, N] float32 += sparse projections of x [M, K], each row with its own survivors.

    x is multiplied by a factor [K] before the thresholds, if there is one.
    """
    sequence = tl.program_id(2).to(tl.int64)
    block, start, end = _columns(tl.program_id(0), N0, N1, N2, BLOCK_N)
    row = tl.program_id(1) * BLOCK_K
    offs_k = row + tl.arange(0, BLOCK_K)
    threshold = tl.load(thresholds_ptr + block)
    x = tl.load(x_ptr + sequence * K + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + offs_k, mask=offs_k < K, other=0.0)
    WORDS: tl.constexpr = _words(GROUP, BLOCK_N, N0, N1)
    _accumulate(
        y_ptr + sequence * N, x, Matrix(w_ptr, grid_ptr, groups, w_scales_ptr, STRIDE_K, GROUP),
        Tile(BLOCK_K, BLOCK_N, SLOTS, MORE), threshold, y_ptr, False,
        row, offs_k < K, start, end, WORDS, None, 1.0,
    )  # fmt: skip


class Linear:
    """`reference.sparse_project` for a few inputs at once, over up to three matrices."""

    def __init__(
        self,
        weight: Tensor | QuantizedMatrix,
        widths: Sequence[int],
        thresholds: Tensor,
        *,
        factor: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Bind to a matrix.

        Args:
            weight: [K, N] with rows that are contiguous, on the device.
            widths: columns of the P matrices that stand side by side in it, P from 1 to 3.
            thresholds: [P] float32, on the same device, as are the others.
            factor: [K] float32, of x before it is compared with them.
            bias: [N] float32, added to the product.
        """
        if not 1 <= len(widths) <= 3 or len(widths) != len(thresholds):
            raise ValueError(f"{len(widths)} matrices with {len(thresholds)} thresholds")
        inputs, outputs = tuple(weight.shape)
        self._inputs = inputs
        self._thresholds, self._factor = thresholds, factor
        none = torch.zeros(outputs, dtype=torch.float32, device=thresholds.device)
        self._start = none if bias is None else bias  # what the programs add to
        self._stored = Stored.of(weight)
        device = DeviceClass.of(thresholds.device)
        launch = linear_launch(inputs, outputs, len(widths), bits_of(weight), device)
        self._launch, self._grid = launch, launch.grid(inputs, *widths)
        pack = self._stored.pack
        self._widths = [width // pack for width in (*widths, 0, 0)][:3]

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N] in the dtype of x, summed in float32."""
        y = self._start.repeat(len(x), 1)
        n0, n1, n2 = self._widths
        grid = (*self._grid, len(x))
        linear_kernel[grid](
            y_ptr=y,
            x_ptr=x.contiguous(),
            factor_ptr=self._factor,
            **self._stored.arguments(),
            thresholds_ptr=self._thresholds,
            K=self._inputs,
            N=y.shape[1],
            N0=n0,
            N1=n1,
            N2=n2,
            BLOCK_K=self._launch.block_k,
            BLOCK_N=self._launch.block_n // self._stored.pack,
            SLOTS=self._launch.slots,
            MORE=self._launch.more,
            num_warps=self._launch.num_warps,
            num_stages=1,
        )
        return y.to(x.dtype)
