"""The GPU's projection that stands alone, against float64."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from projection_cases import make_case, oracle

pytest.importorskip("triton")

from teal_kernels.gpu import launch, linear

pytestmark = pytest.mark.gpu

SHAPES = [(33, (0, 40, 48, 56)), (65, (0, 31, 62))]


# Sides of six axes: of each two axes, all four pairs are among them.
SIDES = [(a, b, c, a ^ b, a ^ c, b ^ c) for a, b, c in product((0, 1), repeat=3)]


@pytest.mark.parametrize("sides", SIDES, ids=lambda sides: "".join(map(str, sides)))
def test_each_row_has_its_own_survivors(
    device: str, sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_slots, with_factor, with_bias, *others = sides
    dtype = (torch.float16, torch.bfloat16)[others[0]]
    inputs, offsets = SHAPES[others[1]]
    sparsity = (0.0, 0.5)[others[2]]
    if with_slots:
        tile = launch.Launch(32, 64, 1, slots=16, more=8)
        monkeypatch.setattr(linear, "linear_launch", lambda *a: launch.fit(tile, *a[:2], a[3]))
    cases = [make_case(inputs, offsets, sparsity, dtype, seed=n) for n in range(3)]
    first = cases[0]
    cases = [case._replace(weight=first.weight, thresholds=first.thresholds) for case in cases]
    widths = [end - start for start, end in pairwise(offsets)]
    factor = 0.5 + torch.rand(inputs) if with_factor else None
    bias = torch.randn(offsets[-1]) if with_bias else None
    multiply = linear.Linear(
        first.weight.to(device),
        widths,
        first.thresholds.to(device),
        factor=None if factor is None else factor.to(device),
        bias=None if bias is None else bias.to(device),
    )
    y = multiply(torch.stack([case.x for case in cases]).to(device)).cpu()
    assert y.dtype == dtype
    if factor is not None:
        cases = [case._replace(x=case.x.float() * factor) for case in cases]
    expected = torch.stack([oracle(case) for case in cases])
    # Float32 sums of K products, then one rounding to the dtype.
    size = torch.stack([case.x.double().abs() @ case.weight.double().abs() for case in cases])
    if bias is not None:
        expected += bias
        size += bias.abs()
    bound = size * inputs * 2**-24 + expected.abs() * torch.finfo(dtype).eps + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()


# The layers of Llama-3-8B as vLLM has them, on one rank and on each of two: K and the columns.
VLLM = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
    "qkv of two": (4096, (2048, 512, 512)),
    "o of two": (2048, (4096,)),
    "gate_up of two": (4096, (7168, 7168)),
    "down of two": (7168, (4096,)),
}


@pytest.mark.parametrize("layer", list(VLLM))
def test_vllms_layers_as_a_graph_holds_them(layer: str, device: str) -> None:
    dtype = torch.bfloat16 if layer.endswith("of two") else torch.float16
    inputs, widths = VLLM[layer]
    if device == "cpu":  # the interpreter is slow
        inputs, widths = inputs // 64, tuple(width // 64 for width in widths)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(inputs, sum(widths), generator=generator, device=device).to(dtype)
    thresholds = torch.tensor([0.5, 0.6, 0.55][: len(widths)], device=device)
    bias = torch.randn(sum(widths), generator=generator, device=device)
    factor = 0.5 + torch.rand(inputs, generator=generator, device=device)
    if layer.startswith(("o", "down")):  # nothing that is learnt of their inputs
        factor = None
    multiply = linear.Linear(weight, widths, thresholds, factor=factor, bias=bias)
    for sequences in (1, 2, 8):
        x = torch.randn(sequences, inputs, generator=generator, device=device).to(dtype)
        if device == "cpu":
            y = multiply(x)
        else:
            held = torch.zeros_like(x)
            multiply(held)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = multiply(held)
            held.copy_(x)
            for _ in range(2):
                graph.replay()
        parts = weight.double().split(widths, dim=1)
        x = x.float() if factor is None else x.float() * factor
        kept = [torch.where(x.abs() > level, x.double(), 0) for level in thresholds]
        expected = torch.cat([k @ part for k, part in zip(kept, parts, strict=True)], dim=1) + bias
        size = torch.cat([k.abs() @ p.abs() for k, p in zip(kept, parts, strict=True)], dim=1)
        size += bias.abs()
        bound = size * inputs**0.5 * 2**-23 + expected.abs() * torch.finfo(dtype).eps
        assert ((y.double() - expected).abs() <= bound).all()


def test_dropped_rows_are_never_used(device: str) -> None:
    case: Any = make_case(40, (0, 24, 48), 0.5, torch.float16)
    case.weight[case.x.float().abs() <= case.thresholds.min()] = torch.nan
    multiply = linear.Linear(case.weight.to(device), [24, 24], case.thresholds.to(device))
    assert multiply(case.x[None].to(device)).isfinite().all()


def test_other_numbers_of_thresholds_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        linear.Linear(torch.zeros(8, 8, device=device), [8], torch.zeros(2, device=device))
