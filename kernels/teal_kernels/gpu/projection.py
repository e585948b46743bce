# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""One sparse projection on its own, for any vector and any of the decoder's matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal_kernels.checks import check_projection
from teal_kernels.gpu.launch import PROJECTION, Launch, fit
from teal_kernels.quantized import QuantizedMatrix

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_BLOCKS = 3  # q, k and v


@triton.jit
def _sparse_project_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    thresholds_ptr,
    bound_1,
    bound_2,
    K,
    N,
    stride_x,
    stride_wk,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the product of one tile of w [K, N] and its part of x [K] to y [N] float32.

    Columns before bound_1 have the first threshold, those before bound_2 the second, the others
    the third. Rows that are dropped are never loaded.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    x = tl.load(x_ptr + offs_k.to(tl.int64) * stride_x, mask=mask_k, other=0.0).to(tl.float32)

    # Chosen from scalars, not gathered by column: the compiler then knows that the mask is the
    # same for neighbouring columns, and keeps the loads 16 bytes wide.
    threshold = tl.full((BLOCK_N,), 0.0, tl.float32) + tl.load(thresholds_ptr)
    if BLOCKS > 1:
        threshold = tl.where(offs_n < bound_1, threshold, tl.load(thresholds_ptr + 1))
    if BLOCKS > 2:
        threshold = tl.where(offs_n < bound_2, threshold, tl.load(thresholds_ptr + 2))
    keep = ~(tl.abs(x)[:, None] <= threshold[None, :]) & mask_k[:, None] & mask_n[None, :]

    rows = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wk
    w = tl.load(rows + offs_n[None, :], mask=keep, other=0.0).to(tl.float32)
    # The select guards against x = inf in a channel that is dropped for another projection.
    products = tl.where(keep, x[:, None] * w, 0.0)
    tl.atomic_add(y_ptr + offs_n, tl.sum(products, axis=0), mask=mask_n, sem="relaxed")


# Under TRITON_INTERPRET=1 the decorator gives something else, which runs on CPU tensors.
INTERPRETED = not isinstance(_sparse_project_kernel, triton.runtime.JITFunction)


def sparse_project(
    x: Tensor,
    weight: Tensor | QuantizedMatrix,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """`reference.sparse_project` on a CUDA device.

    Args:
        x: [K] float16, bfloat16 or float32, of any stride.
        weight: [K, N] float16, bfloat16 or float32, rows contiguous.
        offsets: at most 4 column bounds, from 0 to N.
        thresholds: [P] float32; a new value needs no new compilation and no copy to the host.
        bias: [N], or None.
        launch: tile and warps; None takes them from the table.

    Returns:
        [N] in the dtype of x, summed in float32. The order of the sum, and so the last bits,
        vary from run to run.

    Raises:
        ValueError: a shape, stride, dtype or device is not as above.
    """
    check_projection(x, weight, offsets, thresholds, bias)
    if isinstance(weight, QuantizedMatrix):
        raise ValueError("on a GPU only a token's step multiplies quantized matrices")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 here, got {tensor.dtype}"
            )
    blocks = len(offsets) - 1
    if not 1 <= blocks <= _MAX_BLOCKS:
        raise ValueError(f"one to {_MAX_BLOCKS} column blocks can be fused, got {blocks}")
    if not (weight.is_cuda or INTERPRETED):
        raise ValueError(f"tensors must be on a CUDA device, got {weight.device}")
    inputs, outputs = weight.shape
    y = torch.zeros(outputs, dtype=torch.float32, device=x.device)
    if inputs and outputs:
        chosen = launch or fit(
            PROJECTION[8 * weight.element_size()], inputs, outputs, 8 * weight.element_size()
        )
        grid = (triton.cdiv(outputs, chosen.block_n), triton.cdiv(inputs, chosen.block_k))
        bounds = (*offsets[1:-1], *(outputs,) * _MAX_BLOCKS)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _sparse_project_kernel[grid](
                y,
                x,
                weight,
                thresholds.contiguous(),
                bounds[0],
                bounds[1],
                inputs,
                outputs,
                x.stride(0),
                weight.stride(0),
                BLOCKS=blocks,
                BLOCK_K=chosen.block_k,
                BLOCK_N=chosen.block_n,
                num_warps=chosen.num_warps,
            )
    if bias is not None:
        y += bias
    return y.to(x.dtype)
