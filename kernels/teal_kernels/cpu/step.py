"""Decoding on a CPU: one compiled call a token and thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from teal_kernels.checks import check_projection
from teal_kernels.cpu import compiled, team, vectors
from teal_kernels.cpu.code_cache import check_cpu
from teal_kernels.cpu.structures import VECTORS, Matrix, Model, Scratch, Shared, Team
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows

_DTYPES = {
    torch.float16: vectors.HALF,
    torch.bfloat16: vectors.BFLOAT,
    torch.float32: vectors.FLOAT,
}
MATRICES = ("qkv", "o", "gate_up", "down")
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
        lm_head: Tensor | QuantizedRows,
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
            layers: objects with the attributes VECTORS, tensors [n] or None, and MATRICES, tensors
                [in, out] or QuantizedMatrix; each of these alike in all layers.
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
            ValueError: the tensors are not contiguous, on a CPU, and, but for the quantized, of one
                dtype that is known; a matrix is stored in different ways in different layers.
        """
        table = [[getattr(layer, name) for name in VECTORS] for layer in layers]
        matrices = [[getattr(layer, name) for layer in layers] for name in MATRICES]
        weights = [embed_tokens, norm, lm_head, keys, values]
        weights += [tensor for row in table + matrices for tensor in row if tensor is not None]
        _check_weights(weights)
        self._tensors = weights  # the model holds no more than their addresses
        self._model = _model(
            table, matrices, weights, (cos, sin), num_attention_heads, rms_norm_eps, sliding_windows
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
    weight: Tensor | QuantizedMatrix,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Run `teal_kernels.reference.sparse_project`, skipping the rows of dropped channels.

    Args and errors are the reference's; the weight is float16, bfloat16, float32 or quantized, and
    the sum is in float32. With int4, products of x and a scale are rounded to 16 bits that eight
    channels share, an error of at most 2^-16 of the largest.
    """
    check_projection(x, weight, offsets, thresholds, bias)
    if isinstance(weight, Tensor):
        if weight.dtype not in _DTYPES:
            raise ValueError(f"weight must be 16- or 32-bit or quantized, got {weight.dtype}")
        weight = weight.contiguous()
    else:
        weight = replace(weight, rows=weight.rows.contiguous())
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    matrix = _matrix([weight], offsets)
    values = x.float().contiguous().numpy()
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
            _team(thread, threads, barrier), matrix, values, levels, parts, y,
            _survivors(len(values), [matrix]), kept[thread],
        )  # fmt: skip

    project = _compile(compiled.project, arguments(0))
    team.run(lambda thread: project(*arguments(thread)), threads, barrier)
    return torch.from_numpy(y).to(x.dtype)


def _check_weights(weights: Sequence[Tensor | QuantizedMatrix | QuantizedRows]) -> None:
    tensors = [w for w in weights if isinstance(w, Tensor)]
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or dtype not in _DTYPES:
            raise ValueError(
                f"weights and cache must be of one dtype of {', '.join(map(str, _DTYPES))}, "
                f"got {dtype} and {tensor.dtype}"
            )
    for weight in weights:
        parts = [weight] if isinstance(weight, Tensor) else [weight.rows, weight.scales]
        for part in parts:
            if part is not None and (not part.is_contiguous() or part.device.type != "cpu"):
                raise ValueError("weights and cache must be contiguous and on the CPU")


def _model(
    table: Sequence[Sequence[Tensor | None]],
    matrices: Sequence[Sequence[Tensor | QuantizedMatrix]],
    ends: Sequence[Any],
    rotary: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    windows: Sequence[int | None],
) -> Model:
    """Collect sizes and addresses; `table` has a row of VECTORS for each layer."""
    embed_tokens, norm, lm_head, keys, values = ends[:5]
    vocab, hidden = embed_tokens.shape
    _, kv_heads, length, head_dim = keys.shape
    qkv, o, gate_up, down = matrices
    inner, q, kv = down[0].shape[0], heads * head_dim, kv_heads * head_dim
    cos, sin = (tensor.float().contiguous().numpy() for tensor in rotary)
    quantized = isinstance(lm_head, QuantizedRows)
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
        vectors=np.stack([_addresses(row) for row in table]),
        qkv=_matrix(qkv, (0, q, q + kv, q + 2 * kv)),
        o=_matrix(o, (0, hidden)),
        gate_up=_matrix(gate_up, (0, inner, 2 * inner)),
        down=_matrix(down, (0, hidden)),
        windows=np.array([window or 0 for window in windows], dtype=np.int64),
        embed_tokens=embed_tokens.data_ptr(),
        norm=norm.data_ptr(),
        lm_head=(lm_head.rows if quantized else lm_head).data_ptr(),
        lm_head_dtype=vectors.INT8 if quantized else _DTYPES[lm_head.dtype],
        lm_head_scales=lm_head.scales.data_ptr() if quantized else 0,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        cos=cos,
        sin=sin,
    )


def _matrix(weights: Sequence[Tensor | QuantizedMatrix], offsets: Sequence[int]) -> Matrix:
    """What the layers' weights have in common, and where they are."""
    if len({_kind(weight) for weight in weights}) > 1:
        raise ValueError("a matrix must be of the same integers or floats in every layer")
    dtype, group = _kind(weights[0])
    rows = [weight if isinstance(weight, Tensor) else weight.rows for weight in weights]
    scales = [None if isinstance(weight, Tensor) else weight.scales for weight in weights]
    return Matrix(
        dtype=dtype,
        stride=rows[0].shape[1] * rows[0].itemsize,
        group=group,
        offsets=np.array(offsets, dtype=np.int64),
        addresses=_addresses(rows),
        scales=_addresses(scales),
    )


def _kind(weight: Tensor | QuantizedMatrix) -> tuple[Any, int]:
    """How the compiled functions read a matrix: dtype and group."""
    if isinstance(weight, Tensor):
        return _DTYPES[weight.dtype], 0
    return (vectors.INT4 if weight.group else vectors.INT8), weight.group


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    """int64, 0 where there is no tensor."""
    return np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.int64)


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
    matrices = (model.qkv, model.o, model.gate_up, model.down)
    return _survivors(max(model.hidden, widest), matrices)._replace(
        hidden=np.empty(model.hidden, dtype=np.float32),
        normed=np.empty(model.hidden, dtype=np.float32),
        inputs=np.empty(widest, dtype=np.float32),
        scores=np.empty(model.length, dtype=np.float32),
        **dict(zip(("query", "key", "value"), head, strict=True)),
    )


