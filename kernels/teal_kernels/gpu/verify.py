"""Several tokens of one sequence through the dense decoder at once, captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from teal_kernels.gpu import verify_kernels as kernels
from teal_kernels.gpu import verify_products as products
from teal_kernels.gpu.chain import DOT, launch
from teal_kernels.gpu.handover import INTERPRETED
from teal_kernels.gpu.launch import DeviceClass, attention_chunk
from teal_kernels.gpu.step import FIRST_REACH, captured
from teal_kernels.gpu.verify_launch import HEAD_TILES, product, split
from teal_kernels.quantized import QuantizedMatrix
from teal_kernels.tensors import MATRICES, StepTensors

# Tokens of a call: the last one that is certain, and those that are to be verified.
ROWS = 8


class VerifyStep:
    """Runs up to ROWS tokens a call, over the weights and the cache of a `DecodeStep`.

    Weights are read once for all of them, on the way to the tensor cores.

    A graph serves every number of tokens; rows beyond it compute what nobody reads, and cache
    nothing. There is a graph for each reach, as in `DecodeStep`. Sums are float32, in one order for
    every run, which is another one than a `DecodeStep`'s.
    """

    def __init__(
        self,
        tensors: StepTensors,
        *,
        dependent_launch: bool | None = None,
        capture: bool = True,
    ) -> None:
        """Bind the step to tensors; without `capture` no graph is made."""
        self.tensors, device = tensors, tensors.embed_tokens.device
        self.capture = capture and device.type == "cuda"
        capability = DeviceClass.of(device).capability
        if dependent_launch is None:
            dependent_launch = capability >= (9, 0)
        self._launch = partial(launch, dependent_launch)
        self._dependent = dependent_launch
        self._tensor_cores = INTERPRETED or (
            capability >= (8, 0) and tensors.keys.dtype != torch.float32
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.reach = tensors.length
        self._allocate()

    def __call__(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [T, vocab_size] float32 after each of T tokens, the first one at `position`.

        Their keys and values are cached.

        Raises:
            ValueError: there are none or more than ROWS, or one is out of range.
        """
        return self.run(tokens, position).clone()

    def run(self, tokens: Sequence[int], position: int, guesses: Tensor | None = None) -> Tensor:
        """The same, waiting for nothing; the next run writes over the logits.

        Args:
            tokens: what the host knows, at least one.
            position: of the first.
            guesses: [n] int32 that follow them, on the device; all in range.
        """
        t, known = self.tensors, len(tokens)
        count = known if guesses is None else known + len(guesses)
        inside = all(0 <= token < t.vocab_size for token in tokens)
        if not 0 < known <= count <= ROWS or not inside or not 0 <= position <= t.length - count:
            raise ValueError(
                f"tokens {tokens} at position {position} are not 1 to {ROWS} of "
                f"{t.vocab_size} tokens in {t.length} positions"
            )
        padded = [*tokens, *(0,) * (ROWS - known), position, count]
        # Pinned memory is copied when the device comes to it, and not taken again before.
        staged = torch.tensor(padded, dtype=torch.int32, pin_memory=self.inputs.is_cuda)
        self.inputs.copy_(staged, non_blocking=True)
        if guesses is not None:
            self.inputs[known:count].copy_(guesses)
        reach = FIRST_REACH
        while reach < position + count:
            reach *= 2
        self.reach = min(reach, t.length)
        if graph := self._graphs.get(self.reach):
            graph.replay()
        else:
            with torch.cuda.device_of(self.h):
                self.launch_all()
                if self.capture:
                    self._graphs[self.reach] = captured(self.launch_all)
        return self.logits[:count]

    def launch_all(self) -> None:
        """Launch a step for all positions below `reach`."""
        t, block = self.tensors, min(1024, triton.next_power_of_2(self.tensors.hidden_size))
        self._launch(
            kernels.embed_rows_kernel,
            (ROWS, triton.cdiv(t.hidden_size, block)),
            4,
            h_ptr=self.h,
            tokens_ptr=self.inputs,
            embed_ptr=t.embed_tokens,
            H=t.hidden_size,
            stride=t.embed_tokens.stride(0),
            MULTIPLIER=t.embedding_multiplier,
            BLOCK=block,
        )
        added: Tensor | None = None  # what h has yet to gain
        bias: Tensor | None = None
        for index, layer in enumerate(t.layers):
            self._norm(added, bias, layer.input_layernorm)
            self._place(index, self._product(self.normed, layer.qkv))
            self._attend(index)
            added = self._product(self.attended, layer.o)
            self._norm(added, layer.o_bias, layer.post_attention_layernorm)
            self._activate(self._product(self.normed, layer.gate_up))
            added, bias = self._product(self.activated, layer.down), None
        self._norm(added, bias, t.norm)
        self._project_logits()

    def _allocate(self) -> None:
        t, heads = self.tensors, self.tensors.num_attention_heads

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=t.embed_tokens.device)

        # The most splits that there are at any reach.
        splits = min(32, triton.cdiv(t.length, min(64, attention_chunk(t.length))))
        dtype = t.embed_tokens.dtype
        self.inputs = buffer(ROWS + 2, dtype=torch.int32)  # tokens, position, their number
        self.position, self.count = self.inputs[ROWS:], self.inputs[ROWS + 1 :]
        self.h = buffer(ROWS, t.hidden_size)
        self.normed = buffer(ROWS, t.hidden_size, dtype=dtype)
        self.queries = buffer(ROWS, heads * t.head_dim, dtype=dtype)
        self.attended = buffer(ROWS, heads * t.head_dim, dtype=dtype)
        self.activated = buffer(ROWS, t.intermediate_size, dtype=dtype)
        self.parts = buffer(splits, ROWS, heads, t.head_dim)
        self.maxima, self.sums = buffer(splits, ROWS, heads), buffer(splits, ROWS, heads)
        self.logits = buffer(ROWS, t.vocab_size)
        most = max(
            split(weight, tensor_cores=self._tensor_cores)[0] * weight.shape[1]
            for weight in (getattr(t.layers[0], name) for name in MATRICES)
        )
        # Of one product: the kernel after it has read them when the next one is begun.
        self._sums = buffer(ROWS * most)

    def _norm(self, added: Tensor | None, bias: Tensor | None, norm: Tensor) -> None:
        hidden = self.tensors.hidden_size
        self._launch(
            kernels.norm_rows_kernel,
            (ROWS,),
            16 if hidden > 2048 else 8,
            x_ptr=self.normed,
            h_ptr=self.h,
            parts_ptr=added,
            bias_ptr=bias,
            norm_ptr=norm,
            size=ROWS * hidden,
            eps=self.tensors.rms_norm_eps,
            H=hidden,
            MULTIPLIER=self.tensors.residual_multiplier,
            PARTS=0 if added is None else len(added),
            BLOCK_H=triton.next_power_of_2(hidden),
        )

    def _product(self, x: Tensor, weight: Tensor | QuantizedMatrix) -> Tensor:
        """x [ROWS, K] → float32 [parts, ROWS, N], to be added up by the next kernel."""
        parts, _ = split(weight, tensor_cores=self._tensor_cores)
        outputs = weight.shape[1]
        sums = self._sums[: parts * ROWS * outputs].view(parts, ROWS, outputs)
        kernel, grid, arguments = product(
            weight, tensor_cores=self._tensor_cores, ahead=self._dependent
        )
        self._launch(
            kernel, grid, 4, parts_ptr=sums, x_ptr=x, ROWS=ROWS, DOT=self._dot, **arguments
        )
        return sums

    def _place(self, index: int, sums: Tensor) -> None:
        t, layer = self.tensors, self.tensors.layers[index]
        self._launch(
            kernels.place_rows_kernel,
            (ROWS, t.num_attention_heads + 2 * t.num_key_value_heads),
            1,
            q_ptr=self.queries,
            parts_ptr=sums,
            bias_ptr=layer.qkv_bias,
            q_norm_ptr=layer.q_norm,
            k_norm_ptr=layer.k_norm,
            cos_ptr=t.cos,
            sin_ptr=t.sin,
            scales_ptr=t.query_scales,
            keys_ptr=t.keys[index],
            values_ptr=t.values[index],
            position_ptr=self.position,
            count_ptr=self.count,
            size=sums[0].numel(),
            eps=t.rms_norm_eps,
            stride_head=t.keys.stride(1),
            HEADS=t.num_attention_heads,
            KV_HEADS=t.num_key_value_heads,
            HEAD_DIM=t.head_dim,
            ROTARY=t.rotary_dims[index],
            STRIDE_COS=t.cos.stride(0),
            PARTS=len(sums),
            BLOCK_HALF=triton.next_power_of_2(t.head_dim // 2),
        )

    def _attend(self, index: int) -> None:
        t, chunk = self.tensors, attention_chunk(self.reach)
        splits = triton.cdiv(self.reach, chunk)
        group = t.num_attention_heads // t.num_key_value_heads
        about: dict[str, Any] = {
            "parts_ptr": self.parts,
            "maxima_ptr": self.maxima,
            "sums_ptr": self.sums,
            "position_ptr": self.position,
            "count_ptr": self.count,
            "ROWS": ROWS,
            "HEADS": t.num_attention_heads,
            "HEAD_DIM": t.head_dim,
            "WINDOW": t.sliding_windows[index] or 0,
            "CHUNK": chunk,
            "BLOCK_D": max(16, triton.next_power_of_2(t.head_dim)),
        }
        self._launch(
            kernels.attention_rows_kernel,
            (t.num_key_value_heads, splits),
            4,
            q_ptr=self.queries,
            keys_ptr=t.keys[index],
            values_ptr=t.values[index],
            stride_head=t.keys.stride(1),
            KV_HEADS=t.num_key_value_heads,
            BLOCK_T=min(64, chunk),
            BLOCK_R=max(16, triton.next_power_of_2(ROWS * group)),
            DOT=self._dot,
            **about,
        )
        self._launch(
            kernels.combine_rows_kernel,
            (ROWS, t.num_attention_heads),
            1,
            x_ptr=self.attended,
            SPLITS=triton.next_power_of_2(splits),
            **about,
        )

    def _activate(self, sums: Tensor) -> None:
        inner = self.tensors.intermediate_size
        block = min(1024, triton.next_power_of_2(inner))
        self._launch(
            kernels.activate_rows_kernel,
            (ROWS, triton.cdiv(inner, block)),
            4,
            x_ptr=self.activated,
            parts_ptr=sums,
            size=sums[0].numel(),
            INNER=inner,
            PARTS=len(sums),
            BLOCK=block,
        )

    def _project_logits(self) -> None:
        t, head = self.tensors, self.tensors.lm_head
        rows, scales = (head, None) if isinstance(head, Tensor) else (head.rows, head.scales)
        block_h, block_v, stages = HEAD_TILES[8 * rows.element_size()]
        self._launch(
            products.logits_rows_kernel,
            (triton.cdiv(t.vocab_size, block_v),),
            4,
            logits_ptr=self.logits,
            x_ptr=self.normed,
            w_ptr=rows,
            scales_ptr=scales,
            rows=ROWS,
            H=t.hidden_size,
            V=t.vocab_size,
            stride_w=rows.stride(0),
            MULTIPLIER=t.logits_multiplier,
            BLOCK_H=block_h,
            BLOCK_V=block_v,
            DOT=self._dot,
            STAGES=stages,
        )

    @property
    def _dot(self) -> Any:
        # The interpreter's dot is wrong in bfloat16.
        return DOT[torch.float32 if INTERPRETED else self.tensors.keys.dtype]
