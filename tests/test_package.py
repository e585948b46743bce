"""The package as it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_nothing_of_ours_is_importable_as_kernels(tmp_path: Path) -> None:
    # Hugging Face publishes a package of that name, and transformers imports it.
    code = (
        "import importlib.util, teal_kernels, pathlib\n"
        "ours = pathlib.Path(teal_kernels.__file__).parents[1]\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "found = list(spec.submodule_search_locations) if spec else []\n"
        "assert str(ours) not in found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_python_m_is_the_same_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "teal_cli", "--version"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("teal ")
