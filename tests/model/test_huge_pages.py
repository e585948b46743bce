"""Weights in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from teal_cli.model import huge_pages


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has huge pages for who asks for them."""
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    return setting


def _flags(address: int) -> list[str]:
    """What the system knows of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no memory at {address:x}")


def test_copies_are_the_same_side_by_side_and_in_huge_pages(
    allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("the system tells nothing of its memory")
    monkeypatch.setattr(huge_pages, "_CHUNK", 1 << 20)
    place = huge_pages.placing("cpu", 0)
    tensors = [
        torch.randn(3, 5),
        torch.randn(300, 1000, dtype=torch.float16),
        torch.randint(-128, 128, (2000, 700), dtype=torch.int8),  # more than a chunk
        torch.empty(0, 4),
    ]
    copies = [place(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
        assert copy.data_ptr() != tensor.data_ptr() or not copy.numel()
    assert all("hg" in _flags(copy.data_ptr()) for copy in copies[:3])


def test_tensors_stay_where_copies_are_of_no_use(
    allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(4)
    monkeypatch.setattr(huge_pages, "available_memory", lambda device: 1000)
    assert huge_pages.placing("cpu", 500)(tensor) is not tensor
    assert huge_pages.placing("cpu", 501)(tensor) is tensor
    assert huge_pages.placing("cuda", 0)(tensor) is tensor
    allowed.write_text("always madvise [never]\n")
    assert huge_pages.placing("cpu", 0)(tensor) is tensor
    allowed.unlink()
    assert huge_pages.placing("cpu", 0)(tensor) is tensor
