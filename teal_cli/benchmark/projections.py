"""One matrix of every layer, multiplied again and again: what the kernel benchmark times.

What runs on a GPU is a launch of the step that decodes, in a CUDA graph over enough weights that
none is found in a cache; on a CPU it is the step's projection on its own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.inference.step import step_tensors
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import FUSED, PROJECTIONS
from teal_cli.model.weights import LayerWeights, floats

if TYPE_CHECKING:
    from teal_kernels.gpu.launch import StepLaunches

_CONTEXT, _POSITION = 256, 100  # a short chat's
_CACHES = 4  # weights in turn, in sizes of the device's last cache
_CPU_WEIGHT_BYTES = 1 << 29
_LEAST_LAUNCHES = 4
_RUNS = 3  # of a graph, between two looks at the clock


class Timed:
    """A function that launches `count` kernels; on a GPU it is captured in a CUDA graph."""

    def __init__(self, launch: Callable[[], None], count: int, device: torch.device) -> None:
        self._run, self._count, self._device = launch, count, device
        self._launch = launch  # holds the tensors, which a graph reads but does not keep
        # Triton launches on the current device.
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.inference_mode(), current:
            launch()  # compiles
            if device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    launch()
                self._run = graph.replay

    @torch.inference_mode()
    def seconds(self) -> float:
        """Time of one kernel."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            self._run()
            return (time.perf_counter() - started) / self._count
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_RUNS):
                self._run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / (_RUNS * self._count)


class Projection(Protocol):
    """One matrix of every layer under thresholds."""

    def keep(self, sparsity: float) -> float:
        """Drop this share of the inputs from now on; return the share that is really dropped."""

    def seconds(self) -> float:
        """Time of one kernel."""


