"""What the compiled functions are handed, as named tuples: numba passes those at no cost."""

from __future__ import annotations

from typing import Any, NamedTuple

# A layer's tensors that are no matrices, in the order in which Model.vectors has their addresses.
VECTORS = (
    "input_layernorm",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "o_bias",
    "post_attention_layernorm",
)
INPUT_NORM, QKV_BIAS, Q_NORM, K_NORM, O_BIAS, POST_NORM = range(len(VECTORS))


class Team(NamedTuple):
    """One of the threads that run a function together, and how it meets the others."""

    thread: int
    threads: int
    barrier: int  # address of an int64, 0 at the start: arrivals so far
    phase: Any  # int64 [1] of this thread, 0 at the start: arrivals that end its last wait
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

    dtype: Any  # of vectors, the embedding and the cache: HALF, BFLOAT or FLOAT
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    length: int  # positions in the cache
    eps: Any  # float32
    scale: Any  # float32, of attention's scores
    vectors: Any  # int64 [layers, 6], addresses in the order of VECTORS
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    windows: Any  # int64 [layers], sliding windows; 0 is none
    embed_tokens: int  # [vocab, hidden]
    norm: int
    lm_head: int  # [vocab, hidden]
    lm_head_dtype: Any
    lm_head_scales: int  # float32 [vocab] for INT8, else 0
    keys: int  # [layers, kv_heads, length, head_dim]
    values: int
    cos: Any  # float32 [positions, head_dim / 2]
    sin: Any


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
    steps: Any  # float32 [most groups of a row of INT4], what one unit of `pairs` stands for
    pairs: Any  # int32 [ROWS / 2, most groups], values times scales in 16 bits, two rows each
    sums: Any  # float32 [most groups], the sum of values times offsets
    scores: Any  # float32 [length]
    query: Any  # float32 [head_dim]
    key: Any  # float32 [head_dim]
    value: Any  # float32 [head_dim]
