"""Every kernel of the step compiles for the devices that Triton supports, without one at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teal_cli.inference.step import step_tensors
from teal_cli.model.config import ModelConfig
from teal_cli.model.quantization import Quantization
from teal_cli.model.random_weights import random_decoder

triton = pytest.importorskip("triton")

_CONFIG = {
    "model_type": "qwen3",
    "attention_bias": True,
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
# Pairs in runs of 16 channels.
_PARTIAL = {**_CONFIG, "model_type": "phi3", "head_dim": 128, "partial_rotary_factor": 0.75}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class _Compiler:
    """Takes the place of a launch: compiles the kernel, once for each way that it is launched."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: dict[str, set[str]] = {}
        self.ptx: dict[str, list[str]] = {}

    def __call__(self, pdl: bool, kernel: Any, grid: Any, num_warps: int, **arguments: Any) -> None:
        from triton.compiler import ASTSource

        registers = arguments.pop("maxnreg", None)
        values = arguments | {"PDL": pdl}
        signature, constexprs = {}, {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
            elif value is None or parameter.is_constexpr:
                signature[name] = "constexpr"
                constexprs[(index,)] = value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        key = repr((signature, constexprs, num_warps, registers))
        if key in self.compiled.setdefault(kernel.__name__, set()):
            return
        options = {"num_warps": num_warps, "num_stages": 1, "launch_pdl": pdl}
        if registers:
            options["maxnreg"] = registers
        source = ASTSource(kernel, signature, constexprs, {})
        binary = triton.compile(source, target=self.target, options=options)
        assert binary.asm["cubin"]
        self.compiled[kernel.__name__].add(key)
        self.ptx.setdefault(kernel.__name__, []).append(binary.asm["ptx"])


@pytest.mark.parametrize(
    ("capability", "dtype", "kind", "config"),
    [
        (75, torch.float16, None, _CONFIG),
        (80, torch.bfloat16, None, _CONFIG),
        (90, torch.float16, None, _CONFIG),
        (80, torch.bfloat16, Quantization(128, head=True), _CONFIG),
        (90, torch.float16, Quantization(0, head=True), _CONFIG),
        (90, torch.float16, Quantization(64), _CONFIG),
        (80, torch.float16, None, _PARTIAL),
    ],
    ids=["sm75", "sm80", "sm90", "sm80-int4-128", "sm90-int8", "sm90-int4", "sm80-partial-rope"],
)
def test_all_kernels_compile(
    capability: int,
    dtype: torch.dtype,
    kind: Quantization | None,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from teal_kernels.gpu import DecodeStep, chain, launch
    from teal_kernels.gpu.sample import Choice

    device = launch.DeviceClass((capability // 10, capability % 10), 132)
    compiler = _Compiler(capability)
    monkeypatch.setattr(chain, "launch", compiler)
    monkeypatch.setattr(launch.DeviceClass, "of", lambda _: device)
    made = ModelConfig.from_dict(config)
    decoder = random_decoder(made, device="cpu", dtype=dtype, seed=0, kind=kind)
    tensors = step_tensors(decoder, decoder.new_cache(256))
    step = DecodeStep(tensors, dependent_launch=capability >= 90, deterministic=capability == 80)
    regimes: tuple[float, ...] = (launch.SPARSE,)
    if capability == 90:  # of integers, whose sparser launches take long, the other two
        regimes = launch.REGIMES if kind is None else (launch.DENSE, launch.SPARSE)
    for regime in regimes:
        step.expect(regime)
        for choice in (None, Choice(), Choice(True, True, True, True)):
            step.chain.launch_all(choice)
    chosen = torch.zeros(5, dtype=torch.int32)
    step.follow(chosen[:4], chosen, 0)
    kernels = {"follow_kernel"}
    kernels |= {"embed_kernel", "norm_project_kernel", "attention_kernel", "combine_project_kernel"}
    kernels |= {"activate_project_kernel", "logits_kernel", "best_kernel", "advance_kernel"}
    assert set(compiler.compiled) == kernels | {"peak_kernel", "select_kernel", "penalise_kernel"}


# The matrices' product, and the kind of the weights.
_SEVERAL = {
    "sm75": (75, torch.float16, None, "product"),
    "sm75-int4": (75, torch.float16, Quantization(64), "int4"),
    "sm80-int4-128": (80, torch.bfloat16, Quantization(128, head=True), "int4"),
    "sm80-int8-fp32": (80, torch.float32, Quantization(0), "int8"),
    "sm90-int8": (90, torch.float16, Quantization(0, head=True), "int8"),
    "sm90-int4": (90, torch.float16, Quantization(64), "int4"),
    "sm90-int4-24": (90, torch.float16, Quantization(24), "int4"),
}


@pytest.mark.parametrize(
    ("capability", "dtype", "kind", "product"), _SEVERAL.values(), ids=list(_SEVERAL)
)
def test_the_kernels_for_several_tokens_compile(
    capability: int,
    dtype: torch.dtype,
    kind: Quantization | None,
    product: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from teal_kernels.gpu import VerifyStep, launch, verify

    device = launch.DeviceClass((capability // 10, capability % 10), 132)
    monkeypatch.setattr(launch.DeviceClass, "of", lambda _: device)
    compiler = _Compiler(capability)
    monkeypatch.setattr(verify, "launch", compiler)
    config = ModelConfig.from_dict(_CONFIG)
    decoder = random_decoder(config, device="cpu", dtype=dtype, seed=0, kind=kind)
    tensors = step_tensors(decoder, decoder.new_cache(256))
    VerifyStep(tensors).launch_all()
    kernels = {"embed_rows_kernel", "norm_rows_kernel", "place_rows_kernel", "activate_rows_kernel"}
    kernels |= {"attention_rows_kernel", "combine_rows_kernel", "logits_rows_kernel"}
    rows = "product_rows_kernel" if kind is None else f"{product}_rows_kernel"
    assert set(compiler.compiled) == kernels | {rows}
    if kind is not None and dtype != torch.float32 and capability >= 80:
        # Integers are unpacked on their way from shared memory, not before.
        for ptx in compiler.ptx[rows]:
            assert "ldmatrix" in ptx
            assert ".trans." in ptx


def test_what_prefill_dequantizes_with_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from teal_kernels import dequantize, quantized

    compiler, kernel = _Compiler(90), dequantize.dequantize_kernel

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda num_warps, **arguments: compiler(
                False, kernel, grid, num_warps, **arguments
            )

    monkeypatch.setattr(dequantize, "dequantize_kernel", Launched())
    monkeypatch.setattr(quantized, "_kernel", lambda _: dequantize.dequantize)
    weight = torch.ones(4, 256)
    quantized.QuantizedMatrix.int8(weight).dequantize(0, 256, dtype=torch.float16)
    quantized.QuantizedMatrix.int4(weight, 64).dequantize(3, 70, dtype=torch.bfloat16)
    quantized.QuantizedRows.int8(weight).dequantize(1, 3, dtype=torch.float32)
    assert len(compiler.compiled["dequantize_kernel"]) == 3
