"""The decoder: attention → MLP → layer → model, with the four input sites of TEAL explicit.

One sequence, no batch axis. It serves calibration, evaluation and prefill, and it is the
specification of the fused kernels that decode one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.model.cache import KVCache
from teal_cli.model.config import ModelConfig
from teal_cli.model.rope import RotaryEmbedding
from teal_cli.model.sites import FUSED, PROJECTIONS, SITE_OF
from teal_cli.model.weights import DecoderWeights, LayerWeights, Matrix, multiply

Observer = Callable[[int, str, Tensor], None]

# Rows of the lm_head that are turned to the compute dtype at a time: 64 MB at hidden size 2048.
_VOCAB_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one call of the decoder carries down to every projection."""

    cache: KVCache | None
    position: int
    thresholds: Tensor | None  # [num_layers, 7] float32
    sparse_from: int
    observe: Observer | None


class Decoder:
    """A Llama-family decoder over weights in the [in_features, out_features] layout."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, weights.device)
        q, kv, i = config.q_size, config.kv_size, config.intermediate_size
        self.offsets = {  # column bounds of the projections in each fused matrix
            "qkv": (0, q, q + kv, q + 2 * kv),
            "o": (0, config.hidden_size),
            "gate_up": (0, i, 2 * i),
            "down": (0, config.hidden_size),
        }

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.weights.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What activations are held in.

        A CPU computes 16-bit weights in float32: on a Zen 3, prefill in native float16 on this
        layout is 60 times slower, and turning one matrix at a time costs a few percent.
        """
        if self.device.type == "cpu":
            return torch.promote_types(self.dtype, torch.float32)
        return self.dtype

    def new_cache(self, length: int) -> KVCache:
        """Room for `length` positions; raises UsageError beyond the model's context_length."""
        return KVCache(self.config, length, dtype=self.dtype, device=self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [T] int64 → hidden states [T, hidden_size].

        Raises:
            TealError: a token is none of the model's; checked where that costs no wait.
        """
        if tokens.device.type == "cpu" and (largest := int(tokens.max())) >= self.config.vocab_size:
            raise TealError(
                f"token {largest} is none of the model's {self.config.vocab_size}: "
                "the tokenizer is another model's"
            )
        return F.embedding(tokens.to(self.device), self.weights.embed_tokens).to(self.compute_dtype)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        position: int = 0,
        thresholds: Tensor | None = None,
        sparse_from: int = 0,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run the whole stack.

        Args:
            tokens: [T] int64.
            cache: keys and values of the positions before `position`; gains those of `tokens`.
                Without one, `tokens` see only each other.
            position: absolute position of tokens[0].
            thresholds: [num_hidden_layers, 7] float32; channel i of a projection's input is
                kept where abs(x_i) > threshold. None is dense.
            sparse_from: positions before this one stay dense.
            observe: called with (layer, site, x [T, channels]) before x is thresholded.

        Returns:
            Hidden states after the final norm, [T, hidden_size].
        """
        run = _Pass(cache, position, thresholds, sparse_from, observe)
        hidden = self.embed(tokens)
        for index in range(self.config.num_hidden_layers):
            hidden = self._layer(index, hidden, run)
        return self.final_norm(hidden)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What follows the last layer: hidden [T, hidden_size] → [T, hidden_size]."""
        return self._norm(hidden, self.weights.norm)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        *,
        cache: KVCache | None = None,
        position: int = 0,
        thresholds: Tensor | None = None,
        sparse_from: int = 0,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run one layer: hidden [T, hidden_size] → [T, hidden_size]; arguments as `forward`."""
        return self._layer(index, hidden, _Pass(cache, position, thresholds, sparse_from, observe))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [T, hidden_size] → float32 logits [T, vocab_size]."""
        out = torch.empty(
            hidden.shape[0], self.config.vocab_size, dtype=torch.float32, device=hidden.device
        )
        for start in range(0, self.config.vocab_size, _VOCAB_CHUNK):
            rows = self._head_rows(start, start + _VOCAB_CHUNK, hidden.dtype)
            out[:, start : start + _VOCAB_CHUNK] = F.linear(hidden, rows)
        return out

    def _head_rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        head = self.weights.lm_head
        if isinstance(head, Tensor):
            return head[start:end].to(dtype)
        return head.dequantize(start, end, dtype=dtype)

    def _layer(self, index: int, hidden: Tensor, run: _Pass) -> Tensor:
        layer = self.weights.layers[index]
        hidden = hidden + self._attention(
            index, layer, self._norm(hidden, layer.input_layernorm), run
        )
        return hidden + self._mlp(
            index, layer, self._norm(hidden, layer.post_attention_layernorm), run
        )

    def _attention(self, index: int, layer: LayerWeights, x: Tensor, run: _Pass) -> Tensor:
        config = self.config
        qkv = self._project("qkv", index, x, layer.qkv, layer.qkv_bias, run)
        q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), dim=-1)
        q = q.unflatten(-1, (config.num_attention_heads, config.head_dim))
        k = k.unflatten(-1, (config.num_key_value_heads, config.head_dim))
        v = v.unflatten(-1, (config.num_key_value_heads, config.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        q = self.rotary.rotate(q, run.position).transpose(0, 1)
        k = self.rotary.rotate(k, run.position).transpose(0, 1)
        v = v.transpose(0, 1)
        if run.cache is not None:
            k, v = run.cache.write(index, run.position, k, v)
        out = attend(q, k.to(q.dtype), v.to(q.dtype), window=config.sliding_windows[index])
        return self._project("o", index, out.flatten(1), layer.o, layer.o_bias, run)

    def _mlp(self, index: int, layer: LayerWeights, x: Tensor, run: _Pass) -> Tensor:
        gate, up = self._project("gate_up", index, x, layer.gate_up, None, run).chunk(2, dim=-1)
        return self._project("down", index, F.silu(gate) * up, layer.down, None, run)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last axis, its mean taken in float32."""
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.config.rms_norm_eps)

    def _project(
        self, fused: str, index: int, x: Tensor, weight: Matrix, bias: Tensor | None, run: _Pass
    ) -> Tensor:
        """One fused matrix, x [T, K] → [T, N], each projection's input thresholded by its own."""
        names = FUSED[fused]
        if run.observe is not None:
            run.observe(index, SITE_OF[names[0]], x)
        if run.thresholds is None or run.position + x.shape[0] <= run.sparse_from:
            y = multiply(x, weight)
        else:
            first = PROJECTIONS.index(names[0])
            thresholds = run.thresholds[index, first : first + len(names)]
            dense_rows = max(run.sparse_from - run.position, 0)
            y = self._sparse(fused, x, weight, thresholds, dense_rows)
        return y if bias is None else y + bias.to(x.dtype)

    def _sparse(
        self, fused: str, x: Tensor, weight: Matrix, thresholds: Tensor, dense_rows: int
    ) -> Tensor:
        offsets = self.offsets[fused]
        # For a single token, reading them from the device takes longer than two products more.
        alone = x.shape[0] == 1 and x.is_cuda
        levels = thresholds.unbind() if alone else thresholds.tolist()
        if len(set(levels)) == 1:
            return multiply(threshold(x, levels[0], dense_rows), weight)
        blocks = zip(levels, offsets[:-1], offsets[1:], strict=True)
        return torch.cat(
            [multiply(threshold(x, level, dense_rows), weight, a, b) for level, a, b in blocks],
            dim=-1,
        )


