"""The bandwidth is that of buffers that fit, and is told apart from a failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from clocks import tick

from teal_cli.benchmark import bandwidth
from teal_cli.environment import available_memory, environment
from teal_cli.errors import TealError

CPU = torch.device("cpu")


def test_a_read_of_the_whole_buffer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 1 << 26)
    tick(monkeypatch, bandwidth)
    found = bandwidth.measure_bandwidth(CPU)
    assert found.bytes_per_s == 1 << 26  # read in a second
    assert "0.1 GB, 1 threads" in found.how


def test_no_memory_for_a_buffer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "available_memory", lambda device: 1 << 20)
    with pytest.raises(TealError, match="not enough memory"):
        bandwidth.measure_bandwidth(CPU)


def test_environment_names_device_and_versions() -> None:
    found = environment(CPU)
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert {"teal", "python", "torch", "transformers"} <= set(found["versions"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing says so")
def test_free_memory_is_a_part_of_all_there_is() -> None:
    total, *_ = Path("/proc/meminfo").read_text().splitlines()
    free = available_memory(CPU)
    assert free is not None
    assert 1 << 20 < free <= int(total.split()[1]) << 10
