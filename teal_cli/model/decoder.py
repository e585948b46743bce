"""The decoder: attention → MLP → layer → model, with the four input sites of TEAL explicit.

One sequence, no batch axis. It serves calibration, evaluation and prefill, and it is the
specification of the fused kernels that decode one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.model.attention import attend
from teal_cli.model.cache import KVCache
from teal_cli.model.config import ModelConfig
from teal_cli.model.rope import RotaryEmbedding
from teal_cli.model.sites import FUSED, PROJECTIONS, SITE_OF
from teal_cli.model.weights import DecoderWeights, Matrix, multiply

Observer = Callable[[int, str, Tensor], None]
# (layer, matrix, x [T, K], its weight) → [T, N]; what the decoder itself does is `multiply`.
Project = Callable[[int, str, Tensor, Matrix], Tensor]

_ACTIVATIONS = {"silu": F.silu}

# Rows of the lm_head that are turned to the compute dtype at a time: 64 MB at hidden size 2048.
_VOCAB_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Pass:
    """What one call of the decoder carries down to every projection; see `Decoder.forward`."""

    cache: KVCache | None = None
    position: int | Tensor = 0
    thresholds: Tensor | None = None
    vectors: RecoveryVectors | None = None
    sparse_from: int = 0
    observe: Observer | None = None
    project: Project | None = None

    def dense_rows(self, x: Tensor) -> int:
        """How many of x's rows [T, ...] stay dense; the first ones."""
        assert isinstance(self.position, int)
        return min(max(self.sparse_from - self.position, 0), len(x))

    def by_rows(
        self, x: Tensor, dense: Callable[[Tensor], Tensor], sparse: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """x [T, N] with one function of its dense rows, and another of its sparse ones."""
        rows = self.dense_rows(x)
        if rows == 0:
            return sparse(x)
        return torch.cat([dense(x[:rows]), sparse(x[rows:])])


class Decoder:
    """A Llama-family decoder over weights in the [in_features, out_features] layout."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Bind the weights.

        Args:
            config: the model's.
            weights: its tensors.
            compute_dtype: what activations are held in. By default the weights' own, but on a CPU
                float32 for 16-bit weights: on a Zen 3, prefill in native float16 on this layout is
                60 times slower, and turning one matrix at a time costs a few percent.
        """
        self.config = config
        self.weights = weights
        if compute_dtype is None:
            least = torch.float32 if weights.device.type == "cpu" else weights.dtype
            compute_dtype = torch.promote_types(weights.dtype, least)
        self.compute_dtype = compute_dtype
        self.rotary = RotaryEmbedding(config.rope, config.rotary_dim, weights.device)
        self._activate = _ACTIVATIONS[config.hidden_act]
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

    def new_cache(self, length: int) -> KVCache:
        """Room for `length` positions; raises UsageError beyond the model's context_length."""
        return KVCache(self.config, length, dtype=self.dtype, device=self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [T] int64 → hidden states [T, hidden_size].

        Raises:
            TealError: a token is none of the model's; checked where that costs no wait.
        """
        costs_nothing = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if costs_nothing and (largest := int(tokens.max())) >= self.config.vocab_size:
            raise TealError(
                f"token {largest} is none of the model's {self.config.vocab_size}: "
                "the tokenizer is another model's"
            )
        hidden = F.embedding(tokens.to(self.device), self.weights.embed_tokens)
        return scaled(hidden.to(self.compute_dtype), self.config.embedding_multiplier)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        position: int | Tensor = 0,
        thresholds: Tensor | None = None,
        vectors: RecoveryVectors | None = None,
        sparse_from: int = 0,
        observe: Observer | None = None,
        project: Project | None = None,
    ) -> Tensor:
        """Run the whole stack.

        Args:
            tokens: [T] int64.
            cache: keys and values of the positions before `position`; gains those of `tokens`.
                Without one, `tokens` see only each other.
            position: absolute position of tokens[0]. On the device, [1] int64, it is a single
                token's that is dense, as a compiled step has it (see `KVCache.write`).
            thresholds: [num_hidden_layers, 7] float32; channel i of a projection's input is
                kept where abs(x_i) > threshold. None is dense.
            vectors: what sparse positions get of biases and norms; None is the model's own.
            sparse_from: positions before this one stay dense.
            observe: called with (layer, site, x [T, channels]) before x is thresholded.
            project: multiplies by a matrix in the decoder's place, which then uses no thresholds.

        Returns:
            Hidden states after the final norm, [T, hidden_size].
        """
        run = Pass(cache, position, thresholds, vectors, sparse_from, observe, project)
        hidden = self.embed(tokens)
        for index in range(self.config.num_hidden_layers):
            hidden = self._layer(index, hidden, run)
        return self._final_norm(hidden, run)

    def final_norm(self, hidden: Tensor, vectors: RecoveryVectors | None = None) -> Tensor:
        """What follows the last layer: hidden [T, hidden_size] → [T, hidden_size].

        All rows are dense without `vectors`, and sparse with them.
        """
        return self._final_norm(hidden, Pass(vectors=vectors))

    def layer(
        self,
        index: int,
        hidden: Tensor,
        *,
        cache: KVCache | None = None,
        position: int | Tensor = 0,
        thresholds: Tensor | None = None,
        vectors: RecoveryVectors | None = None,
        sparse_from: int = 0,
        observe: Observer | None = None,
        project: Project | None = None,
    ) -> Tensor:
        """Run one layer: hidden [T, hidden_size] → [T, hidden_size]; arguments as `forward`."""
        run = Pass(cache, position, thresholds, vectors, sparse_from, observe, project)
        return self._layer(index, hidden, run)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [T, hidden_size] → float32 logits [T, vocab_size]."""
        out = torch.empty(
            hidden.shape[0], self.config.vocab_size, dtype=torch.float32, device=hidden.device
        )
        for start in range(0, self.config.vocab_size, _VOCAB_CHUNK):
            rows = self._head_rows(start, start + _VOCAB_CHUNK, hidden.dtype)
            out[:, start : start + _VOCAB_CHUNK] = F.linear(hidden, rows)
        return scaled(out, 1 / self.config.logits_scaling)

    def logits_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient at logits [T, vocab_size] → at the final hidden states [T, hidden_size].

        Autograd would keep the head's rows and a copy of the gradient for each chunk of `logits`.
        """
        out = gradient.new_zeros(gradient.shape[0], self.config.hidden_size)
        for start in range(0, self.config.vocab_size, _VOCAB_CHUNK):
            rows = self._head_rows(start, start + _VOCAB_CHUNK, gradient.dtype)
            out += gradient[:, start : start + _VOCAB_CHUNK] @ rows
        return scaled(out, 1 / self.config.logits_scaling)

    def _head_rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        head = self.weights.lm_head
        if isinstance(head, Tensor):
            return head[start:end].to(dtype)
        return head.dequantize(start, end, dtype=dtype)

    def _layer(self, index: int, hidden: Tensor, run: Pass) -> Tensor:
        hidden = hidden + self.attention(index, hidden, run)
        return hidden + self.mlp(index, hidden, run)

    def attention(self, index: int, hidden: Tensor, run: Pass) -> Tensor:
        """What a layer's attention adds to hidden [T, hidden_size]."""
        config, layer = self.config, self.weights.layers[index]
        x = self._layer_norm("input_layernorm", index, hidden, run)
        qkv = self._project("qkv", index, x, layer.qkv_bias, run)
        q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), dim=-1)
        q = q.unflatten(-1, (config.num_attention_heads, config.head_dim))
        k = k.unflatten(-1, (config.num_key_value_heads, config.head_dim))
        v = v.unflatten(-1, (config.num_key_value_heads, config.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        if index not in config.layers_without_rope:
            q, k = self.rotary.rotate(q, run.position), self.rotary.rotate(k, run.position)
        if (growth := self.rotary.query_growth(run.position, q.shape[0])) is not None:
            q = q * growth[:, None, None].to(q.dtype)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if run.cache is not None:
            k, v = run.cache.write(index, run.position, k, v)
        out = attend(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            window=config.sliding_windows[index],
            scale=config.attention_scale,
            position=run.position if isinstance(run.position, Tensor) else None,
        )
        added = self._project("o", index, out.flatten(1), layer.o_bias, run)
        return scaled(added, config.residual_multiplier)

    def mlp(self, index: int, hidden: Tensor, run: Pass) -> Tensor:
        """What a layer's MLP adds to hidden [T, hidden_size]."""
        x = self._layer_norm("post_attention_layernorm", index, hidden, run)
        gate, up = self._project("gate_up", index, x, None, run).chunk(2, dim=-1)
        added = self._project("down", index, self._activate(gate) * up, None, run)
        return scaled(added, self.config.residual_multiplier)

    def _layer_norm(self, name: str, index: int, x: Tensor, run: Pass) -> Tensor:
        own = getattr(self.weights.layers[index], name)
        learnt = None if run.vectors is None else getattr(run.vectors, name)[index]
        return self._norm_by_rows(x, own, learnt, run)

    def _final_norm(self, x: Tensor, run: Pass) -> Tensor:
        learnt = None if run.vectors is None else run.vectors.norm
        return self._norm_by_rows(x, self.weights.norm, learnt, run)

    def _norm_by_rows(self, x: Tensor, own: Tensor, learnt: Tensor | None, run: Pass) -> Tensor:
        """The norm with the model's own weight in dense rows, and the learnt one in sparse ones."""
        if learnt is None:
            return self._norm(x, own)
        weight = learnt.to(x.device)
        return run.by_rows(x, lambda rows: self._norm(rows, own), lambda r: self._norm(r, weight))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last axis, its mean taken in float32."""
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.config.rms_norm_eps)

    def _project(self, fused: str, index: int, x: Tensor, bias: Tensor | None, run: Pass) -> Tensor:
        """One fused matrix, x [T, K] → [T, N], with its bias."""
        weight: Matrix = getattr(self.weights.layers[index], fused)
        if run.observe is not None:
            run.observe(index, SITE_OF[FUSED[fused][0]], x)
        if run.project is not None:
            y = run.project(index, fused, x, weight)
        elif run.thresholds is None:
            y = multiply(x, weight)
        else:
            y = self._sparse(index, fused, x, weight, run)
        if bias is not None:
            y = y + bias.to(x.dtype)
        if run.vectors is not None:
            learnt = getattr(run.vectors, fused)[index].to(x)
            y = run.by_rows(y, lambda rows: rows, lambda rows: rows + learnt)
        return y

    def _sparse(self, index: int, fused: str, x: Tensor, weight: Matrix, run: Pass) -> Tensor:
        """The product with each projection's input thresholded by its own, in sparse positions."""
        assert run.thresholds is not None
        dense_rows = run.dense_rows(x)
        if dense_rows == len(x):
            return multiply(x, weight)
        offsets, first = self.offsets[fused], PROJECTIONS.index(FUSED[fused][0])
        thresholds = run.thresholds[index, first : first + len(offsets) - 1]
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
    if isinstance(level, Tensor):
        kept = torch.where(x.abs().float() <= level, 0, x)
    else:  # one pass instead of four, but it cannot read a level from a device
        wide = torch.promote_types(x.dtype, torch.float32)
        kept = F.hardshrink(x.to(wide), level).to(x.dtype)
    kept[:dense_rows] = x[:dense_rows]
    return kept


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times the factor; x itself where that is 1."""
    return x if factor == 1 else x * factor
