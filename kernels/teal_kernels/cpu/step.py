"""Decoding on a CPU: one compiled call a token and thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_kernels.checks import check_projection
from teal_kernels.cpu import compiled

_KINDS = {
    torch.float16: compiled.HALF,
    torch.bfloat16: compiled.BFLOAT,
    torch.float32: compiled.FLOAT,
}
# The order in which `compiled.decode` finds a layer's weights.
LAYER_WEIGHTS = (
    "input_layernorm",
    "qkv",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "o",
    "o_bias",
    "post_attention_layernorm",
    "gate_up",
    "down",
)


class DecodeStep:
    """A decoder bound to its weights and its cache; a call decodes one token.

    The threads run one compiled function together and meet at a barrier after each part of a
    layer; none of torch's or numba's own parallel loops is involved.
    """

    def __init__(
        self,
        *,
        layers: Sequence[Any],
        embed_tokens: Tensor,
        norm: Tensor,
        lm_head: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_attention_heads: int,
        rms_norm_eps: float,
        sliding_windows: Sequence[int | None],
        threads: int | None = None,
    ) -> None:
        """Bind the step to tensors, which it reads (and of the cache, writes) in place.

        Args:
            layers: objects with the attributes LAYER_WEIGHTS: tensors [in, out], [n] or None.
            embed_tokens: [vocab_size, hidden_size].
            norm: [hidden_size].
            lm_head: [vocab_size, hidden_size].
            keys: [layers, key-value heads, length, head_dim].
            values: the same shape.
            cos: [at least length, head_dim / 2] float32.
            sin: the same shape.
            num_attention_heads: query heads.
            rms_norm_eps: of every norm.
            sliding_windows: one a layer, None where a layer sees everything.
            threads: by default as many as torch uses, and no more than there are cores for us.

        Raises:
            ValueError: the tensors are not contiguous, on a CPU, and of one dtype that is known.
        """
        dtype, (vocab_size, hidden_size) = embed_tokens.dtype, embed_tokens.shape
        _, kv_heads, length, head_dim = keys.shape
        inner = layers[0].down.shape[0]
        self._tensors = [embed_tokens, norm, lm_head, keys, values, cos, sin]
        table = [[getattr(layer, name) for name in LAYER_WEIGHTS] for layer in layers]
        weights = [*self._tensors[:5], *(t for row in table for t in row if t is not None)]
        self._tensors += weights  # their addresses must stay valid
        for tensor in weights:
            if tensor.dtype != dtype or dtype not in _KINDS:
                raise ValueError(f"weights must be of one dtype of {list(_KINDS)}, got {dtype}")
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError("weights must be contiguous and on the CPU")

        self.threads = threads or default_threads()
        self._kind = _KINDS[dtype]
        q_size, kv_size = num_attention_heads * head_dim, kv_heads * head_dim
        self._sizes = (hidden_size, inner, num_attention_heads, kv_heads, head_dim, length)
        self._eps = np.float32(rms_norm_eps)
        self._weights = np.array(
            [[0 if t is None else t.data_ptr() for t in row] for row in table], dtype=np.int64
        )
        ends = (embed_tokens.data_ptr(), norm.data_ptr(), lm_head.data_ptr(), vocab_size)
        self._ends = ends
        self._caches = (keys.data_ptr(), values.data_ptr())
        self._windows = np.array([window or 0 for window in sliding_windows], dtype=np.int64)
        self._tables = (cos.contiguous().numpy(), sin.contiguous().numpy())
        self._offsets = tuple(
            np.array(bounds, dtype=np.int64)
            for bounds in (
                (0, q_size, q_size + kv_size, q_size + 2 * kv_size),
                (0, hidden_size),
                (0, inner, 2 * inner),
                (0, hidden_size),
            )
        )
        self._thresholds = np.full((len(layers), 7), -np.inf, dtype=np.float32)
        self._kept = np.zeros((len(layers), 7), dtype=np.int64)
        widths = (hidden_size, q_size + 2 * kv_size, q_size, inner, 2 * inner, vocab_size)
        self._shared = tuple(np.empty(width, dtype=np.float32) for width in widths)
        longest = max(hidden_size, q_size, inner)
        self._private = [_room(hidden_size, longest, length, head_dim) for _ in range(self.threads)]
        self._barrier = np.zeros(1, dtype=np.int64)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Keep what exceeds thresholds [layers, 7] float32; None keeps everything."""
        self._thresholds[:] = -np.inf if thresholds is None else thresholds.cpu().numpy()

    @property
    def kept(self) -> Tensor:
        """Channels kept since the counts were cleared, [layers, 7] int64."""
        return torch.from_numpy(self._kept.copy())

    def clear_counts(self) -> None:
        """Start counting anew."""
        self._kept[:] = 0

    def __call__(self, token: int, position: int) -> Tensor:
        """Decode `token` at `position` and cache its keys and values; float32 [vocab_size]."""
        vocab_size, length = self._ends[3], self._sizes[5]
        if not 0 <= token < vocab_size or not 0 <= position < length:
            raise ValueError(
                f"token {token} at position {position} is outside {vocab_size} tokens "
                f"or {length} positions"
            )
        self._barrier[0] = 0

        def work(thread: int) -> None:
            compiled.decode(
                thread, self.threads, token, position, self._kind, self._sizes, self._eps,
                self._weights, self._ends, self._caches, self._windows, self._tables,
                self._offsets, self._thresholds, self._kept, self._shared,
                self._private[thread], self._barrier.ctypes.data,
            )  # fmt: skip

        _together(work, self.threads)
        return torch.from_numpy(self._shared[5].copy())


