"""Decoding on a CPU: one compiled call a token and thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from teal_kernels.checks import check_projection
from teal_kernels.cpu import compiled, intrinsics, team
from teal_kernels.cpu.structures import Model, Scratch, Shared, Team

_DTYPES = {
    torch.float16: intrinsics.HALF,
    torch.bfloat16: intrinsics.BFLOAT,
    torch.float32: intrinsics.FLOAT,
}
# The order in which `compiled` finds a layer's weights.
LAYER_WEIGHTS = (
    "input_layernorm",
    "qkv",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "o",
    "o_bias",
    "post_attention_layernorm",
    "gate_up",
    "down",
)
# Of the seven projections, those of whose input a thread lists only the channels it computed.
_OWN_CHANNELS = np.array([False, False, False, True, False, False, True])


class DecodeStep:
    """A decoder bound to its weights and its cache; a call decodes one token.

    The threads run one compiled function together and meet at a barrier after each part of a
    layer; none of torch's or numba's own parallel loops is involved.
    """

    def __init__(
        self,
        *,
        layers: Sequence[Any],
        embed_tokens: Tensor,
        norm: Tensor,
        lm_head: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_attention_heads: int,
        rms_norm_eps: float,
        sliding_windows: Sequence[int | None],
        threads: int | None = None,
    ) -> None:
        """Bind the step to tensors, which it reads (and of the cache, writes) in place.

        Compiles the step where no compiled one is found on disk: some seconds, once a dtype.

        Args:
            layers: objects with the attributes LAYER_WEIGHTS: tensors [in, out], [n] or None.
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
            threads: by default as many as torch uses, and no more than there are cores for us.

        Raises:
            ValueError: the tensors are not contiguous, on a CPU, and of one dtype that is known.
        """
        table = [[getattr(layer, name) for name in LAYER_WEIGHTS] for layer in layers]
        weights = [embed_tokens, norm, lm_head, keys, values]
        weights += [tensor for row in table for tensor in row if tensor is not None]
        _check_weights(weights)
        self._tensors = weights  # the model holds no more than their addresses
        self._model = _model(
            table, weights, (cos, sin), num_attention_heads, rms_norm_eps, sliding_windows
        )
        self._thresholds = np.full((len(table), 7), -np.inf, dtype=np.float32)
        self._kept = np.zeros((len(table), 7), dtype=np.int64)
        count = threads or team.default_threads()
        self._counts = np.zeros((count, len(table), 7), dtype=np.int64)  # of one step
        self._shared = _shared(self._model, count)
        self._barrier = torch.zeros(16, dtype=torch.int64)  # a cache line of its own
        self._teams = [_team(thread, count, self._barrier) for thread in range(count)]
        self._scratch = [_scratch(self._model) for _ in range(count)]
        self._decode = _compile(compiled.decode, self._arguments(0, 0, 0))

    @property
    def threads(self) -> int:
        """Threads that decode together."""
        return len(self._teams)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Keep what exceeds thresholds [layers, 7] float32; None keeps everything."""
        self._thresholds[:] = -np.inf if thresholds is None else thresholds.cpu().numpy()

    @property
    def kept(self) -> Tensor:
        """Channels kept since the counts were cleared, [layers, 7] int64."""
        return torch.from_numpy(self._kept.copy())

    def clear_counts(self) -> None:
        """Start counting anew."""
        self._kept[:] = 0

    def __call__(self, token: int, position: int) -> Tensor:
        """Decode `token` at `position` and cache its keys and values; float32 [vocab_size].

        Raises:
            ValueError: the token or the position is out of range.
        """
        vocab, length = self._model.vocab, self._model.length
        if not 0 <= token < vocab or not 0 <= position < length:
            raise ValueError(
                f"token {token} at position {position} is outside {vocab} tokens "
                f"or {length} positions"
            )
        self._counts[:] = 0
        team.run(
            lambda thread: self._decode(*self._arguments(thread, token, position)),
            self.threads,
            self._barrier,
        )
        # Every thread lists the survivors of qkv and gate_up, but of o and down its own.
        self._kept += np.where(_OWN_CHANNELS, self._counts.sum(0), self._counts[0])
        return torch.from_numpy(self._shared.logits.copy())

    def _arguments(self, thread: int, token: int, position: int) -> tuple[Any, ...]:
        """What `compiled.decode` takes on one thread."""
        mate = self._teams[thread]
        mate.phase[0] = 0
        return (
            mate, self._model, self._shared, self._scratch[thread], token, position,
            self._thresholds, self._counts[thread],
        )  # fmt: skip


