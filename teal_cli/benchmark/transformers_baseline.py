"""The same weights in transformers' own model, decoded by its `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from teal_cli.benchmark.cost import require_memory, weight_bytes
from teal_cli.benchmark.timing import Run
from teal_cli.environment import available_memory
from teal_cli.errors import TealError
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.families import MULTIPLIERS
from teal_cli.model.hf_layout import parts
from teal_cli.model.sites import FUSED
from teal_cli.model.weights import floats
from teal_cli.progress import Reporter

_PROBE_TOKENS, _PROBE_RUNS = 12, 2
_CACHES = ("dynamic", "static")


class TransformersDecoding:
    """Greedy `generate` with one cache implementation."""

    def __init__(self, model: Any, cache: str, prompt: Sequence[int], tokens: int) -> None:
        self._model = model
        self._cache = cache
        self._prompt = torch.tensor([list(prompt)], device=model.device)
        self._tokens = tokens

    def warm_up(self) -> None:
        """On a GPU, run at full length: the static cache's length is compiled in."""
        if self._model.device.type == "cuda":
            self.run()

    @torch.inference_mode()
    def run(self) -> Run:
        """Answer the prompt from the beginning, and time it.

        A token's time is the median: a static cache is captured anew in the first tokens of each
        call on a GPU, and decoding should not be charged for that.
        """
        clock = _Clock()
        started = time.perf_counter()
        self._model.generate(
            self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=self._tokens,
            do_sample=False,
            streamer=clock,
            cache_implementation=self._cache,
        )
        _, *times = clock.times  # the first call brings the prompt
        assert len(times) == self._tokens
        return Run(times[0] - started, median(b - a for a, b in pairwise(times)))


class _Clock:
    """A streamer, as `generate` calls it, that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def fastest_transformers(
    decoder: Decoder, prompt: Sequence[int], tokens: int, reporter: Reporter
) -> tuple[TransformersDecoding, torch.dtype, str]:
    """transformers at its best here: each dtype and cache tried for a few tokens.

    A GPU runs the weights' own dtype; a CPU may be faster in float32 than in 16 bits, or not.

    Returns:
        The decoding, its dtype, and its cache implementation.

    Raises:
        TealError: there is no memory for a second copy of the weights.
    """
    dtypes = [decoder.dtype]
    if decoder.device.type == "cpu":
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
    smallest = min(dtype.itemsize for dtype in dtypes)
    require_memory(
        weight_bytes(decoder.config, smallest),
        available_memory(decoder.device),
        "transformers' own copy of the weights",
    )
    found: list[tuple[float, torch.dtype, str]] = []
    model, built = None, None
    for dtype in dtypes:
        free = available_memory(decoder.device)
        if free is not None and weight_bytes(decoder.config, dtype.itemsize) > free:
            reporter.note(f"transformers in {_name(dtype)} does not fit into memory: left out")
            continue
        model = None  # frees the one before
        model, built = transformers_model(decoder, dtype), dtype
        for cache in _CACHES:
            if (seconds := _probe(model, cache, prompt)) is not None:
                found.append((seconds, dtype, cache))
                reporter.note(
                    f"transformers, {_name(dtype)}, {cache} cache: {seconds * 1e3:.1f} ms a token"
                )
    if not found:
        raise TealError("transformers cannot decode this model here")
    _, dtype, cache = min(found, key=lambda entry: entry[0])
    if dtype != built:
        model = None
        model = transformers_model(decoder, dtype)
    return TransformersDecoding(model, cache, prompt, tokens), dtype, cache


def _probe(model: Any, cache: str, prompt: Sequence[int]) -> float | None:
    """Seconds a token, the best of few; None if it fails."""
    decoding = TransformersDecoding(model, cache, prompt, _PROBE_TOKENS)
    try:
        return min(decoding.run().time_per_token_s for _ in range(_PROBE_RUNS))
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def transformers_model(decoder: Decoder, dtype: torch.dtype) -> Any:
    """transformers' model over a copy of a decoder's weights, in its own layout."""
    from transformers import AutoModelForCausalLM

    config = hf_config(decoder.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in decoder.weights.named_tensors():
        if name == "lm_head" and decoder.config.tie_word_embeddings:
            continue  # quantized apart from the embedding, which transformers ties it to
        state.update(_hf_tensors(decoder.config, name, floats(tensor, dtype), dtype))
    model.load_state_dict(state, strict=not decoder.config.tie_word_embeddings, assign=True)
    model.tie_weights()
    # Not part of the state: on the meta device its frequencies were never computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(decoder.device)
    model.eval()
    # A benchmark wants every token that it asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _hf_tensors(
    config: ModelConfig, name: str, tensor: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """transformers' tensors out of one of ours, copied: `hf_layout.assemble` backwards."""
    kind = name.rpartition(".")[2]
    names, fused = parts(name, fused=config.fused), FUSED.get(kind.removesuffix("_bias"), ())
    widths = [config.projection_shapes[projection][1] for projection in fused]
    pieces = tensor.split(widths, dim=-1) if len(names) > 1 else (tensor,)
    made = {}
    for part, piece in zip(names, pieces, strict=True):
        piece = piece.T if kind in FUSED else piece
        made[part] = piece.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return made


def hf_config(config: ModelConfig) -> Any:
    """transformers' config of the same architecture."""
    from transformers import AutoConfig

    rope = config.rope
    parameters: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type != "default":
        parameters["factor"] = rope.factor
    if rope.type in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.type == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.type == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        parameters["truncate"] = rope.truncate
    if rope.type == "longrope":
        divisors = list(rope.divisors or ())
        parameters |= {"short_factor": divisors, "long_factor": divisors}
    if rope.type in ("yarn", "longrope"):
        parameters["attention_factor"] = rope.attention_factor
    if rope.partial_rotary_factor != 1:
        parameters["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.llama_4_scaling_beta:
        parameters["llama_4_scaling_beta"] = rope.llama_4_scaling_beta
    window = next((size for size in config.sliding_windows if size), None)
    settings: dict[str, Any] = {"attention_bias": config.o_bias, "sliding_window": window}
    if config.model_type == "granite":
        settings |= {name: getattr(config, name) for name in MULTIPLIERS}
    if config.model_type == "smollm3":
        settings["no_rope_layers"] = [int(size > 0) for size in config.rotary_dims]
    if config.model_type in ("qwen2", "qwen3", "smollm3"):
        settings["use_sliding_window"] = window is not None
        settings["layer_types"] = [
            "sliding_attention" if size else "full_attention" for size in config.sliding_windows
        ]
    return AutoConfig.for_model(
        config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=parameters,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **settings,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