def sparse_project(
    x: Tensor,
    weight: Tensor,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Run `teal_kernels.reference.sparse_project`, skipping the rows of dropped channels.

    Args and errors are the reference's; the weight's dtype is float16, bfloat16 or float32.
    """
    check_projection(x, weight, offsets, thresholds, bias)
    if weight.dtype not in _KINDS or weight.device.type != "cpu":
        raise ValueError(f"weight must be 16- or 32-bit on the CPU, got {weight.dtype}")
    inputs, outputs = weight.shape
    weight = weight.contiguous()
    threads = default_threads()
    values = x.float().contiguous().numpy()
    y = np.zeros(outputs, dtype=np.float32)
    if bias is not None:
        y += bias.float().numpy()
    rows = np.empty((threads, inputs), dtype=np.int64)
    factors = np.empty((threads, inputs), dtype=np.float32)
    bounds = np.array(offsets, dtype=np.int64)
    levels = thresholds.contiguous().numpy()
    kept = np.zeros(len(levels), dtype=np.int64)

    def work(thread: int) -> None:
        compiled.project_share(
            thread, threads, _KINDS[weight.dtype], weight.data_ptr(), inputs, outputs, values,
            bounds, levels, y, rows, factors, kept,
        )  # fmt: skip

    _together(work, threads)
    return torch.from_numpy(y).to(x.dtype)


def default_threads() -> int:
    """As many threads as torch uses, and no more than there are cores for this process.

    Threads that wait for each other at a barrier must all be running.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


def _together(work: Any, threads: int) -> None:
    """Run work(0) here and work(1) ... work(threads - 1) in the pool, at the same time."""
    others = [_pool(threads).submit(work, thread) for thread in range(1, threads)]
    work(0)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="teal")


def _room(hidden_size: int, longest: int, length: int, head_dim: int) -> tuple[Any, ...]:
    """What one thread writes to: normed, survivors, scores, positions, a query and a key."""
    return (
        np.empty(hidden_size, dtype=np.float32),
        np.empty(longest, dtype=np.int64),
        np.empty(longest, dtype=np.float32),
        np.empty(length, dtype=np.float32),
        np.empty(length, dtype=np.int64),
        np.empty(head_dim, dtype=np.float32),
        np.empty(head_dim, dtype=np.float32),
    )
