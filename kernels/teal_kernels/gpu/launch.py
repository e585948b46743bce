"""Launch choices of the decode kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton


class Launch(NamedTuple):
    """Tile of the weight that one program multiplies, its warps, and a limit on its registers.

    `ahead` rows of the tile are asked for before it is known which survive, by as many programs
    as a device holds at a time.
    """

    block_k: int
    block_n: int
    num_warps: int
    registers: int | None = None
    ahead: int = 0

    def grid(self, inputs: int, *outputs: int) -> tuple[int, int]:
        """Programs by columns, which never straddle two matrices, and by channels."""
        columns = sum(triton.cdiv(width, self.block_n) for width in outputs)
        return columns, triton.cdiv(inputs, self.block_k)


# Launch by bytes an element, of a projection on its own. On an H100 one tile a program with all
# its loads in flight beats small tiles in a loop by 10 to 25 %.
PROJECTION = {2: Launch(16, 1024, 4), 4: Launch(16, 512, 4)}

# Within a step, on an H100. The limits on registers let one more program live on a processor, for
# a few spilled words: qkv of Llama-2-7B at 0.5 goes from 21.5 to 19.8 us. Rows fetched ahead pay
# when all are needed (4.66 to 4.56 ms a token, dense) and cost as much as they bring at 0.5.
_SPARSE = {
    "qkv": Launch(32, 1024, 4, registers=128),
    "o": Launch(32, 1024, 4, registers=128),
    "gate_up": Launch(32, 1024, 4, registers=128),
    "down": Launch(32, 1024, 4),
}
_DENSE = dict.fromkeys(_SPARSE, Launch(16, 1024, 4, registers=104, ahead=4))

# lm_head: rows of [vocab, hidden] a program; 64 KB of weights for 8 warps.
_LOGITS_BYTES = 64 << 10


class StepLaunches(NamedTuple):
    """Launches of one token step; `qkv`, `o`, `gate_up` and `down` name the fused matrices."""

    qkv: Launch
    o: Launch
    gate_up: Launch
    down: Launch
    logits: Launch  # block_n rows of the vocabulary by the whole hidden axis
    attention_chunk: int  # positions a program
    attention_tile: int  # positions a load
    attention_warps: int

    @classmethod
    def choose(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        element_size: int,
        context: int,
        *,
        sparse: bool,
    ) -> StepLaunches:
        """Take launches from the table, cut to the shapes (name → inputs, outputs)."""
        table = _SPARSE if sparse else _DENSE
        tiles = {
            name: fit(table[name] if element_size == 2 else PROJECTION[4], *shapes[name])
            for name in table
        }
        hidden, vocab = shapes["logits"]
        block_h = triton.next_power_of_2(hidden)
        rows = max(1, min(_LOGITS_BYTES // (block_h * element_size), 16))
        rows = min(1 << (rows.bit_length() - 1), triton.next_power_of_2(vocab))
        chunk = 64 if context <= 2048 else 128
        chunk = min(chunk, max(16, triton.next_power_of_2(context)))
        return cls(
            **tiles,
            logits=Launch(block_h, rows, 8),
            attention_chunk=chunk,
            attention_tile=min(64, chunk),
            attention_warps=4,
        )


def fit(launch: Launch, inputs: int, outputs: int) -> Launch:
    """Shrink a tile to a small matrix."""
    block_k = min(launch.block_k, max(16, triton.next_power_of_2(inputs)))
    block_n = min(launch.block_n, max(16, triton.next_power_of_2(outputs)))
    # Rows are fetched ahead in lines of 128 bytes.
    ahead = launch.ahead if block_n >= 64 else 0
    return launch._replace(block_k=block_k, block_n=block_n, ahead=ahead)
