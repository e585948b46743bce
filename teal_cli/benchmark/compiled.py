"""The same decoder in plain torch under torch.compile: an honest dense baseline.

As in gpt-fast (github.com/meta-pytorch/gpt-fast): static shapes, weights in the layout that
matrix-vector products like best, [out_features, in_features], and CUDA graphs on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.benchmark.cost import cache_bytes, require_memory, weight_bytes
from teal_cli.benchmark.timing import Run
from teal_cli.environment import available_memory
from teal_cli.errors import TealError
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, projections as [out_features, in_features]."""

    input_layernorm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_layernorm: Tensor
    gate_up: Tensor
    down: Tensor


class _PlainModel:
    """A dense decode step without anything of ours: plain torch, static shapes, no host reads."""

    def __init__(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        config, weights, device = decoder.config, decoder.weights, decoder.device
        self.config = config
        self.embed_tokens = weights.embed_tokens.to(dtype)
        tied = weights.lm_head is weights.embed_tokens
        self.lm_head = self.embed_tokens if tied else weights.lm_head.to(dtype)
        self.norm = weights.norm.to(dtype)

        def turned(tensor: Tensor) -> Tensor:
            return tensor.T.to(dtype, copy=True, memory_format=torch.contiguous_format)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        self.layers = [
            _Layer(
                input_layernorm=layer.input_layernorm.to(dtype),
                qkv=turned(layer.qkv),
                qkv_bias=cast(layer.qkv_bias),
                q_norm=cast(layer.q_norm),
                k_norm=cast(layer.k_norm),
                o=turned(layer.o),
                o_bias=cast(layer.o_bias),
                post_attention_layernorm=layer.post_attention_layernorm.to(dtype),
                gate_up=turned(layer.gate_up),
                down=turned(layer.down),
            )
            for layer in weights.layers
        ]
        heads, width = config.num_key_value_heads, config.head_dim
        self.keys = [
            torch.zeros(1, heads, length, width, dtype=dtype, device=device) for _ in self.layers
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        cos, sin = decoder.rotary.tables(length)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self.positions = torch.arange(length, device=device)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """token [1] and position [1], int64 → logits [1, vocab_size]."""
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        x = F.embedding(token, self.embed_tokens)
        for index in range(len(self.layers)):
            x = self._layer(index, x, position, cos, sin)
        return F.linear(_rms_norm(x, self.norm, self.config.rms_norm_eps), self.lm_head)

    def _layer(self, index: int, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config, layer = self.config, self.layers[index]
        eps = config.rms_norm_eps
        qkv = F.linear(_rms_norm(x, layer.input_layernorm, eps), layer.qkv, layer.qkv_bias)
        q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), dim=-1)
        q = q.view(1, config.num_attention_heads, config.head_dim)
        k = k.view(1, config.num_key_value_heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _rms_norm(q, layer.q_norm, eps), _rms_norm(k, layer.k_norm, eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        keys, values = self.keys[index], self.values[index]
        keys.index_copy_(2, position, k.transpose(0, 1)[None])
        values.index_copy_(2, position, v.view(1, config.num_key_value_heads, 1, config.head_dim))
        seen = self.positions <= position
        if (window := config.sliding_windows[index]) is not None:
            seen &= self.positions > position - window
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=seen[None],
            enable_gqa=config.num_attention_heads != config.num_key_value_heads,
        )
        x = x + F.linear(out.view(1, config.q_size), layer.o, layer.o_bias)
        hidden = _rms_norm(x, layer.post_attention_layernorm, eps)
        gate, up = F.linear(hidden, layer.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down)


class CompiledDecoding:
    """Greedy decoding by the compiled step, after a prefill by our own decoder."""

    def __init__(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        prompt: Sequence[int],
        tokens: int,
        compiler: Callable[..., Callable[..., Tensor]],
    ) -> None:
        self._decoder = decoder
        self._model = _PlainModel(decoder, len(prompt) + tokens, dtype)
        self._step = compiler(self._model.step)
        self._prompt = torch.tensor(list(prompt))
        self._tokens = tokens

    def warm_up(self) -> None:
        """Compile the step."""
        self.run()

    @torch.inference_mode()
    def run(self) -> Run:
        """Answer the prompt from the beginning, and time it."""
        started = time.perf_counter()
        token = self._prefill()
        first = time.perf_counter()
        for position in range(len(self._prompt), len(self._prompt) + self._tokens - 1):
            token = int(self.logits(token, position).argmax())
        seconds = time.perf_counter() - first
        return Run(first - started, seconds / (self._tokens - 1))

    def logits(self, token: int, position: int) -> Tensor:
        """Logits [vocab_size] after one token."""
        device = self._decoder.device
        at = torch.tensor([position], device=device)
        return self._step(torch.tensor([token], device=device), at)[0]

    def _prefill(self) -> int:
        """Fill the cache with the prompt; return the first token of the answer."""
        count = len(self._prompt)
        cache = self._decoder.new_cache(count)
        hidden = self._decoder.forward(self._prompt, cache=cache)
        for index, (keys, values) in enumerate(
            zip(self._model.keys, self._model.values, strict=True)
        ):
            keys[0, :, :count] = cache.keys[index]
            values[0, :, :count] = cache.values[index]
        return int(self._decoder.logits(hidden[-1:]).argmax())


def compiled_decoding(
    decoder: Decoder, prompt: Sequence[int], tokens: int, reporter: Reporter
) -> tuple[CompiledDecoding, torch.dtype]:
    """The compiled baseline, warmed up, in the dtype that is fastest here.

    Raises:
        TealError: torch.compile cannot be used here, or there is no memory for a second copy of
            the weights.
    """
    dtype = _fastest_dtype(decoder)
    config = decoder.config
    require_memory(
        weight_bytes(config, dtype.itemsize)
        + cache_bytes(config, dtype.itemsize, len(prompt) + tokens),
        available_memory(decoder.device),
        "torch.compile's own copy of the weights",
    )

    def compiler(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        mode = "reduce-overhead" if decoder.device.type == "cuda" else None
        return torch.compile(step, fullgraph=True, dynamic=False, mode=mode)

    decoding = CompiledDecoding(decoder, dtype, prompt, tokens, compiler)
    try:
        with reporter.task("compiling the baseline with torch.compile"):
            decoding.warm_up()
    except Exception as error:  # a missing compiler or a broken inductor fails in many ways
        detail = (str(error).strip().splitlines() or [""])[0]
        raise TealError(
            f"torch.compile cannot be used here ({type(error).__name__}: {detail})",
            hint="It needs a C++ compiler on a CPU. Leave out --baseline compile.",
        ) from None
    return decoding, dtype


def _fastest_dtype(decoder: Decoder) -> torch.dtype:
    """What the model's largest projection is fastest in; on a GPU the weights' own."""
    if decoder.device.type == "cuda":
        return decoder.dtype
    x = torch.randn(1, decoder.config.hidden_size)
    weight = decoder.weights.layers[0].gate_up.T.float().contiguous()
    times = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast, turned = x.to(dtype), weight.to(dtype)
        runs = []
        for _ in range(9):
            started = time.perf_counter()
            F.linear(cast, turned)
            runs.append(time.perf_counter() - started)
        times[dtype] = sorted(runs)[4]
    return min(times, key=lambda dtype: times[dtype])


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
