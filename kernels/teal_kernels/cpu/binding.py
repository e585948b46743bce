"""A decoder's tensors as the compiled functions are handed them: sizes, addresses, room to work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_kernels.cpu import vectors
from teal_kernels.cpu.quads import LINE, LINE_BYTES
from teal_kernels.cpu.structures import Matrix, Model, Scratch, Shared
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows
from teal_kernels.tensors import MATRICES, RecoveryVectors, StepTensors

_VECTORS = ("input_layernorm", "qkv_bias", "q_norm", "k_norm", "o_bias", "post_attention_layernorm")
_DTYPES = {
    torch.float16: vectors.HALF,
    torch.bfloat16: vectors.BFLOAT,
    torch.float32: vectors.FLOAT,
}


def check(tensors: StepTensors) -> None:
    """Raise ValueError unless the compiled functions can read all of them by their addresses."""
    dtype = tensors.embed_tokens.dtype
    for weight in _weights(tensors):
        if isinstance(weight, Tensor):
            parts: list[Tensor | None] = [weight]
            if weight.dtype != dtype or dtype not in _DTYPES:
                raise ValueError(
                    f"weights and cache must be of one dtype of {', '.join(map(str, _DTYPES))}, "
                    f"got {dtype} and {weight.dtype}"
                )
        else:
            parts = [weight.rows, weight.scales]
        for part in parts:
            if part is not None and (not part.is_contiguous() or part.device.type != "cpu"):
                raise ValueError("weights and cache must be contiguous and on the CPU")


def _weights(tensors: StepTensors) -> Iterator[Tensor | QuantizedMatrix | QuantizedRows]:
    yield from (tensors.embed_tokens, tensors.norm, tensors.lm_head, tensors.keys, tensors.values)
    for layer in tensors.layers:
        for name in (*_VECTORS, *MATRICES):
            if (weight := getattr(layer, name)) is not None:
                yield weight


def model_of(tensors: StepTensors, own: RecoveryVectors) -> Model:
    """Sizes and addresses; the tensors, and the model's own vectors, are the caller's to keep.

    Raises:
        ValueError: a matrix is stored in different ways in different layers.
    """
    head = tensors.lm_head
    quantized = isinstance(head, QuantizedRows)
    rows = head.rows if isinstance(head, QuantizedRows) else head
    tables = (tensors.cos, tensors.sin, tensors.query_scales)
    cos, sin, query_scales = (table.float().contiguous().numpy() for table in tables)
    matrices = {
        name: matrix_of([getattr(layer, name) for layer in tensors.layers], tensors.widths(name))
        for name in MATRICES
    }
    return Model(
        dtype=_DTYPES[tensors.embed_tokens.dtype],
        hidden=tensors.hidden_size,
        inner=tensors.intermediate_size,
        heads=tensors.num_attention_heads,
        kv_heads=tensors.num_key_value_heads,
        head_dim=tensors.head_dim,
        vocab=tensors.vocab_size,
        length=tensors.length,
        eps=np.float32(tensors.rms_norm_eps),
        embedding_multiplier=np.float32(tensors.embedding_multiplier),
        residual_multiplier=np.float32(tensors.residual_multiplier),
        logits_multiplier=np.float32(tensors.logits_multiplier),
        vectors=vectors_of(tensors, own),
        **matrices,
        windows=np.array([window or 0 for window in tensors.sliding_windows], dtype=np.int64),
        pairs=np.array([size // 2 for size in tensors.rotary_dims], dtype=np.int64),
        embed_tokens=tensors.embed_tokens.data_ptr(),
        norm=own.norm.data_ptr(),
        lm_head=rows.data_ptr(),
        lm_head_dtype=vectors.INT8 if quantized else _DTYPES[rows.dtype],
        lm_head_scales=head.scales.data_ptr() if isinstance(head, QuantizedRows) else 0,
        keys=tensors.keys.data_ptr(),
        values=tensors.values.data_ptr(),
        cos=cos,
        sin=sin,
        query_scales=query_scales,
    )


def vectors_of(tensors: StepTensors, used: RecoveryVectors) -> Any:
    """Addresses of each layer's vectors, from INPUT_NORM to K_NORM; a bias of zeros is none."""
    table = []
    for index, layer in enumerate(tensors.layers):
        norms = (used.input_layernorm[index], used.post_attention_layernorm[index])
        biases = (getattr(used, name)[index] for name in MATRICES)
        found = (bias if bias.any() else None for bias in biases)
        table.append(_addresses([*norms, *found, layer.q_norm, layer.k_norm]))
    return np.stack(table)


