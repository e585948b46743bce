"""Several tokens through the whole decoder at once, dense, captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from teal_kernels.gpu import several
from teal_kernels.gpu.chain import _DOT
from teal_kernels.gpu.handover import INTERPRETED
from teal_kernels.gpu.launch import attention_chunk
from teal_kernels.gpu.sample import Choice, Chooser
from teal_kernels.gpu.step import _FIRST_REACH, _captured
from teal_kernels.tensors import StepTensors

_BLOCK = 1024  # elements of an activation a program


class VerifyStep:
    """Logits, or the tokens that are chosen, after each of a few tokens in one pass.

    The matrices are read once, by the library's own product: captured in a graph, it takes the
    shape of Llama-3-8B 4.98 to 5.00 ms on an H100 for 1 to 8 tokens. Their keys and values are
    cached. The residual stream is float32, and what the matrices multiply is of their dtype.

    There is a graph for each number of tokens, choice and reach, as a `DecodeStep` has them.
    """

    def __init__(self, tensors: StepTensors, *, most: int = 9, capture: bool = True) -> None:
        """Bind to tensors.

        Args:
            tensors: the decoder's, none of them quantized.
            most: tokens of a call.
            capture: False makes no graphs.

        Raises:
            ValueError: a matrix is quantized.
        """
        t, self.tensors = tensors, tensors
        self.weights = [
            {name: _plain(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")}
            for layer in tensors.layers
        ]
        self.lm_head = _plain(tensors.lm_head)
        self.device = t.embed_tokens.device
        self.most = most
        self._capture = capture and self.device.type == "cuda"
        self._graphs: dict[tuple[int, Choice | None, int], torch.cuda.CUDAGraph] = {}
        self._set: tuple[Any, ...] | None = None
        heads, dtype = t.num_attention_heads, t.embed_tokens.dtype
        splits = triton.cdiv(t.length, min(64, attention_chunk(t.length)))

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.tokens, self.position = buffer(most, dtype=torch.int64), buffer(1, dtype=torch.int32)
        self.h, self.logits = buffer(most, t.hidden_size), buffer(most, t.vocab_size)
        self.x = buffer(most, t.hidden_size, dtype=dtype)
        self.added = buffer(most, t.hidden_size, dtype=dtype)
        self.qkv = buffer(most, sum(t.widths("qkv")), dtype=dtype)
        self.q = buffer(most, heads * t.head_dim, dtype=dtype)
        self.seen = buffer(most, heads * t.head_dim, dtype=dtype)
        self.gate_up = buffer(most, 2 * t.intermediate_size, dtype=dtype)
        self.inner = buffer(most, t.intermediate_size, dtype=dtype)
        splits = min(32, splits)
        self.parts = buffer(splits, most, heads * t.head_dim)
        self.maxima, self.sums = buffer(splits, most, heads), buffer(splits, most, heads)
        self.row, self.token = buffer(t.vocab_size), buffer(1, dtype=torch.int32)
        self.at, kept = buffer(1, dtype=torch.int32), buffer(1, 7, dtype=torch.int32)
        self.chooser = Chooser(_launch, self.row, self.token, self.at, kept, t.length)
        self._done = torch.cuda.Event() if self.device.type == "cuda" else None

    def __call__(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [M, vocab_size] float32 after each of M tokens, the first at `position`.

        They are valid until the next call.

        Raises:
            ValueError: there are too many tokens, or they are out of range.
        """
        self._run(tokens, position, None)
        return self.logits[: len(tokens)]

    def choose(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        before: Sequence[int],
    ) -> list[int]:
        """The token that is chosen after each, as `DecodeStep` chooses it; waits for them.

        Args:
            tokens: M of them.
            position: of the first.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: as in `Chooser.set`.
            before: the sequence before them.

        Returns:
            M choices, each if all tokens before it are right; -1 where logits are not finite.
        """
        settings = (temperature, top_k, top_p, seed, min_p, repetition_penalty)
        if self._set is None or settings != self._set[0] or repetition_penalty != 1:
            choice = self.chooser.set(*settings, tokens=(*before, tokens[0]))
            self._set = settings, choice
        self._run(tokens, position, self._set[1])
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.device))
            self._done.synchronize()
        found: list[int] = self.chooser.history[position : position + len(tokens)].tolist()
        return found

    def _run(self, tokens: Sequence[int], position: int, choice: Choice | None) -> None:
        count, t = len(tokens), self.tensors
        if not 1 <= count <= self.most or not 0 <= position <= t.length - count:
            raise ValueError(f"{count} tokens at position {position} are outside {t.length}")
        if not all(0 <= token < t.vocab_size for token in tokens):
            raise ValueError(f"a token is outside {t.vocab_size}")
        self.tokens[:count].copy_(torch.tensor(tokens))
        self.position.fill_(position)
        self.at.fill_(position)
        reach = _FIRST_REACH
        while reach < position + count:
            reach *= 2
        reach = min(reach, t.length)
        kind = (count, choice, reach)
        if graph := self._graphs.get(kind):
            graph.replay()
            return
        with torch.cuda.device_of(self.h):
            launch = partial(self._launch_all, count, choice, reach)
            launch()
            if self._capture:
                self._graphs[kind] = _captured(launch)

    def _launch_all(self, count: int, choice: Choice | None, reach: int) -> None:
        t = self.tensors
        h, x, added = self.h[:count], self.x[:count], self.added[:count]
        h.copy_(t.embed_tokens.index_select(0, self.tokens[:count]))
        self._norm(count, t.layers[0].input_layernorm, add=False)
        for index, (layer, weights) in enumerate(zip(t.layers, self.weights, strict=True)):
            torch.mm(x, weights["qkv"], out=self.qkv[:count])
            self._attend(index, count, reach)
            torch.mm(self.seen[:count], weights["o"], out=added)
            self._norm(count, layer.post_attention_layernorm, bias=layer.o_bias)
            torch.mm(x, weights["gate_up"], out=self.gate_up[:count])
            several.activate_kernel[(count, triton.cdiv(t.intermediate_size, _BLOCK))](
                self.inner, self.gate_up, t.intermediate_size, BLOCK=_BLOCK
            )
            torch.mm(self.inner[:count], weights["down"], out=added)
            last = index + 1 == len(t.layers)
            self._norm(count, t.norm if last else t.layers[index + 1].input_layernorm)
        self.logits[:count].copy_(_logits(x, self.lm_head))
        if choice is not None:
            for row in self.logits[:count]:
                self.row.copy_(row)
                self.chooser.launch(choice)

    def _norm(
        self, count: int, norm: Tensor, *, add: bool = True, bias: Tensor | None = None
    ) -> None:
        hidden = self.tensors.hidden_size
        several.norm_kernel[(count,)](
            x_ptr=self.x,
            h_ptr=self.h,
            added_ptr=self.added,
            bias_ptr=bias,
            norm_ptr=norm,
            eps=self.tensors.rms_norm_eps,
            H=hidden,
            ADD=add,
            BIAS=bias is not None,
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=8,
        )

    def _attend(self, index: int, count: int, reach: int) -> None:
        t, layer = self.tensors, self.tensors.layers[index]
        heads, kv_heads = t.num_attention_heads, t.num_key_value_heads
        window, chunk = t.sliding_windows[index] or 0, attention_chunk(reach)
        keys, values = t.keys[index], t.values[index]
        half = max(16, triton.next_power_of_2(t.head_dim // 2))
        shape = {"HEADS": heads, "HEAD_DIM": t.head_dim}
        several.rotate_kernel[(count, heads + 2 * kv_heads)](
            q_ptr=self.q,
            keys_ptr=keys,
            values_ptr=values,
            qkv_ptr=self.qkv,
            bias_ptr=layer.qkv_bias,
            q_norm_ptr=layer.q_norm,
            k_norm_ptr=layer.k_norm,
            cos_ptr=t.cos,
            sin_ptr=t.sin,
            position_ptr=self.position,
            eps=t.rms_norm_eps,
            stride_head=t.keys.stride(1),
            KV_HEADS=kv_heads,
            BIAS=layer.qkv_bias is not None,
            QK_NORM=layer.q_norm is not None,
            BLOCK_HALF=half,
            num_warps=1,
            **shape,
        )
        several.attend_kernel[(kv_heads, triton.cdiv(reach, chunk))](
            parts_ptr=self.parts,
            maxima_ptr=self.maxima,
            sums_ptr=self.sums,
            q_ptr=self.q,
            keys_ptr=keys,
            values_ptr=values,
            position_ptr=self.position,
            scale=t.attention_scale,
            stride_head=t.keys.stride(1),
            TOKENS=count,
            KV_HEADS=kv_heads,
            WINDOW=window,
            CHUNK=chunk,
            BLOCK_T=min(64, chunk),
            BLOCK_R=max(16, triton.next_power_of_2(heads // kv_heads * count)),
            BLOCK_HALF=half,
            # The interpreter's dot is wrong in bfloat16.
            DOT=_DOT[torch.float32 if INTERPRETED else t.keys.dtype],
            num_warps=4,
            **shape,
        )
        several.combine_kernel[(count, heads)](
            x_ptr=self.seen,
            parts_ptr=self.parts,
            maxima_ptr=self.maxima,
            sums_ptr=self.sums,
            position_ptr=self.position,
            TOKENS=count,
            WINDOW=window,
            CHUNK=chunk,
            SPLITS=triton.next_power_of_2(triton.cdiv(reach, chunk)),
            BLOCK_D=2 * half,
            num_warps=1,
            **shape,
        )


def _plain(weight: Any) -> Tensor:
    if not isinstance(weight, Tensor):
        raise ValueError("several tokens at once need matrices that are not quantized")
    return weight


def _logits(x: Tensor, lm_head: Tensor) -> Tensor:
    """x [M, H] times lm_head [V, H], in float32 where the device can: float16 has ties."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, lm_head.t(), out_dtype=torch.float32)
    return torch.mm(x, lm_head.t()).float()


def _launch(kernel: Any, grid: tuple[int, ...], num_warps: int, **arguments: Any) -> None:
    kernel[grid](**arguments, PDL=False, num_warps=num_warps, num_stages=1)
