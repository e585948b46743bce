"""`teal serve` as a user runs it, and the demo model's answer through it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve.conftest import Running, Serve

pytest.importorskip("starlette", reason="needs the extra `serve`")

from serve.test_http import ask

from teal_cli.serve.listening import bound, check_host, listen

openai = pytest.importorskip("openai")

WORK = "import sys; from teal_cli import app; sys.argv[0] = 'teal'; app.main()"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def teal(home: Path, *arguments: str | Path) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", WORK, "serve", *map(str, arguments)],
        env={**os.environ, "TEAL_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--host", "0.0.0.0"), "there is no key", 2),
        (("--host", "::"), "there is no key", 2),
        (("--host", "0.0.0.0", "--api-key", " "), "key is empty", 2),
        (("--host", "no.such.host.invalid", "--api-key", "k"), "no address", 1),
        (("--port", "{taken}"), "is taken by another program", 1),
        (("--context", "100000"), "beyond this model's context", 2),
    ],
)
def test_bad_input_is_one_sentence(
    home: Path, tiny_model: Path, arguments: Any, said: str, code: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        words = [word.format(taken=taken) for word in arguments]
        process = teal(home, tiny_model, "-s", "0", *words)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_hosts_that_others_reach_need_a_key() -> None:
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        check_host(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(Exception, match="no key"):
            check_host(host, None)
        check_host(host, "key")


def test_two_servers_that_start_at_once_share_no_port() -> None:
    first = bound("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, bound("127.0.0.1", port) as second:  # nobody listens yet
        listen(first)
        with pytest.raises(Exception, match="taken"):
            listen(second)


@pytest.fixture
def served(home: Path, tiny_model: Path) -> Iterator[tuple[Any, str]]:
    options = ("--port", "0", "--api-key", "sesame", "-s", "0", "--drain", "5")
    process = teal(home, tiny_model, *options)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_the_answer_finish(
    served: tuple[Any, str], number: signal.Signals, code: int
) -> None:
    process, url = served
    client = openai.OpenAI(base_url=url, api_key="sesame", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()
    model = client.models.list().data[0].id
    stream = client.completions.create(
        model=model, prompt="Hello", max_tokens=200, stream=True, temperature=1.5, seed=3
    )
    steps = [next(iter(stream))]
    process.send_signal(number)
    steps += [*stream]
    assert steps[-1].choices[0].finish_reason in ("stop", "length")
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert "sesame" not in err
    assert "POST /v1/completions 200" in err


@pytest.mark.demo
def test_the_demo_model_is_asked_by_the_openai_client(demo_checkpoint: Any, serve: Serve) -> None:
    from teal_cli.sparsity import stored

    running: Running = serve(
        of=demo_checkpoint,
        profile=stored.usable_or_built_in(demo_checkpoint),
        sparsity=0.25,
    )
    client = openai.OpenAI(base_url=running.url, api_key="none")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for model in client.models.list():
        answer = client.chat.completions.create(model=model.id, messages=question, max_tokens=12)
        assert "Paris" in answer.choices[0].message.content
    assert ask(running, path="/health")[0] == 200