def sparse_project(
    x: Tensor,
    weight: Tensor,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Run `teal_kernels.reference.sparse_project`, skipping the rows of dropped channels.

    Args and errors are the reference's; the weight's dtype is float16, bfloat16 or float32, and
    the sum is in float32.
    """
    check_projection(x, weight, offsets, thresholds, bias)
    if weight.dtype not in _DTYPES or weight.device.type != "cpu":
        raise ValueError(f"weight must be 16- or 32-bit on the CPU, got {weight.dtype}")
    weight = weight.contiguous()
    values = x.float().contiguous().numpy()
    bounds = np.array(offsets, dtype=np.int64)
    levels = thresholds.contiguous().numpy()
    y = np.zeros(weight.shape[1], dtype=np.float32)
    if bias is not None:
        y += bias.float().numpy()
    barrier = torch.zeros(16, dtype=torch.int64)
    threads = team.default_threads()
    kept = np.zeros((threads, len(levels)), dtype=np.int64)
    parts = np.empty((threads, len(y)), dtype=np.float32)

    def arguments(thread: int) -> tuple[Any, ...]:
        return (
            _team(thread, threads, barrier), _DTYPES[weight.dtype], weight.data_ptr(), values,
            bounds, levels, parts, y, _survivors(len(values)), kept[thread],
        )  # fmt: skip

    project = _compile(compiled.project, arguments(0))
    team.run(lambda thread: project(*arguments(thread)), threads, barrier)
    return torch.from_numpy(y).to(x.dtype)


def _check_weights(weights: Sequence[Tensor]) -> None:
    dtype = weights[0].dtype
    for tensor in weights:
        if tensor.dtype != dtype or dtype not in _DTYPES:
            raise ValueError(
                f"weights and cache must be of one dtype of {', '.join(map(str, _DTYPES))}, "
                f"got {dtype} and {tensor.dtype}"
            )
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("weights and cache must be contiguous and on the CPU")


def _model(
    table: Sequence[Sequence[Tensor | None]],
    ends: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    windows: Sequence[int | None],
) -> Model:
    """Collect sizes and addresses; `table` has a row of LAYER_WEIGHTS for each layer."""
    embed_tokens, norm, lm_head, keys, values = ends[:5]
    vocab, hidden = embed_tokens.shape
    _, kv_heads, length, head_dim = keys.shape
    down = table[0][LAYER_WEIGHTS.index("down")]
    assert down is not None
    inner, q, kv = down.shape[0], heads * head_dim, kv_heads * head_dim
    bounds = ((0, q, q + kv, q + 2 * kv), (0, hidden), (0, inner, 2 * inner), (0, hidden))
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in table]
    cos, sin = (tensor.float().contiguous().numpy() for tensor in rotary)
    return Model(
        dtype=_DTYPES[embed_tokens.dtype],
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        length=length,
        eps=np.float32(eps),
        layers=np.array(addresses, dtype=np.int64),
        windows=np.array([window or 0 for window in windows], dtype=np.int64),
        offsets=tuple(np.array(row, dtype=np.int64) for row in bounds),
        embed_tokens=embed_tokens.data_ptr(),
        norm=norm.data_ptr(),
        lm_head=lm_head.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        cos=cos,
        sin=sin,
    )


def _shared(model: Model, threads: int) -> Shared:
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    return Shared(
        wide=np.empty((threads, max(qkv, 2 * model.inner)), dtype=np.float32),
        narrow=np.empty((threads, model.hidden), dtype=np.float32),
        logits=np.empty(model.vocab, dtype=np.float32),
    )


def _scratch(model: Model) -> Scratch:
    widest = max(model.inner, model.heads * model.head_dim)
    head = (np.empty(model.head_dim, dtype=np.float32) for _ in range(3))
    return _survivors(max(model.hidden, widest))._replace(
        hidden=np.empty(model.hidden, dtype=np.float32),
        normed=np.empty(model.hidden, dtype=np.float32),
        inputs=np.empty(widest, dtype=np.float32),
        scores=np.empty(model.length, dtype=np.float32),
        **dict(zip(("query", "key", "value"), head, strict=True)),
    )


def _survivors(inputs: int) -> Scratch:
    """Room for the surviving channels of one projection, and for nothing else."""
    none = np.empty(0, dtype=np.float32)
    return Scratch(
        hidden=none,
        normed=none,
        inputs=none,
        rows=np.empty(inputs, dtype=np.int64),
        factors=np.empty(inputs, dtype=np.float32),
        scores=none,
        query=none,
        key=none,
        value=none,
    )


def _team(thread: int, threads: int, barrier: Tensor) -> Team:
    phase = np.zeros(1, dtype=np.int64)
    return Team(thread, threads, barrier.data_ptr(), phase, team.give_way_address())


def _compile(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The machine code of a compiled function for arguments of these types.

    Calling that costs 0.2 us; finding it anew for every call's named tuples, 50 us.
    """
    signature = tuple(numba.typeof(argument) for argument in arguments)
    try:
        function.compile(signature)
    except OSError:  # compiled, but the disk is full: this process has it all the same
        function.compile(signature)
    return function.get_overload(signature)
