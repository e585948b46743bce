"""Launches of products of several tokens: which kernel, over which tiles, in how many parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from teal_kernels.gpu import verify_products as kernels
from teal_kernels.quantized import QuantizedMatrix


class Tile(NamedTuple):
    """Inputs and outputs that a program multiplies at a time, how many of them are on their way.

    A product is cut into about so many `programs`, where its inputs allow, in `most` parts of its
    inputs. Rows of `ahead` inputs are asked for before what multiplies them is there.
    """

    block_k: int
    block_n: int
    stages: int
    programs: int
    most: int
    ahead: int


# By bits of a weight, the fastest on an H100.
_TILES = {
    4: Tile(64, 512, 4, 448, 16, 64),
    8: Tile(64, 128, 4, 800, 8, 64),
    16: Tile(64, 128, 4, 132, 8, 64),
    32: Tile(32, 128, 4, 132, 8, 32),
}
# Of integers where no tensor cores take 8 tokens: what is unrolled then takes minutes to compile in
# larger tiles.
_UNROLLED = Tile(16, 128, 2, 400, 8, 0)
# Of the lm_head, which lies the other way: inputs, outputs, stages.
HEAD_TILES = {8: (128, 64, 3), 16: (128, 64, 4), 32: (64, 64, 3)}


def split(weight: Tensor | QuantizedMatrix, *, tensor_cores: bool) -> tuple[int, int]:
    """Parts that a product's inputs are cut into, and the inputs of each."""
    tile, (inputs, outputs) = _tile(weight, tensor_cores), weight.shape
    blocks, tiles = triton.cdiv(outputs, tile.block_n), triton.cdiv(inputs, tile.block_k)
    parts = min(tile.most, tiles, max(1, round(tile.programs / blocks)))
    per_part = triton.cdiv(tiles, parts) * tile.block_k
    return triton.cdiv(inputs, per_part), per_part


def product(
    weight: Tensor | QuantizedMatrix, *, tensor_cores: bool, ahead: bool
) -> tuple[Any, tuple[int, int], dict[str, Any]]:
    """The kernel of a product, its grid, and its arguments but for x, the parts and their dtype.

    Args:
        weight: the matrix.
        tensor_cores: whether there are some that take products of 8 tokens in the step's dtype.
        ahead: whether there is time to ask for rows ahead.
    """
    tile, (inputs, outputs) = _tile(weight, tensor_cores), weight.shape
    parts, per_part = split(weight, tensor_cores=tensor_cores)
    arguments: dict[str, Any] = {"K": inputs, "N": outputs, "per_part": per_part}
    arguments |= {"BLOCK_K": tile.block_k, "BLOCK_N": tile.block_n, "STAGES": tile.stages}
    if isinstance(weight, Tensor):
        kernel = kernels.product_rows_kernel
        row_bytes = weight.stride(0) * weight.element_size()
        arguments |= {"w_ptr": weight, "stride_w": weight.stride(0)}
    else:
        row_bytes = weight.rows.stride(0)
        pairs = weight.rows.view(torch.int16)
        arguments |= {"w_ptr": pairs, "scales_ptr": weight.scales, "STRIDE_K": pairs.stride(0)}
        kernel = kernels.int4_rows_kernel if weight.group else kernels.int8_rows_kernel
        if weight.group:
            arguments |= _groups(weight, arguments.pop("BLOCK_N"))
            tile = tile._replace(block_n=arguments["G"] * weight.group)
        fills = weight.group == 4 * arguments.get("H", 0)
        arguments["EVEN"] = fills and not (inputs % tile.block_k or outputs % tile.block_n)
    blocks = triton.cdiv(outputs, tile.block_n)
    # What is asked for ahead has to lie at a multiple of 16 bytes.
    arguments["AHEAD"] = tile.ahead if ahead and row_bytes % 16 == 0 else 0
    return kernel, (blocks, parts), arguments | {"PROGRAMS": blocks * parts}


def _groups(weight: QuantizedMatrix, columns: int) -> dict[str, Any]:
    """What the kernel of int4 has to know besides, about so many columns a program."""
    # The tensor cores take 16 outputs at least, and Triton powers of two.
    quarter = max(16, triton.next_power_of_2(weight.group // 4))
    return {
        "grid_ptr": weight.rows.view(torch.float16)[:, weight.columns // 4 :],
        "groups": weight.groups,
        "GROUP": weight.group,
        "H": quarter,
        "G": max(1, columns // (4 * quarter)),
    }


def _tile(weight: Tensor | QuantizedMatrix, tensor_cores: bool) -> Tile:
    if isinstance(weight, Tensor):
        return _TILES[8 * weight.element_size()]
    return _TILES[weight.bits] if tensor_cores else _UNROLLED
