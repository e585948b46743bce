"""Triton kernels: on a CUDA device, or on the CPU in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so `test_gpu_interpreted.py` runs this
file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from projection_cases import DTYPES, SHAPES, SPARSITIES, Case, assert_close, make_case, oracle
from teal_kernels.quantized import QuantizedMatrix

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "offsets"), SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparse_project(
    inputs: int, offsets: tuple[int, ...], sparsity: float, dtype: torch.dtype, device: str
) -> None:
    from teal_kernels import gpu

    case = make_case(inputs, offsets, sparsity, dtype, device)
    bias = torch.randn(offsets[-1], device=device).to(dtype)
    assert_close(gpu.sparse_project(*case), oracle(case), case)
    assert_close(gpu.sparse_project(*case, bias), oracle(case, bias), case)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 31, 64])
@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 31, 63])
def test_every_side_of_a_tile(inputs: int, outputs: int, device: str) -> None:
    from teal_kernels import gpu

    case = make_case(inputs, (0, outputs), 0.5, torch.float16, device)
    y = gpu.sparse_project(*case, launch=gpu.Launch(16, 16, 4))
    assert_close(y, oracle(case), case)


def test_sizes_of_a_model(device: str) -> None:
    from teal_kernels import gpu

    inputs, offsets = (4096, (0, 4096, 5120, 6144)) if device == "cuda" else (64, (0, 96, 120, 144))
    case = make_case(inputs, offsets, 0.5, torch.float16, device)
    assert_close(gpu.sparse_project(*case), oracle(case), case)


def test_nothing_and_everything_dropped(device: str) -> None:
    from teal_kernels import gpu

    case = make_case(63, (0, 60), 0.5, torch.float16, device)
    everything = case._replace(thresholds=case.x.float().abs().max().reshape(1))
    assert not gpu.sparse_project(*everything).any()
    nothing = case._replace(thresholds=torch.full((1,), -torch.inf, device=device))
    assert_close(gpu.sparse_project(*nothing), oracle(nothing), nothing)


def test_ties_are_dropped(device: str) -> None:
    from teal_kernels import gpu

    x = torch.tensor([0.5, -0.5, 0.75, -0.25], dtype=torch.float16, device=device)
    weight = torch.eye(4, dtype=torch.float16, device=device)
    y = gpu.sparse_project(x, weight, (0, 4), torch.tensor([0.5], device=device))
    assert y.tolist() == [0.0, 0.0, 0.75, 0.0]


@pytest.mark.parametrize("level", [-torch.inf, 0.5])
def test_what_is_not_a_number_is_kept(level: float, device: str) -> None:
    from teal_kernels import gpu

    x = torch.tensor([0.1, torch.nan, 2.0], device=device)
    weight, levels = torch.ones(3, 4, device=device), torch.tensor([level], device=device)
    assert gpu.sparse_project(x, weight, (0, 4), levels).isnan().all()


def test_dropped_rows_are_never_used(device: str) -> None:
    from teal_kernels import gpu

    case = make_case(40, (0, 24, 48), 0.5, torch.float16, device)
    dropped = case.x.float().abs() <= case.thresholds.min()
    case.weight[dropped] = torch.nan
    expected = oracle(case)
    assert not expected.isnan().any()
    assert_close(
        gpu.sparse_project(*case), expected, case._replace(weight=case.weight.nan_to_num())
    )


def test_strided_inputs(device: str) -> None:
    from teal_kernels import gpu

    plain = make_case(33, (0, 40), 0.5, torch.float16, device)
    x = torch.full((33, 3), torch.nan, dtype=torch.float16, device=device)
    x[:, 1] = plain.x
    weight = torch.full((33, 57), torch.nan, dtype=torch.float16, device=device)
    weight[:, 5:45] = plain.weight
    thresholds = torch.full((1, 2), torch.nan, device=device)
    thresholds[:, 0] = plain.thresholds
    case = Case(x[:, 1], weight[:, 5:45], plain.offsets, thresholds[:, 0])
    assert_close(gpu.sparse_project(*case), oracle(plain), plain)


def test_offsets_past_two_gigabytes(device: str) -> None:
    if device == "cpu" or torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs a CUDA device with 12 GB free")
    from teal_kernels import gpu

    case = make_case(4, (0, 64), 0.0, torch.float16, device)
    storage = torch.zeros(4, 1 << 30, dtype=torch.float16, device=device)
    storage[:, :64] = case.weight
    y = gpu.sparse_project(case.x, storage[:, :64], case.offsets, case.thresholds)
    assert_close(y, oracle(case), case)


def test_bad_arguments_are_named(device: str) -> None:
    from teal_kernels import gpu

    case = make_case(4, (0, 1, 2, 3, 4), 0.5, torch.float16, device)
    with pytest.raises(ValueError, match="one to 3 column blocks"):
        gpu.sparse_project(*case)
    with pytest.raises(ValueError, match="x must be float16, bfloat16 or float32"):
        gpu.sparse_project(case.x.double(), case.weight, (0, 4), case.thresholds[:1])
    quantized = QuantizedMatrix.int8(torch.ones(4, 8, device=device))
    with pytest.raises(ValueError, match="only a token's step multiplies quantized"):
        gpu.sparse_project(case.x, quantized, (0, 8), case.thresholds[:1])
