"""The decoder itself under torch.compile: an honest dense baseline.

As in gpt-fast (github.com/meta-pytorch/gpt-fast): static shapes, weights in the layout that
matrix-vector products like best, [out_features, in_features], and CUDA graphs on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from teal_cli.benchmark.cost import cache_bytes, require_memory, weight_bytes
from teal_cli.benchmark.timing import Run
from teal_cli.environment import available_memory
from teal_cli.errors import TealError, whole
from teal_cli.model.decoder import Decoder, scaled
from teal_cli.model.sites import FUSED
from teal_cli.model.weights import DecoderWeights, LayerWeights, floats
from teal_cli.progress import Reporter


class CompiledDecoding:
    """Greedy decoding by the compiled step, after a prefill by our own decoder.

    The token, its position and the answer stay on the device: nothing waits for the host until
    the answer is whole. On a GPU the compiled step is captured in one CUDA graph by hand, which
    either works or fails; torch.compile's own graphs are left out, silently, where it finds a
    reason.
    """

    def __init__(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        prompt: Sequence[int],
        tokens: int,
        compiler: Callable[..., Callable[..., None]],
    ) -> None:
        self._decoder = decoder
        length = len(prompt) + tokens
        self._copy = Decoder(decoder.config, _turned(decoder.weights, dtype), compute_dtype=dtype)
        self._cache = self._copy.new_cache(length)
        self._copy.rotary.tables(length)  # so that no step makes them
        self._advance = compiler(self._decode)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prompt = torch.tensor(list(prompt))
        self._tokens = tokens
        self._token, self._position = (
            torch.zeros(1, dtype=torch.int64, device=decoder.device) for _ in range(2)
        )
        self._answer = torch.zeros(length, dtype=torch.int64, device=decoder.device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the step and, on a GPU, capture it; once is enough."""
        if self._graph is not None:
            return
        # Attention as plain products, which the compiler fuses: no kernel for one query on a
        # static cache with a mask is faster at short contexts, and gpt-fast does the same.
        on_gpu = self._decoder.device.type == "cuda"
        with sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext():
            self._prefill()
            if not on_gpu:
                self._step()
                return
            stream = torch.cuda.Stream(self._decoder.device)
            stream.wait_stream(torch.cuda.current_stream(self._decoder.device))
            with torch.cuda.stream(stream):
                self._step()
                self._step()
            torch.cuda.current_stream(self._decoder.device).wait_stream(stream)
            self._prefill()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self._graph = graph

    @torch.inference_mode()
    def run(self) -> Run:
        """Answer the prompt from the beginning, and time it."""
        started = time.perf_counter()
        self._prefill()
        first = time.perf_counter()
        for _ in range(self._tokens - 1):
            self._step()
        self._answer.tolist()  # waits for the device
        seconds = time.perf_counter() - first
        return Run(first - started, seconds / (self._tokens - 1))

    @property
    def answer(self) -> list[int]:
        """The tokens of the last run, of which the prefill chose the first."""
        count = len(self._prompt)
        answer: list[int] = self._answer[count - 1 : count - 1 + self._tokens].tolist()
        return answer

    def _step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._advance(self._token, self._position, self._answer)

    def _decode(self, token: Tensor, position: Tensor, answer: Tensor) -> None:
        """Decode token [1] at position [1], int64; put the next into both and answer [length]."""
        chosen = self._logits(token, position).argmax(-1)
        answer.index_copy_(0, position, chosen)
        token.copy_(chosen)
        position.add_(1)

    def _logits(self, token: Tensor, position: Tensor) -> Tensor:
        """token [1] and position [1], int64 → logits [1, vocab_size], by one product."""
        hidden = self._copy.forward(token, cache=self._cache, position=position)
        logits = F.linear(hidden, floats(self._copy.weights.lm_head, hidden.dtype))
        return scaled(logits, 1 / self._copy.config.logits_scaling)

    def _prefill(self) -> None:
        """Fill the cache with the prompt, and choose the first token of the answer."""
        count = len(self._prompt)
        cache = self._decoder.new_cache(count)
        hidden = self._decoder.forward(self._prompt, cache=cache)
        self._cache.keys[:, :, :count] = cache.keys
        self._cache.values[:, :, :count] = cache.values
        first = int(self._decoder.logits(hidden[-1:]).argmax())
        self._token.fill_(first)
        self._position.fill_(count)
        self._answer[count - 1] = first


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

    def compiler(step: Callable[..., None]) -> Callable[..., None]:
        # As in gpt-fast: with it, matrix-vector products are compiled as reductions and reach
        # the memory's limit; without, they are cuBLAS calls.
        options: dict[str, Any] = {"coordinate_descent_tuning": decoder.device.type == "cuda"}
        return torch.compile(step, fullgraph=True, dynamic=False, options=options)

    decoding = CompiledDecoding(decoder, dtype, prompt, tokens, compiler)
    try:
        with reporter.task("compiling the baseline with torch.compile"):
            decoding.warm_up()
    except Exception as error:  # a missing compiler or a broken inductor fails in many ways
        raise TealError(
            f"torch.compile cannot be used here ({type(error).__name__}: {whole(error)})",
            hint="It needs a C++ compiler on a CPU. Leave out --baseline compile.",
        ) from None
    return decoding, dtype


def _fastest_dtype(decoder: Decoder) -> torch.dtype:
    """What the model's largest projection is fastest in; on a GPU the weights' own."""
    if decoder.device.type == "cuda":
        return decoder.dtype
    x = torch.randn(1, decoder.config.hidden_size)
    weight = floats(decoder.weights.layers[0].gate_up, torch.float32).T.contiguous()
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


def _turned(weights: DecoderWeights, dtype: torch.dtype) -> DecoderWeights:
    """Weights in another dtype, the layers' matrices lying as [out_features, in_features]."""
    embed_tokens = weights.embed_tokens.to(dtype)
    tied = weights.lm_head is weights.embed_tokens
    return DecoderWeights(
        embed_tokens,
        [_turned_layer(layer, dtype) for layer in weights.layers],
        weights.norm.to(dtype),
        embed_tokens if tied else floats(weights.lm_head, dtype),
    )


def _turned_layer(layer: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    tensors: dict[str, Any] = {}
    for field in fields(LayerWeights):
        tensor = getattr(layer, field.name)
        if field.name in FUSED:
            turned = floats(tensor, dtype).T
            tensor = turned.to(dtype, copy=True, memory_format=torch.contiguous_format).T
        tensors[field.name] = None if tensor is None else tensor.to(dtype)
    return LayerWeights(**tensors)
