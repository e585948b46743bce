"""A setting: what it refuses, and how it is made and named."""

from __future__ import annotations

import pytest
import torch

from teal_cli.errors import UsageError
from teal_cli.sparsity.setting import DENSE, Setting


@pytest.mark.parametrize("target", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_target_out_of_range_is_refused(target: float) -> None:
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        Setting("uniform", target, None)


@pytest.mark.parametrize("shape", [(3, 4), (7,), (1, 3, 7)])
def test_thresholds_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="thresholds are"):
        Setting("uniform", 0.5, torch.zeros(shape))


def test_thresholds_are_as_the_kernels_read_them() -> None:
    made = Setting("uniform", 0.5, torch.ones(7, 3, dtype=torch.float64).T).thresholds
    assert made is not None
    assert made.dtype == torch.float32
    assert made.is_contiguous()


def test_dense_is_one_constant() -> None:
    assert DENSE.thresholds is None
    assert DENSE.label == "dense"
    assert Setting("int8", 0.0, None).label == "int8 0"
