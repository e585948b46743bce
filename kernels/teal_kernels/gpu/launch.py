"""Launch choices of the decode kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """Tile of the weight that one program multiplies, its warps, and a limit on its registers.

    `ahead` rows of the tile are asked for before it is known which survive, by as many programs
    as a device holds at a time. With `slots` the tile is of survivors alone, slots + more of every
    32 of its block_k channels at once; without, each row of the tile is loaded or left out.
    """

    block_k: int
    block_n: int
    num_warps: int
    registers: int | None = None
    ahead: int = 0
    slots: int = 0
    more: int = 0

    def grid(self, inputs: int, *outputs: int) -> tuple[int, int]:
        """Programs by columns, which never straddle two matrices, and by channels."""
        columns = sum(triton.cdiv(width, self.block_n) for width in outputs)
        return columns, triton.cdiv(inputs, self.block_k)


# Launch by bits of a weight, where no table has another. On an H100 one tile a program with all
# its loads in flight beats small tiles in a loop by 10 to 25 %.
_PLAIN = {
    4: Launch(16, 2048, 2),
    8: Launch(16, 2048, 4),
    16: Launch(16, 1024, 4),
    32: Launch(16, 512, 4),
}

# Sparsities from which a step has launches of its own.
DENSE, SPARSE, SPARSER = REGIMES = (0.0, 0.2, 0.58)

# Within a step, on an H100, found by coordinate descent over whole tokens of Llama-2-7B. Programs
# of one warp can list their survivors without meeting others, and so many fit on a processor that
# the listing hides behind the loads; the dense step, which lists nothing, wants large tiles.
_H100: dict[float, dict[str, Launch]] = {
    DENSE: dict.fromkeys(("qkv", "o", "gate_up", "down"), Launch(16, 1024, 4, 104, ahead=4)),
    SPARSE: {
        "qkv": Launch(32, 256, 1, slots=16, more=8),
        "o": Launch(32, 1024, 4, ahead=8),
        "gate_up": Launch(32, 256, 1, slots=16, more=8),
        "down": Launch(32, 256, 1, 168),
    },
    SPARSER: {
        "qkv": Launch(32, 256, 1, slots=16, more=4),
        "o": Launch(32, 512, 2, slots=16, more=8),
        "gate_up": Launch(32, 256, 1, slots=16, more=4),
        "down": Launch(64, 256, 1, slots=16, more=4),
    },
}
# The same for integers, matrix by matrix. Turning them into floats takes registers and time, which
# favours smaller tiles, and more survivors at a time pay later.
_H100_INT8: dict[float, dict[str, Launch]] = {
    DENSE: {
        "qkv": Launch(32, 512, 1),
        "o": Launch(16, 2048, 4, 104, ahead=4),
        "gate_up": Launch(32, 512, 1),
        "down": Launch(32, 512, 1),
    },
    SPARSE: {
        "qkv": Launch(32, 256, 1),
        "o": Launch(32, 512, 1, slots=16, more=8),
        "gate_up": Launch(32, 256, 1, slots=16, more=8),
        "down": Launch(64, 256, 1, slots=16, more=8),
    },
    SPARSER: {
        "qkv": Launch(64, 256, 1, slots=16, more=4),
        "o": Launch(32, 512, 1, slots=16, more=8),
        "gate_up": Launch(64, 256, 1, slots=16, more=4),
        "down": Launch(64, 256, 1, slots=16, more=4),
    },
}
_H100_INT4: dict[float, dict[str, Launch]] = {
    DENSE: {
        "qkv": Launch(32, 512, 1),
        "o": Launch(32, 512, 1),
        "gate_up": Launch(64, 512, 1),
        "down": Launch(64, 1024, 2),
    },
    SPARSE: {
        "qkv": Launch(32, 512, 1),
        "o": Launch(32, 512, 1),
        "gate_up": Launch(32, 512, 1),
        "down": Launch(64, 512, 1, slots=8, more=8),
    },
    SPARSER: {
        "qkv": Launch(64, 512, 1, slots=8, more=8),
        "o": Launch(32, 512, 1),
        "gate_up": Launch(64, 512, 1, slots=8, more=8),
        "down": Launch(64, 512, 1, slots=8, more=8),
    },
}
# By compute capability and bits of a weight.
_TABLES = {((9, 0), 16): _H100, ((9, 0), 8): _H100_INT8, ((9, 0), 4): _H100_INT4}

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

    @classmethod
    def choose(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        bits: int,
        *,
        logits_bits: int,
        regime: float,
        device: DeviceClass,
    ) -> StepLaunches:
        """Take launches from the device's table, cut to the shapes (name → inputs, outputs).

        A device or width of weights without a table gets one tile for all, without a limit on
        registers or rows fetched ahead: both pay or cost as the device is made.
        """
        plain = dict.fromkeys(_H100[regime], _PLAIN[bits])
        table = _TABLES.get((device.capability, bits), {}).get(regime, plain)
        tiles = {
            name: fit(launch, shapes[name][0], shapes[name][1], bits, 2 * device.processors)
            for name, launch in table.items()
        }
        hidden, vocab = shapes["logits"]
        block_h = triton.next_power_of_2(hidden)
        rows = max(1, min(8 * _LOGITS_BYTES // (block_h * logits_bits), 16))
        rows = min(1 << (rows.bit_length() - 1), triton.next_power_of_2(vocab))
        return cls(**tiles, logits=Launch(block_h, rows, 8))


def linear_launch(
    inputs: int, outputs: int, matrices: int, bits: int, device: DeviceClass
) -> Launch:
    """The launch of a projection that stands alone: a sparse step's for as many matrices."""
    name = {1: "down", 2: "gate_up", 3: "qkv"}[matrices]
    table = _TABLES.get((device.capability, bits), {}).get(SPARSE, {})
    return fit(table.get(name, _PLAIN[bits]), inputs, outputs, bits, 2 * device.processors)


def attention_chunk(positions: int) -> int:
    """Positions that one program of attention takes: 64, or a 32nd of them all.

    On an H100 with 8 key-value heads, 64 is fastest up to 1,000 positions, 128 from there to 3,000;
    more than 32 parts make putting them together slow.
    """
    whole = max(16, triton.next_power_of_2(positions))
    return min(whole, max(64, whole // 32))


def regime_of(sparsity: float) -> float:
    """The regime that a sparsity falls into."""
    return max(start for start in REGIMES if start <= max(sparsity, 0.0))


def fit(launch: Launch, inputs: int, outputs: int, bits: int, programs: int = 0) -> Launch:
    """Shrink a tile to a small matrix, and until there are as many programs as asked for."""
    least = max(16, 256 // bits)
    block_k = min(launch.block_k, max(16, triton.next_power_of_2(inputs)))
    block_n = min(launch.block_n, max(least, triton.next_power_of_2(outputs)))
    while (
        block_n > 2048 // bits
        and triton.cdiv(inputs, block_k) * triton.cdiv(outputs, block_n) < programs
    ):
        block_n //= 2
    # Rows are fetched ahead in lines of 128 bytes, and lines start at multiples of them.
    lines = bits >= 8 and block_n * bits >= 1024 and outputs * bits % 1024 == 0
    ahead = launch.ahead if lines else 0
    slots, more = (launch.slots, launch.more) if block_k >= 32 else (0, 0)
    return Launch(block_k, block_n, launch.num_warps, launch.registers, ahead, slots, more)
