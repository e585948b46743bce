"""How many threads compute, by what the system leaves to the process, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teal_cli import app, options, threads
from teal_cli.environment import describe, environment


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def groups(root: Path, own: str, files: dict[str, str]) -> Path:
    """A system whose process is in the control groups `own`, with these files in them."""
    for name, content in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        pytest.param("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, 8, id="v2-none"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "300000 100000\n"}, 3, id="v2"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 2, id="v2-and-a-half"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "5000 100000\n"}, 1, id="v2-less-than-a-core"),
        pytest.param("0::/a/b\n", {f"{V2}/a/cpu.max": "200000 100000\n",
                                   f"{V2}/a/b/cpu.max": "400000 100000\n"}, 2, id="v2-nested"),
        pytest.param("0::/a/b\n", {f"{V2}/a/cpu.max": "max 100000\n",
                                   f"{V2}/a/b/cpu.max": "100000 50000\n"}, 2, id="v2-innermost"),
        pytest.param("0::/outside/name\n", {f"{V2}/cpu.max": "200000 100000"}, 2,
                     id="v2-in-a-container"),
        pytest.param("0::/../../other\n", {f"{V2}/cpu.max": "200000 100000"}, 2,
                     id="v2-outside-the-namespace"),
        pytest.param("3:cpu,cpuacct:/pod/one\n0::/\n",
                     {f"{V1}/pod/one/cpu.cfs_quota_us": "400000\n",
                      f"{V1}/pod/one/cpu.cfs_period_us": "100000\n",
                      f"{V1}/cpu.cfs_quota_us": "-1\n",
                      f"{V1}/cpu.cfs_period_us": "100000\n"}, 4, id="v1"),
        pytest.param("3:cpuacct,cpu:/pod\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000",
                                              "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
                     3, id="v1-in-a-container"),
        pytest.param("3:memory:/x\n", {}, 8, id="v1-of-other-things"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "nonsense"}, 8, id="unreadable"),
        pytest.param("0::/\n", {f"{V2}/cpu.max": "1000000 0"}, 8, id="no-period"),
        pytest.param("what is this\n", {}, 8, id="not-groups"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cores")
def test_a_containers_quota(own: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert threads.usable(groups(tmp_path, own, files)) == expected


@pytest.mark.usefixtures("cores")
def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert threads.usable(tmp_path) == 8


def test_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 7}, raising=False)
    assert threads.usable(tmp_path) == 2


def test_what_is_asked_is_used_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(threads, "usable", lambda: 3)
        assert threads.default() == 3
        threads.use_threads(None)
        assert environment(torch.device("cpu"))["threads"] == torch.get_num_threads() == 3
        threads.use_threads(1)
        assert environment(torch.device("cpu"))["threads"] == torch.get_num_threads() == 1
        assert "1 thread of" in describe({})
    finally:
        torch.set_num_threads(before)


def test_torchs_threads_spin_briefly() -> None:
    variables = {"HOME": "/"}
    threads.spin_briefly(variables)
    assert int(variables["GOMP_SPINCOUNT"]) < 100_000
    assert int(variables["KMP_BLOCKTIME"]) < 200


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_or_as_the_user_says(name: str) -> None:
    variables = {name: "1000000"}
    threads.spin_briefly(variables)
    assert variables == {name: "1000000"}


def test_it_is_said_before_torch_is_imported() -> None:
    code = (
        "import sys, os\n"
        "from teal_cli import threads\n"
        "def see(variables): print('torch' in sys.modules, 'numpy' in sys.modules)\n"
        "threads.spin_briefly = see\n"
        "from teal_cli import app\n"
        "sys.argv = ['teal', '--env']\n"
        "app.main()\n"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True).splitlines()[0] == "False False"


@pytest.mark.parametrize("command", ["chat", "bench", "eval", "calibrate", "convert"])
@pytest.mark.parametrize(
    ("words", "variable", "sentence"),
    [
        (["--threads", "0"], None, "--threads takes 1 or more, not '0'"),
        (["--threads", "two"], None, "--threads takes a whole number, not 'two'"),
        (["--threads", "4"], None, "4 threads are more than the 3 cores that this process may use"),
        ([], "4", "4 threads are more than the 3 cores that this process may use"),
        ([], "many", "--threads takes a whole number, not 'many'"),
    ],
)
def test_numbers_that_cannot_be(
    command: str,
    words: list[str],
    variable: str | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options, "usable", lambda: 3)
    if variable is not None:
        monkeypatch.setenv("TEAL_THREADS", variable)
    monkeypatch.setattr(sys, "argv", ["teal", command, "demo", *words])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
