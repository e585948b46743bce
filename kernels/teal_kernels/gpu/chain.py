"""The kernels of one token, bound to a model's tensors and launched one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from teal_kernels.gpu import attention, decode
from teal_kernels.gpu.launch import (
    DENSE,
    REGIMES,
    DeviceClass,
    Launch,
    StepLaunches,
    attention_chunk,
)
from teal_kernels.gpu.projection import INTERPRETED
from teal_kernels.gpu.sample import Choice, Chooser
from teal_kernels.gpu.tensors import Geometry, LayerTensors, Stored, bits_of
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows

PROJECTIONS = 7  # q k v o gate up down: columns of the thresholds and of the counters
_FIRST = {"qkv": 0, "o": 3, "gate_up": 4, "down": 6}


class Chain:
    """Tensors, buffers and launches of a token step."""

    def __init__(
        self,
        *,
        layers: Sequence[LayerTensors],
        embed_tokens: Tensor,
        norm: Tensor,
        lm_head: Tensor | QuantizedRows,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_attention_heads: int,
        rms_norm_eps: float,
        sliding_windows: Sequence[int | None],
        launches: Mapping[float, StepLaunches] | None = None,
        dependent_launch: bool | None = None,
        deterministic: bool = False,
    ) -> None:
        """Bind the step to tensors, which it reads (and of the cache, writes) in place.

        Args:
            layers: objects with the attributes of `LayerTensors`, all of one dtype and device;
                quantized matrices all of one kind.
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
            launches: tiles and warps, by the sparsity from which they are used (`REGIMES`); None
                takes them from the table.
            dependent_launch: None uses it from compute capability 9.0 on.
            deterministic: sum in fixed point (36 bits of fraction in int64), so that the same
                token at the same position gives the same bits in every run.
        """
        self.geometry = Geometry(
            num_attention_heads, keys.shape[1], keys.shape[3], rms_norm_eps, sliding_windows
        )
        self.layers = layers
        self.embed_tokens, self.norm, self.lm_head = embed_tokens, norm, lm_head
        self.cos, self.sin, self.keys, self.values = cos, sin, keys, values
        device = embed_tokens.device
        self.device = device
        self.hidden, self.vocab = embed_tokens.shape[1], embed_tokens.shape[0]
        self.context = keys.shape[2]
        self.reach = self.context  # positions that attention's launches cover, from the first
        first = layers[0]
        shapes = {
            "qkv": tuple(first.qkv.shape),
            "o": tuple(first.o.shape),
            "gate_up": tuple(first.gate_up.shape),
            "down": tuple(first.down.shape),
            "logits": (self.hidden, self.vocab),
        }
        # Dense and sparse steps differ only in their launches, and so in their graphs.
        self.choices = launches or {
            regime: StepLaunches.choose(
                shapes,
                bits_of(first.qkv),
                logits_bits=bits_of(lm_head),
                regime=regime,
                device=DeviceClass.of(device),
            )
            for regime in REGIMES
        }
        self.launches = self.choices[DENSE]
        if dependent_launch is None:
            dependent_launch = device.type == "cuda" and torch.cuda.get_device_capability(
                device
            ) >= (9, 0)
        self.pdl = dependent_launch
        self._launch = partial(_launch, dependent_launch)
        self.resident = 0  # programs that the device holds at a time
        if device.type == "cuda":
            self.resident = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        self._allocate(torch.int64 if deterministic else torch.float32)

    def _allocate(self, accumulator: torch.dtype) -> None:
        g = self.geometry
        heads, dim = g.num_attention_heads, g.head_dim
        # The most that there are at any reach.
        splits = min(32, triton.cdiv(self.context, min(64, self.chunk)))

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.h = buffer(self.hidden, dtype=accumulator)
        self.qkv = buffer(self.layers[0].qkv.shape[1], dtype=accumulator)
        self.gate_up = buffer(self.layers[0].gate_up.shape[1], dtype=accumulator)
        self.parts = buffer(splits, heads * dim)
        self.maxima, self.sums = buffer(splits, heads), buffer(splits, heads)
        self.scales = buffer(len(self.layers), 2)  # 1 / rms of h, at both norms of a layer
        self.logits = buffer(self.vocab)
        self.token, self.position = buffer(1, dtype=torch.int32), buffer(1, dtype=torch.int32)
        # Device buffers, so that another sparsity needs no new capture.
        self.thresholds = buffer(len(self.layers), PROJECTIONS)
        self._kept = buffer(len(self.layers), PROJECTIONS, dtype=torch.int32)
        self.chooser = Chooser(
            self._launch, self.logits, self.token, self.position, self._kept, self.context
        )

    def launch_all(self, choice: Choice | None) -> None:
        """Launch a step for every position below `reach`; None leaves the token unchosen."""
        block = min(1024, triton.next_power_of_2(self.hidden))
        self._launch(
            decode.embed_kernel,
            (triton.cdiv(self.hidden, block),),
            4,
            self.h,
            self.token,
            self.embed_tokens,
            self.scales,
            self.hidden,
            self.embed_tokens.stride(0),
            self.scales.numel(),
            BLOCK=block,
            BLOCK_S=triton.next_power_of_2(self.scales.numel()),
        )
        for index, layer in enumerate(self.layers):
            self.project("qkv", index)
            self._attention(index, layer)
            for name in ("o", "gate_up", "down"):
                self.project(name, index)
        self.project("logits")
        if choice is not None:
            self.chooser.launch(choice)

    @property
    def chunk(self) -> int:
        """Positions that one program of attention takes."""
        return attention_chunk(self.reach)

    def project(self, name: str, index: int = 0) -> None:
        """Launch one matrix of a layer ("qkv", "o", "gate_up", "down"), or "logits"."""
        layer = self.layers[index]
        if name == "o":
            self._combine_project(index, layer)
        elif name == "down":
            self._activate_project(index, layer)
        elif name == "logits":
            self._project_logits()
        elif name == "qkv":
            g = self.geometry
            q, kv = g.num_attention_heads * g.head_dim, g.num_key_value_heads * g.head_dim
            widths = (q, kv, kv)
            self._norm_project(name, index, layer.input_layernorm, layer.qkv, self.qkv, widths)
        else:
            widths = (self.gate_up.numel() // 2, self.gate_up.numel() // 2, 0)
            norm, weight = layer.post_attention_layernorm, layer.gate_up
            self._norm_project(name, index, norm, weight, self.gate_up, widths, zero=self.qkv)

    def _project_logits(self) -> None:
        logits, head = self.launches.logits, self.lm_head
        rows: Tensor
        scales: Tensor | None
        if isinstance(head, QuantizedRows):
            rows, scales, pack = head.rows.view(torch.int32), head.scales, 4
        else:
            rows, scales, pack = head, None, 1
        self._launch(
            decode.logits_kernel,
            (triton.cdiv(self.vocab, logits.block_n),),
            logits.num_warps,
            self.logits,
            self.h,
            self.norm,
            rows,
            scales,
            self.geometry.rms_norm_eps,
            self.hidden // pack,
            self.vocab,
            rows.stride(0),
            BLOCK_H=logits.block_k // pack,
            BLOCK_V=logits.block_n,
        )

    def _norm_project(
        self,
        name: str,
        index: int,
        norm: Tensor,
        weight: Tensor | QuantizedMatrix,
        out: Tensor,
        widths: tuple[int, int, int],
        zero: Tensor | None = None,
    ) -> None:
        launch: Launch = getattr(self.launches, name)
        grid = launch.grid(self.hidden, *widths)
        stored = Stored.of(weight)
        self._launch(
            decode.norm_project_kernel,
            grid,
            launch.num_warps,
            out,
            self.h,
            self.scales[index, int(name == "gate_up") :],
            norm,
            *stored[:4],
            *self._buffers(name, index),
            zero,
            0 if zero is None else zero.numel(),
            self.geometry.rms_norm_eps,
            self.hidden,
            N0=widths[0] // stored.pack,
            N1=widths[1] // stored.pack,
            N2=widths[2] // stored.pack,
            ZERO=_share(zero, grid),
            BLOCK_H=triton.next_power_of_2(self.hidden),
            **self._tile(launch, stored),
        )

    def _attention(self, index: int, layer: LayerTensors) -> None:
        g = self.geometry
        group = g.num_attention_heads // g.num_key_value_heads
        self._launch(
            attention.attention_kernel,
            (g.num_key_value_heads, triton.cdiv(self.reach, self.chunk)),
            4,
            self.parts,
            self.maxima,
            self.sums,
            self.qkv,
            layer.qkv_bias,
            layer.q_norm,
            layer.k_norm,
            self.cos,
            self.sin,
            self.keys[index],
            self.values[index],
            self.position,
            g.head_dim**-0.5,
            g.rms_norm_eps,
            self.keys.stride(1),
            HEADS=g.num_attention_heads,
            KV_HEADS=g.num_key_value_heads,
            HEAD_DIM=g.head_dim,
            BIAS=layer.qkv_bias is not None,
            QK_NORM=layer.q_norm is not None,
            WINDOW=g.sliding_windows[index] or 0,
            CHUNK=self.chunk,
            BLOCK_T=min(64, self.chunk),
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_HALF=max(16, triton.next_power_of_2(g.head_dim // 2)),
            # The interpreter's dot is wrong in bfloat16.
            DOT=_DOT[torch.float32 if INTERPRETED else self.keys.dtype],
        )

    def _combine_project(self, index: int, layer: LayerTensors) -> None:
        g = self.geometry
        launch, chunk = self.launches.o, self.chunk
        grid = launch.grid(layer.o.shape[0], self.hidden)
        stored = Stored.of(layer.o)
        self._launch(
            decode.combine_project_kernel,
            grid,
            launch.num_warps,
            self.h,
            self.parts,
            self.maxima,
            self.sums,
            self.position,
            *stored[:4],
            layer.o_bias,
            *self._buffers("o", index),
            self.gate_up,
            self.gate_up.numel(),
            self.hidden // stored.pack,
            HEADS=g.num_attention_heads,
            HEAD_DIM=g.head_dim,
            BIAS=layer.o_bias is not None,
            WINDOW=g.sliding_windows[index] or 0,
            CHUNK=chunk,
            SPLITS=triton.next_power_of_2(triton.cdiv(self.reach, chunk)),
            ZERO=_share(self.gate_up, grid),
            **self._tile(launch, stored),
        )

    def _activate_project(self, index: int, layer: LayerTensors) -> None:
        launch, stored = self.launches.down, Stored.of(layer.down)
        self._launch(
            decode.activate_project_kernel,
            launch.grid(layer.down.shape[0], self.hidden),
            launch.num_warps,
            self.h,
            self.gate_up,
            *stored[:4],
            *self._buffers("down", index),
            layer.down.shape[0],
            self.hidden // stored.pack,
            **self._tile(launch, stored),
        )

    def _tile(self, launch: Launch, stored: Stored) -> dict[str, Any]:
        return {
            "STRIDE_K": stored.elements.stride(0),
            "GROUP": stored.group,
            "AHEAD": launch.ahead if self.pdl else 0,
            "PROGRAMS": self.resident,
            "BLOCK_K": launch.block_k,
            "BLOCK_N": launch.block_n // stored.pack,
            "SLOTS": launch.slots,
            "MORE": launch.more,
            "maxnreg": launch.registers,
        }

    def _buffers(self, name: str, index: int) -> tuple[Tensor, Tensor]:
        first = _FIRST[name]
        return self.thresholds[index, first:], self._kept[index, first:]


def _launch(
    pdl: bool, kernel: Any, grid: tuple[int, ...], num_warps: int, *args: Any, **constants: Any
) -> None:
    options = {"launch_pdl": True} if pdl else {}
    kernel[grid](*args, **constants, PDL=pdl, num_warps=num_warps, num_stages=1, **options)


_DOT = {
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
    torch.float32: triton.language.float32,
}


def _share(buffer: Tensor | None, grid: tuple[int, int]) -> int:
    """Elements that each program of a grid clears, a power of two."""
    if buffer is None:
        return 0
    return max(32, triton.next_power_of_2(triton.cdiv(buffer.numel(), grid[0] * grid[1])))
