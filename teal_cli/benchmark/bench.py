"""The decoding benchmark: one decoder, dense and sparse and beside its baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from teal_cli.benchmark.bandwidth import Bandwidth
from teal_cli.benchmark.compiled import compiled_decoding
from teal_cli.benchmark.cost import cache_bytes, require_memory, weight_bytes
from teal_cli.benchmark.decode import SessionDecoding
from teal_cli.benchmark.llama_cpp import llama_cpp_decoding
from teal_cli.benchmark.result import DENSE, Row, Variant, rows
from teal_cli.benchmark.timing import Decoding, alternate
from teal_cli.benchmark.transformers_baseline import fastest_transformers
from teal_cli.environment import available_memory
from teal_cli.errors import TealError, UsageError
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import Quantization
from teal_cli.progress import Reporter
from teal_cli.sparsity import setting
from teal_cli.sparsity.setting import Setting

# What puts a target sparsity on the session that will decode under it.
SettingFor = Callable[[Session, float], Setting]
# What lets something guess for a session.
Attach = Callable[[Session], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: `tokens` tokens after a prompt of `prompt_tokens`, `repeats` times."""

    sparsities: tuple[float, ...] = (0.25, 0.4, 0.5)
    tokens: int = 100
    prompt_tokens: int = 32
    repeats: int = 5
    baselines: tuple[str, ...] = ()  # of "transformers", "compile" and "llama.cpp"
    seed: int = 0
    deterministic: bool = False
    draft: str | None = None  # what guesses, at each sparsity, in the place of sparse decoding
    acceptance: float | None = None  # that is assumed of guesses
    copy: bool = False  # the answer is to repeat its prompt

    @property
    def length(self) -> int:
        """Positions in use at the end."""
        return self.prompt_tokens + self.tokens

    @property
    def mean_position(self) -> int:
        """Mean position of the decoded tokens."""
        return self.prompt_tokens + self.tokens // 2

    def check(self, config: ModelConfig) -> None:
        """Make sure that a model has room for the prompt and the answer.

        Raises:
            UsageError: it has not.
        """
        if self.length > config.context_length:
            raise UsageError(
                f"{self.prompt_tokens} + {self.tokens} tokens are longer than this model's "
                f"context of {config.context_length}",
                hint="Choose fewer --tokens or --prompt-tokens.",
            )


def require_memory_for(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
    name: str,
    kind: Quantization | None = None,
) -> None:
    """Make sure that a model of random weights and its baselines fit, before they are made.

    Raises:
        TealError: they do not.
    """
    needed = weight_bytes(config, dtype.itemsize, kind)
    needed += cache_bytes(config, dtype.itemsize, settings.length)
    if device.type == "cpu":  # prefill turns one matrix at a time to float32
        needed += 4 * 2 * config.hidden_size * config.intermediate_size
    copies = len(settings.baselines)
    what = f"{name} in {kind.name if kind else _name(dtype)}"
    if copies:
        what += f" with {copies} more cop{'y' if copies == 1 else 'ies'} for --baseline"
    needed += copies * weight_bytes(config, dtype.itemsize)
    require_memory(needed, available_memory(device), what)


def measure(
    decoder: Decoder,
    prompt: Sequence[int],
    settings: Settings,
    setting_for: SettingFor,
    read_memory: Callable[[], Bandwidth],
    reporter: Reporter,
    guessers: Mapping[str, Attach] | None = None,
    gguf: Path | None = None,
) -> tuple[Bandwidth, tuple[Row, ...], tuple[str, ...]]:
    """Measure dense decoding, sparse or with guesses, the baselines and the memory, in turns.

    Args:
        decoder: the model.
        prompt: what is answered.
        settings: how often, and how much.
        setting_for: the setting of a sparsity.
        read_memory: measures the memory's bandwidth; once a repeat, the fastest counts.
        reporter: follows the runs.
        guessers: what guesses tokens, by label; then nothing is decoded sparse.
        gguf: the file that the model comes from, for llama.cpp; None writes one of its shape.

    Returns:
        The bandwidth, the rows, and a sentence for every baseline that could not be had.

    Raises:
        UsageError: the prompt and the answer are longer than the model's context.
        TealError: there is no memory to read.
    """
    settings.check(decoder.config)
    reads = [read_memory()]
    session = Session(
        decoder,
        max_length=settings.length,
        deterministic=settings.deterministic,
        reporter=reporter,
    )
    kind, size = decoder.weights.quantization, decoder.dtype.itemsize
    name = kind.name if kind else _name(decoder.dtype)
    dense = Variant(DENSE, "dense", name, size, session.backend, quantization=kind)
    variants = [dense]
    decodings: dict[str, Decoding] = {
        DENSE: SessionDecoding(session, setting.DENSE, prompt, settings.tokens)
    }
    for label, attach in (guessers or {}).items():
        attach(session)
        variants.append(replace(dense, label=label, kind="draft"))
        decodings[label] = SessionDecoding(
            session, setting.DENSE, prompt, settings.tokens, session.drafting
        )
    for sparsity in () if guessers else settings.sparsities:
        label = f"sparse {sparsity:.4g}"
        asked = setting_for(session, sparsity)
        variants.append(replace(dense, label=label, kind="sparse", target_sparsity=sparsity))
        decodings[label] = SessionDecoding(session, asked, prompt, settings.tokens)
    notes = []
    if settings.acceptance is not None:
        notes.append(
            f"The acceptance of guesses is assumed: each is right with probability"
            f" {settings.acceptance:g}, whatever the model says."
        )
    for baseline in settings.baselines:
        try:
            variant, decoding = _baseline(
                baseline, decoder, prompt, settings.tokens, gguf, reporter
            )
        except TealError as error:
            notes.append(f"no --baseline {baseline}: {error.message}")
            continue
        variants.append(variant)
        decodings[variant.label] = decoding
    runs = alternate(
        decodings, settings.repeats, reporter, beside=lambda: reads.append(read_memory())
    )
    bandwidth, found = rows(
        variants,
        runs,
        decoder.config,
        reads,
        prompt_tokens=len(prompt),
        position=settings.mean_position,
    )
    return bandwidth, found, tuple(notes)


def _baseline(
    baseline: str,
    decoder: Decoder,
    prompt: Sequence[int],
    tokens: int,
    gguf: Path | None,
    reporter: Reporter,
) -> tuple[Variant, Decoding]:
    decoding: Decoding
    if baseline == "llama.cpp":
        theirs = llama_cpp_decoding(decoder, gguf, len(prompt), tokens, reporter)
        kind, build = theirs.about()
        size, read = decoder.dtype.itemsize, theirs.bytes_per_token(decoder.config)
        variant = Variant(baseline, "baseline", kind, size, build, bytes_per_token=read)
        return variant, theirs
    if baseline == "transformers":
        decoding, dtype, cache = fastest_transformers(decoder, prompt, tokens, reporter)
        backend = f"generate, {cache} cache"
    else:
        decoding, dtype = compiled_decoding(decoder, prompt, tokens, reporter)
        backend = "torch.compile"
    return Variant(baseline, "baseline", _name(dtype), dtype.itemsize, backend), decoding


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
