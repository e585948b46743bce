# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Several tokens through the decoder at once, dense: prompts, and drafts that are verified."""

from __future__ import annotations

import numpy as np

from teal_kernels.cpu.amx import SIDE, configure, restore
from teal_kernels.cpu.compiled import _cached, _norm, _share, _wait
from teal_kernels.cpu.few import layer_of_few
from teal_kernels.cpu.fragments import compiled, overloaded
from teal_kernels.cpu.intrinsics import address_of, load
from teal_kernels.cpu.layers import CHUNK, layer_of_many
from teal_kernels.cpu.product import by_units, dot_few
from teal_kernels.cpu.tiles import FEW, scale_row

# Rows of the lm_head whose products are brought to scale together.
ROWS = 64


@compiled
def _embed(team, model, ids, hidden):
    """hidden = the tokens' embeddings."""
    start, stop = _share(len(ids), team)
    for t in range(start, stop):
        row, out = model.embed_tokens + address_of(model.dtype, 0, ids[t] * model.hidden), hidden[t]
        for i in range(len(out)):
            out[i] = load(model.dtype, row, i) * model.embedding_multiplier
    _wait(team)


@compiled
def _answer(team, model, room, hidden, logits):
    """logits [tokens, vocab] = lm_head(norm(hidden)), a thread's share."""
    dtype, x = model.lm_head_dtype, room.normed.values
    row_bytes = address_of(dtype, 0, model.hidden)
    start, stop = _share((model.vocab + ROWS - 1) // ROWS, team)
    for begin in range(0, len(hidden), FEW):
        count = min(FEW, len(hidden) - begin)
        for t in range(count):
            row = x[t, : model.hidden]
            _norm(np.float32, model.norm, hidden[begin + t], model.eps, row)
        for first in range(start * ROWS, min(stop * ROWS, model.vocab), ROWS):
            rows, last = model.lm_head + first * row_bytes, min(first + ROWS, model.vocab)
            products = room.logits[:, : last - first]
            dot_few(dtype, rows, row_bytes, x, model.hidden, count, products)
            for t in range(count):
                out, found = logits[begin + t, first:last], products[t]
                for r in range(len(out)):
                    out[r] = found[r] * model.logits_multiplier
                if model.lm_head_scales != 0:
                    scale_row(out.ctypes.data, model.lm_head_scales + 4 * first, len(out))


def _configure(x, tiles, tokens):
    """Set AMX up for so many tokens, if inputs like x are multiplied there."""


def _restore(x, tiles):
    """Undo that."""


# Chosen when numba compiles: LLVM ends the process over an instruction that the CPU does not have.
@overloaded(_configure)
def _typed_configure(x, tiles, tokens):
    def units(x, tiles, tokens):
        for tile in range(6):  # sums and inputs; the others hold weights
            tiles[48 + tile] = min(tokens, SIDE)
        configure(tiles.ctypes.data)

    def nothing(x, tiles, tokens):
        pass

    return units if by_units(x) else nothing


@overloaded(_restore)
def _typed_restore(x, tiles):
    def units(x, tiles):
        restore(tiles.ctypes.data)

    def nothing(x, tiles):
        pass

    return units if by_units(x) else nothing


@compiled
def _begin(team, model, room, ids, hidden):
    """Embed the tokens, if there are ids, and set up AMX, if it multiplies."""
    if len(ids) > 0:
        _embed(team, model, ids, hidden)
    _configure(room.normed, room.tiles, len(hidden))


@compiled
def _end(team, model, room, hidden, logits):
    _restore(room.normed, room.tiles)
    if len(logits) > 0:
        _answer(team, model, room, hidden, logits)


@_cached
def read_many(team, model, tokens, room, ids, hidden, position, first, last, logits):
    """Take hidden [tokens, hidden] through layers first to last; logits after each, if asked for.

    Args:
        team: this thread's.
        model: the weights, and the cache, which gains the tokens' keys and values.
        tokens: the threads'.
        room: this thread's.
        ids: int64 [tokens], whose embeddings hidden becomes, or of no tokens.
        hidden: float32, the threads'; the result of the last layer.
        position: of the first token.
        logits: float32 [tokens, vocab], the threads', or of no tokens.
    """
    _begin(team, model, room, ids, hidden)
    for layer in range(first, last):
        for start in range(0, len(hidden), CHUNK):
            part = hidden[start : min(start + CHUNK, len(hidden))]
            layer_of_many(team, model, layer, tokens, room, part, position + start)
    _end(team, model, room, hidden, logits)


@_cached
def read_few(team, model, tokens, room, ids, hidden, position, first, last, logits):
    """The same for up to FEW tokens, for which it takes less time."""
    _begin(team, model, room, ids, hidden)
    few, count = room.hidden, len(hidden)
    for t in range(count):
        for i in range(model.hidden):
            few[t, i] = hidden[t, i]
    for layer in range(first, last):
        layer_of_few(team, model, layer, tokens, room, count, position)
    start, stop = _share(count, team)
    for t in range(start, stop):
        for i in range(model.hidden):
            hidden[t, i] = few[t, i]
    _wait(team)
    _end(team, model, room, hidden, logits)
