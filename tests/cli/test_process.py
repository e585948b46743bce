"""How the program meets signals, closed streams and readers that have gone; and what `ps` shows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teal_cli.process import ended_by_signals, uncollected

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

WORK = """
import os, sys, tempfile, time
from pathlib import Path
from teal_cli import app, console
from teal_cli.chat.answers import _silent_keys
from teal_cli.chat.editor import open_reader

def models():
    with tempfile.TemporaryDirectory(dir=os.environ["TEAL_HOME"]), _silent_keys():
        print("ready", flush=True)
        time.sleep(60)

def bench():
    print("ready", flush=True)
    open_reader()()

def convert():
    with console.reporter().task("Converting", 10) as task:
        task.advance(1)
        print("ready", flush=True)
        time.sleep(60)

app._COMMANDS |= {"models": models, "bench": bench, "convert": convert}
sys.argv[0] = "teal"
app.main()
"""

Start = Callable[[str], Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    pexpect = pytest.importorskip("pexpect")
    children = []

    def spawn(command: str) -> Any:
        environment = {**os.environ, "TEAL_HOME": str(tmp_path), "TERM": "xterm"}
        child = pexpect.spawn(
            sys.executable,
            ["-c", WORK, command],
            env={**environment, "PROMPT_TOOLKIT_NO_CPR": "1"},
            encoding="utf-8",
            timeout=60,
        )
        children.append(child)
        child.expect("ready")
        return child

    yield spawn
    for child in children:
        child.close(force=True)


def test_a_task_cannot_swallow_a_signal() -> None:
    """As prompt_toolkit's loading of the history does with whatever is raised in it."""

    async def main() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    with pytest.raises(SystemExit) as left, ended_by_signals():
        asyncio.run(main())
    assert left.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param("models", signal.SIGTERM, id="answer-SIGTERM"),
        pytest.param("models", signal.SIGQUIT, id="answer-SIGQUIT"),
        pytest.param("bench", signal.SIGHUP, id="prompt-SIGHUP"),
        pytest.param("bench", signal.SIGTERM, id="prompt-SIGTERM"),
        pytest.param("convert", signal.SIGQUIT, id="bar-SIGQUIT"),
    ],
)
def test_a_signal_leaves_the_terminal_as_it_was(
    command: str, number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    import termios

    import pexpect

    child = start(command)
    if command == "bench":
        child.expect(">>>")
    echo = termios.ECHO | termios.ICANON
    if command != "convert":
        assert termios.tcgetattr(child.child_fd)[3] & echo != echo  # as it must not stay
    child.kill(number)
    child.expect(pexpect.EOF)
    assert "Traceback" not in child.before
    if command == "convert":
        assert "\x1b[?25h" in child.before  # the cursor is shown again
    left = termios.tcgetattr(child.child_fd)[3]
    child.close()
    assert left & echo == echo
    assert (child.exitstatus, child.signalstatus) == (128 + number, None)
    assert not list(tmp_path.glob("tmp*"))


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    script = 'trap \'\' HUP; exec "$0" -c "$1" models'
    process = subprocess.Popen(
        ["sh", "-c", script, sys.executable, WORK],
        env={**os.environ, "TEAL_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()


def shell(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    """What a shell's line does, in which $teal is the program."""
    return subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "TEAL_HOME": str(home), "teal": f"{sys.executable} -m teal_cli"},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$teal --version", 0, ""),
        ("$teal --version <&-", 0, ""),
        ("$teal --version >&-", 0, ""),
        ("$teal --version 2>&-", 0, ""),
        ("$teal --version <&- >&- 2>&-", 0, ""),
        ("$teal models <&-", 0, "no models are stored"),
        ("$teal models --json >&-", 0, ""),
        ("$teal models --remove x 2>&-", 3, ""),
        ("$teal models --remove x <&- >&- 2>&-", 3, ""),
        ("$teal chat <&-", 2, "the prompt is empty"),
        ("$teal chat <&- >&- 2>&-", 2, ""),
        ("$teal chat no/such/model/x <&- 2>&-", 2, ""),
        ("$teal chat 0>/dev/null", 1, "a stream is closed, or not open for this"),
        ("$teal models --json > /dev/full", 1, "the disk is full"),
        ("$teal models --remove x 2> /dev/full", 3, ""),
        ("$teal models --remove x 2>&1 | true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
def test_streams_that_are_not_there(line: str, code: int | None, said: str, tmp_path: Path) -> None:
    done = shell(line, tmp_path / "home")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "internal error" not in done.stderr
    assert said in done.stderr
    assert done.returncode == code if code is not None else done.returncode in (1, 3)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "from teal_cli import process; process.open_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); "
        "import sys; sys.stdout.flush(); file.write(str(file.fileno())); file.close()"
    )
    subprocess.run(
        ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], check=True, timeout=60
    )
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lets a process do this")
@pytest.mark.parametrize("form", [["--token", "hf_SECRET"], ["--token=hf_SECRET"]], ids=len)
def test_ps_shows_no_token(form: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom teal_cli import app\n"
        "def show():\n    print(Path('/proc/self/cmdline').read_bytes())\n"
        "def models(token: str = ''):\n    show()\n    print(token)\n"
        "app._COMMANDS['models'] = models\nsys.argv[0] = 'teal'\napp.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "models", *form], capture_output=True, text=True, timeout=60
    )
    shown, given = done.stdout.splitlines()
    assert "SECRET" not in shown
    assert "--token" in shown
    assert "models" in shown
    assert given == "hf_SECRET"


def test_imports_are_not_searched_for_garbage() -> None:
    import gc

    def fails() -> None:
        with uncollected():
            assert not gc.isenabled()
            raise ImportError

    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError):
            fails()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