def threshold(x: Tensor, level: float | Tensor, dense_rows: int = 0) -> Tensor:
    """Zero the channels with abs(x) <= level, but not in the first `dense_rows` rows; keep NaN.

    TEAL (arXiv 2408.14690, eq. 1), compared in float32: float16 would round the level.
    """
    drop = x.abs().float() <= level
    drop[:dense_rows] = False
    return torch.where(drop, 0, x)


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """Causal attention of the last T of S positions.

    Args:
        q: [heads, T, head_dim].
        k: [key-value heads, S, head_dim]; each serves heads / key-value heads queries.
        v: the same shape.
        window: how many positions, its own included, a query sees; None is all before it.

    Returns:
        [T, heads, head_dim].
    """
    rows, columns = q.shape[1], k.shape[1]
    if window is not None and (unseen := columns - rows - window + 1) > 0:
        k, v = k[:, unseen:], v[:, unseen:]
        columns -= unseen
    limited = window is not None and columns > window
    mask = None
    if rows > 1 and (limited or rows < columns):
        last = torch.arange(columns - rows, columns, device=q.device)[:, None]
        seen = torch.arange(columns, device=q.device)
        mask = seen <= last
        if limited and window is not None:
            mask &= seen > last - window
    if mask is not None and (shared := q.shape[0] // k.shape[0]) > 1:
        # With a mask, only the kernels that hold all scores share keys between heads themselves.
        k, v = k.repeat_interleave(shared, dim=0), v.repeat_interleave(shared, dim=0)
    out = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=rows > 1 and mask is None,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out[0].transpose(0, 1)
