"""What the compiled functions are handed, as named tuples: numba passes those at no cost."""

from __future__ import annotations

from typing import Any, NamedTuple

# A layer's tensors that are no matrices, in the order in which Model.vectors has their addresses:
# float32, but for the norms of queries and keys.
INPUT_NORM, POST_NORM, QKV_BIAS, O_BIAS, GATE_UP_BIAS, DOWN_BIAS, Q_NORM, K_NORM = range(8)


class Team(NamedTuple):
    """One of the threads that run a function together, and how it meets the others."""

    thread: int
    threads: int
    barrier: int  # address of two int64, 0 at the start: arrivals so far, threads that sleep
    phase: Any  # int64 [1] of this thread, 0 at the start: arrivals that end its last wait
    syscall: int  # address of libc's function on Linux, or 0
    give_way: int  # address of the C function that yields the core, or 0


class Matrix(NamedTuple):
    """A matrix [inputs, columns] of every layer; several projections may stand side by side."""

    dtype: Any  # HALF, BFLOAT, FLOAT, INT8 or INT4
    stride: int  # bytes from one row to the next
    group: int  # columns that share scale and offset of INT4, else 0
    offsets: Any  # int64 [projections + 1], their column bounds
    addresses: Any  # int64 [layers]
    scales: Any  # int64 [layers], addresses of a float32 a column of integers; else 0


class Model(NamedTuple):
    """A decoder. Weights are addresses of contiguous tensors; 0 is an absent one."""

    dtype: Any  # of the embedding, the cache and norms of heads: HALF, BFLOAT or FLOAT
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    length: int  # positions in the cache
    eps: Any  # float32
    embedding_multiplier: Any  # float32
    residual_multiplier: Any  # float32
    logits_multiplier: Any  # float32
    vectors: Any  # int64 [layers, 8], addresses from INPUT_NORM to K_NORM
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    windows: Any  # int64 [layers], sliding windows; 0 is none
    pairs: Any  # int64 [layers], pairs of a head's channels that rope rotates
    embed_tokens: int  # [vocab, hidden]
    norm: int  # float32
    lm_head: int  # [vocab, hidden]
    lm_head_dtype: Any
    lm_head_scales: int  # float32 [vocab] for INT8, else 0
    keys: int  # [layers, kv_heads, length, head_dim]
    values: int
    cos: Any  # float32 [positions, pairs]
    sin: Any
    query_scales: Any  # float32 [positions], of attention's scores


class Shared(NamedTuple):
    """What the threads hand to each other, all float32."""

    wide: Any  # [threads, widest of qkv and gate_up], each thread's part of a sum
    narrow: Any  # [threads, hidden], the same for o and down
    logits: Any  # [vocab]


class Scratch(NamedTuple):
    """What one thread writes to."""

    hidden: Any  # float32 [hidden], the residual stream; every thread has the same
    normed: Any  # float32 [hidden]
    inputs: Any  # float32 [widest of o and down]; a thread fills the channels that it computes
    rows: Any  # int64 [longest input + ROWS], addresses of the surviving channels' weights
    factors: Any  # float32, the same size, the channels' values
    steps: Any  # float32 [most groups of a row of INT4], what one unit of `products` stands for
    products: Any  # int32 [ROWS / 2, most groups], values times scales as `scale_factors` has them
    sums: Any  # float32 [most groups], the sum of values times offsets
    lines: Any  # uint8 [hidden / LINE, LINE_BYTES], `normed` as the lm_head's rows multiply it
    scores: Any  # float32 [length]
    query: Any  # float32 [head_dim]
    key: Any  # float32 [head_dim]
    value: Any  # float32 [head_dim]
