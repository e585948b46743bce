"""The kernels of one token, bound to a model's tensors and launched one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from teal_kernels.gpu import attention, decode
from teal_kernels.gpu.handover import INTERPRETED
from teal_kernels.gpu.launch import (
    DENSE,
    REGIMES,
    DeviceClass,
    Launch,
    StepLaunches,
    attention_chunk,
)
from teal_kernels.gpu.sample import Choice, Chooser
from teal_kernels.gpu.stored import Stored
from teal_kernels.quantized import QuantizedRows
from teal_kernels.tensors import MATRICES, PROJECTIONS, RecoveryVectors, StepTensors, bits_of


class Chain:
    """Tensors, buffers and launches of a token step."""

    def __init__(
        self,
        tensors: StepTensors,
        *,
        launches: Mapping[float, StepLaunches] | None = None,
        dependent_launch: bool | None = None,
        deterministic: bool = False,
    ) -> None:
        """Bind the kernels to tensors.

        Args:
            tensors: the decoder's.
            launches: tiles and warps, by the sparsity from which they are used (`REGIMES`); None
                takes them from the table.
            dependent_launch: None uses it from compute capability 9.0 on.
            deterministic: sum in fixed point (36 bits of fraction in int64), so that the same
                token at the same position gives the same bits in every run.
        """
        self.tensors = tensors
        self.device = device = tensors.embed_tokens.device
        self.reach = tensors.length  # positions that attention's launches cover, from the first
        # Dense and sparse steps differ only in their launches, and so in their graphs.
        self.choices = launches or _from_table(tensors)
        self.launches = self.choices[DENSE]
        if dependent_launch is None:
            dependent_launch = device.type == "cuda" and torch.cuda.get_device_capability(
                device
            ) >= (9, 0)
        self.pdl = dependent_launch
        self._launch = partial(launch, dependent_launch)
        self.resident = 0  # programs that the device holds at a time
        if device.type == "cuda":
            self.resident = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        self._allocate(torch.int64 if deterministic else torch.float32)

    def _allocate(self, accumulator: torch.dtype) -> None:
        t = self.tensors
        heads, layers = t.num_attention_heads, len(t.layers)
        # The most that there are at any reach.
        splits = min(32, triton.cdiv(t.length, min(64, self.chunk)))

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.h = buffer(t.hidden_size, dtype=accumulator)
        self.qkv = buffer(sum(t.widths("qkv")), dtype=accumulator)
        self.gate_up = buffer(sum(t.widths("gate_up")), dtype=accumulator)
        self.parts = buffer(splits, heads * t.head_dim)
        self.maxima, self.sums = buffer(splits, heads), buffer(splits, heads)
        self.scales = buffer(layers, 2)  # 1 / rms of h, at both norms of a layer
        self.logits = buffer(t.vocab_size)
        self.token, self.position = buffer(1, dtype=torch.int32), buffer(1, dtype=torch.int32)
        # Device buffers, so that another sparsity needs no new capture.
        self.thresholds = buffer(layers, PROJECTIONS)
        self.kept = buffer(layers, PROJECTIONS, dtype=torch.int32)
        self.biases = {name: buffer(layers, sum(t.widths(name))) for name in MATRICES}
        self.norms, self.norm = buffer(layers, 2, t.hidden_size), buffer(t.hidden_size)
        self.set_vectors(None)
        self.chooser = Chooser(
            self._launch, self.logits, self.token, self.position, self.kept, t.length
        )

    def set_vectors(self, vectors: RecoveryVectors | None) -> None:
        """Add these biases from the next token on and use these norms; None is the model's own."""
        used = self.tensors.vectors(vectors)
        for name, biases in self.biases.items():
            biases.copy_(getattr(used, name))
        self.norms[:, 0].copy_(used.input_layernorm)
        self.norms[:, 1].copy_(used.post_attention_layernorm)
        self.norm.copy_(used.norm)

    def launch_all(self, choice: Choice | None) -> None:
        """Launch a step for every position below `reach`; None leaves the token unchosen."""
        hidden, embed = self.tensors.hidden_size, self.tensors.embed_tokens
        block = min(1024, triton.next_power_of_2(hidden))
        programs = triton.cdiv(hidden, block)
        self._launch(
            decode.embed_kernel,
            (programs,),
            4,
            h_ptr=self.h,
            token_ptr=self.token,
            embed_ptr=embed,
            scales_ptr=self.scales,
            H=hidden,
            stride=embed.stride(0),
            MULTIPLIER=self.tensors.embedding_multiplier,
            scales=self.scales.numel(),
            BLOCK=block,
            BLOCK_S=triton.next_power_of_2(self.scales.numel()),
            **_later(self.qkv, self.biases["qkv"][0], programs),
        )
        for index in range(len(self.tensors.layers)):
            self.project("qkv", index)
            self.attend(index)
            for name in ("o", "gate_up", "down"):
                self.project(name, index)
        self.project_logits(self.tensors.lm_head)
        if choice is not None:
            self.chooser.launch(choice)

    @property
    def chunk(self) -> int:
        """Positions that one program of attention takes."""
        return attention_chunk(self.reach)

    def project(self, name: str, index: int) -> None:
        """Launch one of a layer's `MATRICES`, with the operations that feed it."""
        if name == "o":
            self._combine_project(index)
        elif name == "down":
            self._activate_project(index)
        else:
            self._norm_project(name, index)

    def project_logits(self, lm_head: Tensor | QuantizedRows) -> None:
        """Launch the product with an lm_head, the decoder's or one like it."""
        t, launch = self.tensors, self.launches.logits
        rows: Tensor
        scales: Tensor | None
        if isinstance(lm_head, QuantizedRows):
            rows, scales, pack = lm_head.rows.view(torch.int32), lm_head.scales, 4
        else:
            rows, scales, pack = lm_head, None, 1
        self._launch(
            decode.logits_kernel,
            (triton.cdiv(t.vocab_size, launch.block_n),),
            launch.num_warps,
            logits_ptr=self.logits,
            h_ptr=self.h,
            norm_ptr=self.norm,
            w_ptr=rows,
            scales_ptr=scales,
            eps=t.rms_norm_eps,
            H=t.hidden_size // pack,
            V=t.vocab_size,
            stride_wv=rows.stride(0),
            MULTIPLIER=t.logits_multiplier,
            BLOCK_H=launch.block_k // pack,
            BLOCK_V=launch.block_n,
        )

    def attend(self, index: int) -> None:
        """Launch a layer's attention, which caches the token's key and value."""
        t, layer = self.tensors, self.tensors.layers[index]
        group = t.num_attention_heads // t.num_key_value_heads
        self._launch(
            attention.attention_kernel,
            (t.num_key_value_heads, triton.cdiv(self.reach, self.chunk)),
            4,
            parts_ptr=self.parts,
            maxima_ptr=self.maxima,
            sums_ptr=self.sums,
            qkv_ptr=self.qkv,
            q_norm_ptr=layer.q_norm,
            k_norm_ptr=layer.k_norm,
            cos_ptr=t.cos,
            sin_ptr=t.sin,
            keys_ptr=t.keys[index],
            values_ptr=t.values[index],
            position_ptr=self.position,
            scales_ptr=t.query_scales,
            eps=t.rms_norm_eps,
            stride_head=t.keys.stride(1),
            HEADS=t.num_attention_heads,
            KV_HEADS=t.num_key_value_heads,
            HEAD_DIM=t.head_dim,
            ROTARY=t.rotary_dims[index],
            STRIDE_COS=t.cos.stride(0),
            QK_NORM=layer.q_norm is not None,
            WINDOW=t.sliding_windows[index] or 0,
            CHUNK=self.chunk,
            BLOCK_T=min(64, self.chunk),
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_HALF=max(16, triton.next_power_of_2(t.head_dim // 2)),
            # The interpreter's dot is wrong in bfloat16.
            DOT=DOT[torch.float32 if INTERPRETED else t.keys.dtype],
        )

    def _norm_project(self, name: str, index: int) -> None:
        t, programs = self.tensors, math.prod(self._grid(name, index))
        second, out, later = 0, self.qkv, _later(None, None, programs)
        if name == "gate_up":
            # Of the layer after; what the last one sets, the embedding sets again.
            biases = self.biases["qkv"][index + 1 - len(t.layers)]
            second, out, later = 1, self.gate_up, _later(self.qkv, biases, programs)
        n0, n1, n2 = (*self._columns(name, index), 0)[:3]
        self._project(
            decode.norm_project_kernel,
            name,
            index,
            y_ptr=out,
            h_ptr=self.h,
            scale_ptr=self.scales[index, second:],
            norm_ptr=self.norms[index, second],
            eps=t.rms_norm_eps,
            H=t.hidden_size,
            N0=n0,
            N1=n1,
            N2=n2,
            BLOCK_H=triton.next_power_of_2(t.hidden_size),
            THREADS=32 * getattr(self.launches, name).num_warps,
            **later,
        )

    def _combine_project(self, index: int) -> None:
        t, programs = self.tensors, math.prod(self._grid("o", index))
        self._project(
            decode.combine_project_kernel,
            "o",
            index,
            y_ptr=self.h,
            parts_ptr=self.parts,
            maxima_ptr=self.maxima,
            sums_ptr=self.sums,
            position_ptr=self.position,
            bias_ptr=self.biases["o"][index],
            N=self._columns("o", index)[0],
            HEADS=t.num_attention_heads,
            HEAD_DIM=t.head_dim,
            MULTIPLIER=t.residual_multiplier,
            WINDOW=t.sliding_windows[index] or 0,
            CHUNK=self.chunk,
            SPLITS=triton.next_power_of_2(triton.cdiv(self.reach, self.chunk)),
            **_later(self.gate_up, self.biases["gate_up"][index], programs),
        )

    def _activate_project(self, index: int) -> None:
        self._project(
            decode.activate_project_kernel,
            "down",
            index,
            y_ptr=self.h,
            gate_up_ptr=self.gate_up,
            bias_ptr=self.biases["down"][index],
            INNER=self.tensors.intermediate_size,
            N=self._columns("down", index)[0],
            MULTIPLIER=self.tensors.residual_multiplier,
        )

    def _project(self, kernel: Any, name: str, index: int, **arguments: Any) -> None:
        """Launch a projection, which also takes its matrix, thresholds, counts and tile."""
        launch: Launch = getattr(self.launches, name)
        stored, first = self._stored(name, index), MATRICES[name]
        self._launch(
            kernel,
            self._grid(name, index),
            launch.num_warps,
            **arguments,
            **stored.arguments(),
            thresholds_ptr=self.thresholds[index, first:],
            kept_ptr=self.kept[index, first:],
            AHEAD=launch.ahead if self.pdl else 0,
            PROGRAMS=self.resident,
            BLOCK_K=launch.block_k,
            BLOCK_N=launch.block_n // stored.pack,
            SLOTS=launch.slots,
            MORE=launch.more,
            maxnreg=launch.registers,
        )

    def _stored(self, name: str, index: int) -> Stored:
        return Stored.of(getattr(self.tensors.layers[index], name))

    def _columns(self, name: str, index: int) -> list[int]:
        """Stored elements of the projections that stand side by side in a matrix."""
        pack = self._stored(name, index).pack
        return [width // pack for width in self.tensors.widths(name)]

    def _grid(self, name: str, index: int) -> tuple[int, int]:
        launch: Launch = getattr(self.launches, name)
        inputs = getattr(self.tensors.layers[index], name).shape[0]
        return launch.grid(inputs, *self.tensors.widths(name))


def _later(buffer: Tensor | None, biases: Tensor | None, programs: int) -> dict[str, Any]:
    """An accumulator that a kernel starts for a later one, in equal parts of a power of two."""
    size = 0 if buffer is None else buffer.numel()
    share = max(32, triton.next_power_of_2(triton.cdiv(size, programs))) if size else 0
    names = ("later_ptr", "later_bias_ptr", "later_size", "LATER")
    return dict(zip(names, (buffer, biases, size, share), strict=True))


def _from_table(tensors: StepTensors) -> dict[float, StepLaunches]:
    first = tensors.layers[0]
    shapes = {name: tuple(getattr(first, name).shape) for name in MATRICES}
    return {
        regime: StepLaunches.choose(
            shapes | {"logits": (tensors.hidden_size, tensors.vocab_size)},
            bits_of(first.qkv),
            logits_bits=bits_of(tensors.lm_head),
            regime=regime,
            device=DeviceClass.of(tensors.embed_tokens.device),
        )
        for regime in REGIMES
    }


def launch(pdl: bool, kernel: Any, grid: tuple[int, ...], num_warps: int, **arguments: Any) -> None:
    options = {"launch_pdl": True} if pdl else {}
    kernel[grid](**arguments, PDL=pdl, num_warps=num_warps, num_stages=1, **options)


DOT = {
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
    torch.float32: triton.language.float32,
}
