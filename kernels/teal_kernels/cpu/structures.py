"""What the compiled functions are handed, as named tuples: numba passes those at no cost."""

from __future__ import annotations

from typing import Any, NamedTuple


class Team(NamedTuple):
    """One of the threads that run a function together, and how it meets the others."""

    thread: int
    threads: int
    barrier: int  # address of an int64, 0 at the start: arrivals so far
    phase: Any  # int64 [1] of this thread, 0 at the start: arrivals that end its last wait
    give_way: int  # address of the C function that yields the core, or 0


class Model(NamedTuple):
    """A decoder. Weights are addresses of contiguous tensors of one dtype; 0 is an absent one."""

    dtype: Any  # of the weights and the cache: HALF, BFLOAT or FLOAT
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    length: int  # positions in the cache
    eps: Any  # float32
    layers: Any  # int64 [layers, 10], addresses in the order of step.LAYER_WEIGHTS
    windows: Any  # int64 [layers], sliding windows; 0 is none
    offsets: Any  # int64 column bounds of the projections in qkv, o, gate_up and down
    embed_tokens: int  # [vocab, hidden]
    norm: int
    lm_head: int  # [vocab, hidden]
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
    rows: Any  # int64 [longest input], surviving channels
    factors: Any  # float32 [longest input], their values
    scores: Any  # float32 [length]
    query: Any  # float32 [head_dim]
    key: Any  # float32 [head_dim]
    value: Any  # float32 [head_dim]