def matrix_of(weights: Sequence[Tensor | QuantizedMatrix], widths: Sequence[int]) -> Matrix:
    """What the layers' weights have in common, and where they are."""
    if len({_kind(weight) for weight in weights}) > 1:
        raise ValueError("a matrix must be of the same integers or floats in every layer")
    dtype, group = _kind(weights[0])
    rows = [weight if isinstance(weight, Tensor) else weight.rows for weight in weights]
    scales = [None if isinstance(weight, Tensor) else weight.scales for weight in weights]
    return Matrix(
        dtype=dtype,
        stride=rows[0].shape[1] * rows[0].itemsize,
        group=group,
        offsets=np.array([0, *accumulate(widths)], dtype=np.int64),
        addresses=_addresses(rows),
        scales=_addresses(scales),
    )


def _kind(weight: Tensor | QuantizedMatrix) -> tuple[Any, int]:
    """How the compiled functions read a matrix: dtype and group."""
    if isinstance(weight, Tensor):
        return _DTYPES[weight.dtype], 0
    return (vectors.INT4 if weight.group else vectors.INT8), weight.group


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    """int64, 0 where there is no tensor."""
    return np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.int64)


def shared_of(model: Model, threads: int) -> Shared:
    """What the threads of a step hand to each other."""
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    return Shared(
        wide=np.empty((threads, max(qkv, 2 * model.inner)), dtype=np.float32),
        narrow=np.empty((threads, model.hidden), dtype=np.float32),
        logits=np.empty(0, dtype=np.float32),  # new ones for each token
    )


def scratch_of(model: Model) -> Scratch:
    """What one thread of a step writes to."""
    widest = max(model.inner, model.heads * model.head_dim)
    head = (np.empty(model.head_dim, dtype=np.float32) for _ in range(3))
    matrices = (model.qkv, model.o, model.gate_up, model.down)
    return survivors(max(model.hidden, widest), matrices)._replace(
        hidden=np.empty(model.hidden, dtype=np.float32),
        normed=np.empty(model.hidden, dtype=np.float32),
        inputs=np.empty(widest, dtype=np.float32),
        lines=np.empty(model.hidden // LINE * LINE_BYTES, dtype=np.uint8),
        scores=np.empty(model.length, dtype=np.float32),
        **dict(zip(("query", "key", "value"), head, strict=True)),
    )


def survivors(inputs: int, matrices: Sequence[Matrix]) -> Scratch:
    """Room for the surviving channels of one projection, and for nothing else."""
    none = np.empty(0, dtype=np.float32)
    rows, groups = inputs + vectors.ROWS, max(map(_groups, matrices))
    return Scratch(
        hidden=none,
        normed=none,
        inputs=none,
        rows=np.empty(rows, dtype=np.int64),
        factors=np.empty(rows, dtype=np.float32),
        steps=np.empty(groups, dtype=np.float32),
        products=np.empty(vectors.ROWS // 2 * groups, dtype=np.int32),
        sums=np.empty(groups, dtype=np.float32),
        lines=np.empty(0, dtype=np.uint8),
        scores=none,
        query=none,
        key=none,
        value=none,
    )


def _groups(matrix: Matrix) -> int:
    return -(-int(matrix.offsets[-1]) // matrix.group) if matrix.group else 0