class GpuProjection:
    """A matrix as the fused step launches it; `name` is one of the step's, or "logits"."""

    def __init__(self, decoder: Decoder, name: str) -> None:
        from teal_kernels.gpu.chain import Chain

        layers = _rotated(decoder, name)
        cache = decoder.new_cache(min(_CONTEXT, decoder.config.context_length))
        windows = decoder.config.sliding_windows * (len(layers) // decoder.config.num_hidden_layers)
        tensors = step_tensors(decoder, cache)
        self._name, self._decoder = name, decoder
        self._chain = Chain(dataclasses.replace(tensors, layers=layers, sliding_windows=windows))
        self._heads = _copies(decoder, decoder.weights.lm_head) if name == "logits" else []
        self._timed: Timed | None = None
        self._generator = torch.Generator(decoder.device).manual_seed(0)

    @property
    def choices(self) -> dict[float, StepLaunches]:
        """The step's launches by the sparsity from which they hold, of the kernels' table."""
        return dict(self._chain.choices)

    def launches_at(self, sparsity: float, choices: Mapping[float, StepLaunches]) -> StepLaunches:
        """Those of `choices` that a step uses at a sparsity."""
        from teal_kernels.gpu.launch import regime_of

        return choices[regime_of(sparsity)]

    def use(self, launches: StepLaunches) -> None:
        """Launch like this from now on.

        Raises:
            Exception: whatever Triton raises where the device cannot run it.
        """
        self._chain.launches = launches
        count = len(self._heads) or len(self._chain.tensors.layers)
        self._timed = Timed(self._launch, count, self._decoder.device)

    @torch.inference_mode()
    def keep(self, sparsity: float) -> float:
        """Drop exactly this share of every layer's inputs; the lm_head drops nothing."""
        chain = self._chain
        for buffer in (chain.h, chain.gate_up, chain.parts):
            buffer.normal_(generator=self._generator)
        chain.maxima.zero_()
        chain.scales.zero_()  # as the embedding does: kernels leave there what they know of h
        chain.sums.fill_(1)
        chain.position.fill_(min(_POSITION, chain.tensors.length - 1))
        if self._name == "logits":
            return 0.0
        layers = chain.tensors.layers
        for index in range(len(layers)):
            chain.thresholds[index] = _level(self._inputs(index), sparsity)
        chain.kept.zero_()
        with torch.cuda.device_of(chain.h):
            self._launch()
        column = PROJECTIONS.index(FUSED[self._name][0])
        inputs = getattr(layers[0], self._name).shape[0]
        return 1 - float(chain.kept[:, column].double().mean()) / inputs

    def seconds(self) -> float:
        """Time of one kernel, under the launches of `use`."""
        assert self._timed is not None
        return self._timed.seconds()

    def _launch(self) -> None:
        for head in self._heads:
            self._chain.project_logits(head)
        if not self._heads:
            for index in range(len(self._chain.tensors.layers)):
                self._chain.project(self._name, index)

    def _inputs(self, index: int) -> Tensor:
        """What the kernel of a layer multiplies, by the reference."""
        from teal_kernels.reference import gated_activation, rms_norm

        chain, tensors = self._chain, self._chain.tensors
        if self._name == "down":
            return gated_activation(chain.gate_up)
        if self._name == "o":
            chunk, position = chain.chunk, int(chain.position)
            window = tensors.sliding_windows[index] or position + 1
            first = max(position - window + 1, 0) // chunk
            return chain.parts[first : position // chunk + 1].mean(0)
        layer = tensors.layers[index]
        norm = layer.input_layernorm if self._name == "qkv" else layer.post_attention_layernorm
        return rms_norm(chain.h, norm, tensors.rms_norm_eps)


class CpuProjection:
    """A matrix by the rows that the fused step multiplies, called from Python layer by layer."""

    def __init__(self, decoder: Decoder, name: str) -> None:
        from teal_kernels.cpu import Projection

        weights = _some(decoder, name)
        widths = [decoder.config.projection_shapes[part][1] for part in FUSED[name]]
        self._count, self._projection = len(weights), Projection(weights, widths)
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(weights[0].shape[0], generator=generator)
        self._levels = torch.zeros(len(widths))
        self._timed = Timed(self._launch, len(weights), decoder.device)

    def keep(self, sparsity: float) -> float:
        """Drop exactly this share of the inputs."""
        self._levels.fill_(_level(self._x, sparsity))
        return float((self._x.abs() <= self._levels[0]).double().mean())

    def seconds(self) -> float:
        """Time of one call."""
        return self._timed.seconds()

    def _launch(self) -> None:
        for layer in range(self._count):
            self._projection(layer, self._x, self._levels)


def linear(decoder: Decoder, name: str) -> tuple[Timed, torch.dtype]:
    """torch's F.linear over matrices of the same size, and its dtype.

    On a GPU the weights' own storage, read as [out_features, in_features]: what the numbers are
    makes no difference to the time, and no second copy is needed. On a CPU the dtype that is
    fastest.
    """
    device = decoder.device
    if decoder.weights.quantization is not None:
        weights = _copies(decoder, _dequantized(decoder, name))
    elif name == "logits":
        weights = _copies(decoder, decoder.weights.lm_head)
    elif device.type == "cuda":
        weights = [getattr(layer, name) for layer in _rotated(decoder, name)]
        weights = [weight.view(weight.shape[1], weight.shape[0]) for weight in weights]
    else:
        weights = [weight.view(weight.shape[1], -1) for weight in _some(decoder, name)]
    if device.type == "cuda":
        return _linear(weights, decoder.dtype, device), decoder.dtype
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        timed = _linear(weights, dtype, device)
        times[dtype] = min(timed.seconds() for _ in range(_RUNS))
    best = min(times, key=lambda dtype: times[dtype])
    return _linear(weights, best, device), best


def _linear(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Timed:
    cast = [weight.to(dtype) for weight in weights]
    x = torch.randn(1, cast[0].shape[1], device=device).to(dtype)

    def launch() -> None:
        for weight in cast:
            F.linear(x, weight)

    return Timed(launch, len(cast), device)


def _level(x: Tensor, sparsity: float) -> float:
    """A threshold, between two values of abs(x), at or below which lies this share of them."""
    ordered = x.float().abs().sort().values
    count = min(round(sparsity * len(ordered)), len(ordered) - 1)
    return float(ordered[count - 1 : count + 1].mean()) if count else 0.0


def _rotated(decoder: Decoder, name: str) -> list[LayerWeights]:
    """The layers, with copies of one matrix until they are far larger than the cache."""
    layers = list(decoder.weights.layers)
    if decoder.device.type != "cuda" or name == "logits":
        return layers
    size = sum(getattr(layer, name).nbytes for layer in layers)
    copies = [
        dataclasses.replace(layer, **{name: _clone(getattr(layer, name))})
        for _ in range(1, -(-_enough(decoder) // size))
        for layer in layers
    ]
    return layers + copies


def _copies(decoder: Decoder, weight: Any) -> list[Any]:
    """A matrix and copies of it, far larger than the cache, in turns."""
    count = -(-_enough(decoder) // weight.nbytes) if decoder.device.type == "cuda" else 1
    copies = [weight, *(_clone(weight) for _ in range(1, count))]
    return copies * -(-_LEAST_LAUNCHES // count)


def _clone(weight: Any) -> Any:
    """A copy of a tensor, or of a quantized matrix but for its scales."""
    if isinstance(weight, Tensor):
        return weight.clone()
    return dataclasses.replace(weight, rows=weight.rows.clone())


def _dequantized(decoder: Decoder, name: str) -> Tensor:
    """A matrix in the dtype of the activations, [out_features, in_features]."""
    weights = decoder.weights
    if name == "logits":
        return floats(weights.lm_head, decoder.dtype)
    return floats(getattr(weights.layers[0], name), decoder.dtype).T.contiguous()


def _enough(decoder: Decoder) -> int:
    return _CACHES * int(torch.cuda.get_device_properties(decoder.device).L2_cache_size)


def _some(decoder: Decoder, name: str) -> list[Any]:
    """A matrix of as many layers as a CPU is sure not to hold in its caches."""
    weights = [getattr(layer, name) for layer in decoder.weights.layers]
    return weights[: max(1, _CPU_WEIGHT_BYTES // weights[0].nbytes)]
