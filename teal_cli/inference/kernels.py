"""Which kernels decode and prefill: the fused ones of a device, or the decoder in plain torch."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any, Literal

from teal_cli.errors import whole
from teal_cli.faults import is_out_of_memory
from teal_cli.inference.launches import stored_launches
from teal_cli.inference.step import DecoderPrefill, DecoderStep, Prefill, Step, step_tensors
from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter

Backend = Literal["auto", "reference"]

# Where the fused step of a device is, and what it is written in.
FUSED_STEPS = {"cuda": ("teal_kernels.gpu", "triton"), "cpu": ("teal_kernels.cpu", "numba")}


def choose_kernels(
    decoder: Decoder, cache: KVCache, backend: Backend, deterministic: bool, reporter: Reporter
) -> tuple[Step, Prefill]:
    """The fused kernels of the decoder's device where they can be had, otherwise the decoder."""
    if backend == "auto":
        try:
            return fused_kernels(decoder, cache, deterministic, reporter)
        except Exception as error:  # a broken numba, Triton or LLVM fails in any way it likes
            if is_out_of_memory(error):
                raise
            reporter.note(
                f"the compiled kernels cannot be used here ({whole(error)}); "
                "decoding in plain torch, which sparsity does not make faster"
            )
    return DecoderStep(decoder, cache), DecoderPrefill(decoder, cache)


def fused_kernels(
    decoder: Decoder, cache: KVCache, deterministic: bool, reporter: Reporter
) -> tuple[Step, Prefill]:
    """Bind the device's kernels to a decoder and a cache; what is not compiled yet is.

    Raises:
        Exception: whatever the compiler or the device does.
    """
    name, language = FUSED_STEPS[decoder.device.type]
    module = importlib.import_module(name)
    tensors = step_tensors(decoder, cache)
    prefill: Prefill = DecoderPrefill(decoder, cache)
    options: dict[str, Any] = {}
    if language == "triton":
        options["launches"] = stored_launches(decoder, reporter)
        options["deterministic"] = deterministic
    first = language == "numba" and not module.is_compiled(tensors)
    with reporter.task("compiling the kernels, once") if first else nullcontext():
        step: Step = module.DecodeStep(tensors, **options)
        step(0, 0)  # compiles, or shows that it cannot; the prompt overwrites what it caches
        if language == "numba":
            prefill = module.Prefill(
                tensors,
                compiling=lambda: reporter.task("compiling the kernels that check guesses, once"),
            )
    if language == "numba" and (problem := module.cache_problem()) is not None:
        reporter.note(problem)
    return step, prefill
