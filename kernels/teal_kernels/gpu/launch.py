"""Launch choices of the decode kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
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

# By compute capability, bytes an element, and whether the step is sparse.
_TABLES = {((9, 0), 2, False): _DENSE, ((9, 0), 2, True): _SPARSE}

# lm_head: rows of [vocab, hidden] a program; 64 KB of weights for 8 warps.
_LOGITS_BYTES = 64 << 10


class DeviceClass(NamedTuple):
    """What launches depend on besides shapes; (0, 0) and no processors for the interpreter."""

    capability: tuple[int, int] = (0, 0)
    processors: int = 0

    @classmethod
    def of(cls, device: torch.device) -> DeviceClass:
        """A device's own."""
        if device.type != "cuda":
            return cls()
        found = torch.cuda.get_device_properties(device)
        return cls((found.major, found.minor), found.multi_processor_count)


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
        device: DeviceClass,
    ) -> StepLaunches:
        """Take launches from the device's table, cut to the shapes (name → inputs, outputs).

        A device or dtype without a table gets one tile for all, without a limit on registers or
        rows fetched ahead: both pay or cost as the device is made.
        """
        plain = dict.fromkeys(_SPARSE, PROJECTION[element_size])
        table = _TABLES.get((device.capability, element_size, sparse), plain)
        tiles = {
            name: fit(launch, shapes[name][0], shapes[name][1], 2 * device.processors)
            for name, launch in table.items()
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


def fit(launch: Launch, inputs: int, outputs: int, programs: int = 0) -> Launch:
    """Shrink a tile to a small matrix, and until there are as many programs as asked for."""
    block_k = min(launch.block_k, max(16, triton.next_power_of_2(inputs)))
    block_n = min(launch.block_n, max(16, triton.next_power_of_2(outputs)))
    while block_n > 128 and triton.cdiv(inputs, block_k) * triton.cdiv(outputs, block_n) < programs:
        block_n //= 2
    # Rows are fetched ahead in lines of 128 bytes.
    ahead = launch.ahead if block_n >= 64 else 0
    return launch._replace(block_k=block_k, block_n=block_n, ahead=ahead)