def _survivors(inputs: int, matrices: Sequence[Matrix]) -> Scratch:
    """Room for the surviving channels of one projection, and for nothing else."""
    none = np.empty(0, dtype=np.float32)
    rows, groups = inputs + 2 * vectors.ROWS, max(map(_groups, matrices))
    return Scratch(
        hidden=none,
        normed=none,
        inputs=none,
        rows=np.empty(rows, dtype=np.int64),
        factors=np.empty(rows, dtype=np.float32),
        scaled=np.empty(vectors.ROWS * groups, dtype=np.float32),
        steps=np.empty(groups, dtype=np.float32),
        pairs=np.empty(vectors.ROWS // 2 * groups, dtype=np.int32),
        sums=np.empty(groups, dtype=np.float32),
        scores=none,
        query=none,
        key=none,
        value=none,
    )


def _groups(matrix: Matrix) -> int:
    return -(-int(matrix.offsets[-1]) // matrix.group) if matrix.group else 0


def _team(thread: int, threads: int, barrier: Tensor) -> Team:
    phase = np.zeros(1, dtype=np.int64)
    return Team(thread, threads, barrier.data_ptr(), phase, team.give_way_address())


def _compile(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The machine code of a compiled function for arguments of these types.

    Calling that costs 0.2 us; finding it anew for every call's named tuples, 50 us.
    """
    check_cpu()
    signature = tuple(numba.typeof(argument) for argument in arguments)
    function.compile(signature)
    return function.get_overload(signature)
