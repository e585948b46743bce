"""A linear layer that skips the small channels of its input while few sequences are decoded.

The choice between sparse and dense is made inside one custom operation. Outside of it, what
compiles the model would see it once, at warm-up, and keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.linear import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from teal_cli.vllm_plugin.product import sparse_product
from teal_cli.vllm_plugin.vectors import Vectors


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What the operation needs of a layer beside its weights."""

    sparse: Callable[[Tensor], Tensor]  # x [M, K] -> [M, N]
    dense: Callable[[Tensor, Tensor | None], Tensor]
    max_sequences: int


# By the address of the rows. Layers are alike, and with nothing of their own in the graph but
# tensors, what is compiled for one serves all.
_layers: dict[int, _Layer] = {}


@register_weight_loader_v2_supported_method
class TealLinearMethod(UnquantizedLinearMethod):
    """Thresholds on the input, one for each projection that stands side by side in the layer.

    A projection's threshold is the same on every rank of tensor parallelism: ranks divide its
    outputs or its inputs, and a channel is dropped for what it is.
    """

    supports_pre_processed_weights = False

    def __init__(
        self, thresholds: Sequence[float], vectors: Vectors | None, max_sequences: int
    ) -> None:
        super().__init__()
        self._thresholds = thresholds
        self._vectors = vectors
        self._max_sequences = max_sequences
        self._widths: list[int] = []
        self._bias: Tensor | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """As vLLM does; notes this rank's columns of each projection, and its biases."""
        self._widths = list(output_partition_sizes)
        if len(self._widths) != len(self._thresholds):
            raise ValueError(
                f"a layer has {len(self._widths)} projections side by side, and thresholds of "
                f"{len(self._thresholds)}"
            )
        rank, ranks = layer.tp_rank, layer.tp_size
        # Ranks that divide the inputs add up their outputs: one of them has the bias.
        if self._vectors is not None and (rank == 0 or input_size_per_partition == input_size):
            self._bias = self._vectors.bias(self._widths, rank, ranks)
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **attributes,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn the weights so that a channel is a row; a CPU's dense product has its own copy."""
        rows = layer.weight.data.t().contiguous()
        thresholds = torch.tensor(self._thresholds, dtype=torch.float32, device=rows.device)
        if rows.device.type == "cpu":
            super().process_weights_after_loading(layer)  # packs them

            def dense(x: Tensor, bias: Tensor | None) -> Tensor:
                result: Tensor = layer.cpu_linear(x, layer.weight, bias)
                return result
        else:
            layer.weight.data = rows.t()

            def dense(x: Tensor, bias: Tensor | None) -> Tensor:
                return torch.nn.functional.linear(x, rows.t(), bias)

        factor = None if self._vectors is None else self._vectors.factor
        sparse = sparse_product(
            rows,
            self._widths,
            thresholds,
            factor=None if factor is None else factor.to(rows.device),
            bias=None if self._bias is None else self._bias.to(rows.device),
        )
        layer.register_buffer("teal_rows", rows, persistent=False)
        _layers[rows.data_ptr()] = _Layer(sparse, dense, self._max_sequences)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        result: Tensor = torch.ops.teal.linear(x, layer.teal_rows, bias)
        return result


def _linear(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    layer = _layers[rows.data_ptr()]
    flat = x.reshape(-1, x.shape[-1])
    if not _decodes(len(flat), layer.max_sequences):
        return layer.dense(x, bias)
    result = layer.sparse(flat)
    if bias is not None:
        result = result + bias
    return result.view(*x.shape[:-1], rows.shape[1])


def _decodes(tokens: int, most: int) -> bool:
    """Whether this step takes one token of each of at most so many sequences."""
    if tokens > most or not is_forward_context_available():
        return False
    metadata: Any = get_forward_context().attn_metadata
    while isinstance(metadata, (dict, list)):
        metadata = next(iter(metadata.values() if isinstance(metadata, dict) else metadata), None)
    return getattr(metadata, "max_query_len", None) == 1


def _shape(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows.shape[1]))


_library = torch.library.Library("teal", "FRAGMENT")
_library.define("linear(Tensor x, Tensor rows, Tensor? bias) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("linear", _linear, _device)
torch.library.register_fake("teal::linear", _shape, lib=_library)
