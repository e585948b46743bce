"""llama.cpp on the same machine: its own `llama-bench`, run once a turn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from teal_cli.benchmark import random_gguf
from teal_cli.benchmark.timing import Run
from teal_cli.errors import MissingError, TealError
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.gguf_tensors import GgufTensors
from teal_cli.progress import Reporter
from teal_cli.store import paths

_NAME, _VARIABLE = "llama-bench", "TEAL_LLAMA_BENCH"
_SECONDS = 1800.0  # for one run; a 70B on a slow CPU takes ten minutes
_FIELDS = ("n_prompt", "n_gen", "avg_ns", "model_type")
_UNKNOWN = "teal reads what `llama-bench -o json` prints since 2023; try a newer build."


class LlamaCppDecoding:
    """`llama-bench` on a GGUF file: a prompt, then tokens from an empty cache, each on its own."""

    def __init__(
        self, gguf: Path, prompt_tokens: int, tokens: int, device: torch.device, threads: int
    ) -> None:
        """Find the program.

        Args:
            gguf: the model.
            prompt_tokens: tokens of the prompt.
            tokens: tokens to decode; llama-bench decodes them after no prompt.
            device: all layers run on a GPU where ours do, else none.
            threads: as many as compute for us.

        Raises:
            MissingError: it is not there.
        """
        self._gguf, self._prompt_tokens, self._tokens = gguf, prompt_tokens, tokens
        self._gpu, self._threads = device, threads
        self._program = find()
        self.kept: object = None  # removes the file, once nothing holds it

    def about(self) -> tuple[str, str]:
        """The kind of weights that it reads, and its build; runs it for one token.

        Raises:
            TealError: it fails, or prints something else.
        """
        record = self._measure(1, 1)[0]
        kind = str(record["model_type"]).split()[-1]
        what = "random weights at this shape" if self.kept else "the model's own file"
        return kind, f"llama-bench {record.get('build_commit', 'of an unknown build')}, {what}"

    def bytes_per_token(self, config: ModelConfig) -> int:
        """What it reads for a token: all weights but a table of embeddings, and its cache."""
        sizes = {name: tensor.nbytes for name, tensor in GgufTensors(self._gguf).tensors.items()}
        if "output.weight" in sizes:
            del sizes["token_embd.weight"]
        cached = 2 * 2 * config.kv_size * config.num_hidden_layers  # keys and values in float16
        return sum(sizes.values()) + cached * self._tokens // 2

    def warm_up(self) -> None:
        """Nothing: every run of the program warms up."""

    def run(self) -> Run:
        """Time a prompt and the tokens.

        Raises:
            TealError: the program fails, takes too long, or prints something else.
        """
        seconds = {
            (record["n_prompt"], record["n_gen"]): record["avg_ns"] / 1e9
            for record in self._measure(self._prompt_tokens, self._tokens)
        }
        try:
            return Run(
                time_to_first_token_s=seconds[self._prompt_tokens, 0],
                time_per_token_s=seconds[0, self._tokens] / self._tokens,
            )
        except KeyError:
            raise TealError(
                "llama-bench measured something else than it was asked for", hint=_UNKNOWN
            ) from None

    def _measure(self, prompt_tokens: int, tokens: int) -> list[dict[str, Any]]:
        on_gpu = self._gpu.type == "cuda"
        command = [
            self._program, "-m", str(self._gguf), "-o", "json", "-r", "1",
            "-p", str(prompt_tokens), "-n", str(tokens),
            "-t", str(self._threads), "-ngl", "99" if on_gpu else "0",
        ]  # fmt: skip
        # Built for CUDA, it would use a GPU for prompts even with no layer there.
        shown = str(self._gpu.index or 0) if on_gpu else ""
        environment: Mapping[str, str] = os.environ
        if not (on_gpu and "CUDA_VISIBLE_DEVICES" in os.environ):
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": shown}
        try:
            ended = subprocess.run(
                command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_SECONDS,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TealError(f"llama-bench takes more than {_SECONDS / 60:g} minutes") from None
        except OSError as error:
            raise TealError(f"{self._program} cannot be run: {error.strerror}") from None
        if ended.returncode:
            raise TealError(f"{self._program} {_failure(ended.returncode, ended.stderr)}")
        return _records(ended.stdout.decode(errors="replace"))


def llama_cpp_decoding(
    decoder: Decoder, gguf: Path | None, prompt_tokens: int, tokens: int, reporter: Reporter
) -> LlamaCppDecoding:
    """llama.cpp on a model's own GGUF file, or on random weights at its shape and bits a weight.

    Raises:
        MissingError: llama-bench is not there.
        UnsupportedError: no GGUF of the model's architecture can be written.
        TealError: the disk is too full for it.
    """
    find()  # before gigabytes are written for it
    folder = None
    if gguf is None:
        place = paths.cache_dir()
        place.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".llama.cpp-", dir=place)
        gguf = Path(folder.name, "random.gguf")
        with reporter.task("writing random weights for llama.cpp"):
            kind = decoder.weights.quantization
            random_gguf.write(gguf, decoder.config, decoder.dtype, kind)
    threads = torch.get_num_threads()
    decoding = LlamaCppDecoding(gguf, prompt_tokens, tokens, decoder.device, threads)
    decoding.kept = folder
    return decoding


def find() -> str:
    """The program's path, from TEAL_LLAMA_BENCH or the PATH.

    Raises:
        MissingError: it is not there.
    """
    if named := os.environ.get(_VARIABLE):
        if (found := shutil.which(named)) is None:
            raise MissingError(f"TEAL_LLAMA_BENCH names {named}, which is no program")
        return found
    if (found := shutil.which(_NAME)) is None:
        raise MissingError("llama-bench is not on the PATH; TEAL_LLAMA_BENCH can name it")
    return found


def _failure(code: int, stderr: bytes) -> str:
    """How the program ended, and the last thing that it said."""
    if code < 0:
        known = {int(number): number.name for number in signal.Signals}
        name = known.get(-code, f"signal {-code}")
        why = ", an instruction that this CPU refuses: build it anew" if name == "SIGILL" else ""
        return f"was ended by {name}{why}"
    said = stderr.decode(errors="replace").strip().splitlines()
    return f"failed with exit code {code}" + (f": {said[-1].strip()}" if said else "")


def _records(printed: str) -> list[dict[str, Any]]:
    """The document's records, whatever stands before and after it."""
    try:
        found, _ = json.JSONDecoder().raw_decode(printed[printed.index("[") :])
    except ValueError:
        raise TealError("llama-bench printed no JSON", hint=_UNKNOWN) from None
    numbers = ("n_prompt", "n_gen", "avg_ns")
    for record in found:
        if (
            not isinstance(record, dict)
            or any(name not in record for name in _FIELDS)
            or any(not isinstance(record[name], int | float) for name in numbers)
            or record["avg_ns"] <= 0
        ):
            raise TealError("llama-bench printed JSON of another kind", hint=_UNKNOWN)
    if not found:
        raise TealError("llama-bench measured nothing", hint=_UNKNOWN)
    return list(found)
