"""The plug-in: with the real engine by `.ci/vllm`, and where there is no vLLM."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from teal_cli.vllm_plugin.versions import NEWEST, OLDEST

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="vLLM for CPUs is built for Linux")
def test_vllm_answers_as_transformers_does() -> None:
    place = os.environ.get("TEAL_VLLM")
    if place is None:
        pytest.skip("set TEAL_VLLM=FOLDER: `.ci/vllm` keeps an environment of 4 GB there")
    run = subprocess.run([ROOT / ".ci" / "vllm", place], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]


def test_without_vllm_the_plug_in_says_so_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    [found] = [each for each in entry_points(group="vllm.general_plugins") if each.name == "teal"]
    with caplog.at_level(logging.WARNING, "vllm.teal"):
        found.load()()
    assert "cannot be served by this vLLM" in caplog.text


def test_the_extra_names_the_versions_that_the_plug_in_takes() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    bounds = re.search(r'^vllm = \["vllm>=(\d+)\.(\d+),<(\d+)\.(\d+)"\]$', text, re.M)
    assert bounds is not None
    found = [int(number) for number in bounds.groups()]
    assert found == [*OLDEST, *NEWEST]
