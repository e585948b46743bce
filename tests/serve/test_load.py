"""Many clients at once: nothing is lost, everyone has a turn, the bound holds; and the end."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serve.conftest import NAME, Running, Serve

pytest.importorskip("starlette", reason="needs the extra `serve`")

from serve.test_http import CHAT, TURN, ask, is_error, until

from teal_cli.serve.api import Limits

openai = pytest.importorskip("openai")


def client_of(running: Running) -> Any:
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60)


def test_32_clients_are_all_answered_rightly(serve: Serve) -> None:
    running = serve(prefix_bytes=4 << 20)
    client = client_of(running)
    prompts = [[{"role": "user", "content": f"Number {n}"}] for n in range(32)]

    def answer(messages: list[dict[str, str]], **options: Any) -> str:
        made = client.chat.completions.create(model=NAME, messages=messages, **options)
        return str(made.choices[0].message.content)

    alone = [answer(prompt, max_tokens=8) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = [*pool.map(lambda prompt: answer(prompt, max_tokens=8), prompts * 2)]
    assert together == alone * 2
    assert running.is_idle()
    assert running.engine.prefix_bytes <= 4 << 20


def test_one_who_asks_much_does_not_keep_the_others_waiting(serve: Serve) -> None:
    running = serve()
    running.session.seconds = 0.005
    client = client_of(running)
    ended: list[str] = []

    def answer(user: str) -> None:
        client.chat.completions.create(model=NAME, messages=TURN, max_tokens=10, user=user)
        ended.append(user)

    greedy = [threading.Thread(target=answer, args=("greedy",)) for _ in range(8)]
    for thread in greedy:
        thread.start()
    until(lambda: running.engine.waiting >= 7)
    modest = threading.Thread(target=answer, args=("modest",))
    modest.start()
    for thread in (*greedy, modest):
        thread.join(60)
    assert ended.index("modest") <= 4
    assert len(ended) == 9


def test_beyond_the_queue_it_is_said_when_to_ask_again(serve: Serve) -> None:
    running = serve(most_waiting=2)
    running.session.seconds = 0.02
    body = {"model": NAME, "messages": TURN, "max_tokens": 100, "temperature": 1.5, "stream": True}
    client = client_of(running)
    streams = [client.chat.completions.create(**body)]  # begun
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(client.chat.completions.create, **body) for _ in range(2)]
        until(lambda: running.engine.waiting == 2)
        status, document, headers = ask(running, body)
        assert (status, is_error(document)) == (429, True)
        assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**body)
        running.session.seconds = 0.0
        streams += [future.result() for future in waiting]
        for stream in streams:
            assert [*stream][-1].choices[0].finish_reason in ("stop", "length")


def test_an_answer_that_takes_too_long_is_cut(serve: Serve) -> None:
    running = serve(limits=Limits(0.8))
    running.session.seconds = 0.5
    body = {"model": NAME, "messages": TURN, "max_tokens": 300, "temperature": 1.5, "seed": 1}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, running, body)
        until(lambda: running.engine.running)
        status, document, _ = ask(running, body)  # waits behind it
        assert (status, is_error(document)) == (503, True)
        status, document, _ = first.result()
    assert (status, document["choices"][0]["finish_reason"]) == (200, "length")
    assert document["usage"]["completion_tokens"] in (1, 2, 3)


@pytest.mark.parametrize("drain_s", [10.0, 0.2])
def test_at_the_end_the_present_answer_finishes_or_is_cut(serve: Serve, drain_s: float) -> None:
    running = serve(drain_s=drain_s)
    body = {"model": NAME, "messages": TURN, "max_tokens": 60, "temperature": 1.5, "seed": 1}
    whole = ask(running, body)[1]["usage"]["completion_tokens"]
    running.session.seconds = 0.02
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, running, body)
        until(lambda: running.engine.running)
        second = pool.submit(ask, running, body)
        until(lambda: running.engine.waiting == 1)
        running.uvicorn.should_exit = True
        status, document, headers = second.result()
        assert (status, is_error(document), headers["retry-after"]) == (503, True, "5")
        status, document, _ = first.result()
    assert status == 200
    assert (document["usage"]["completion_tokens"] < whole) == (drain_s < 1)
    with pytest.raises(OSError, match=r"refused|reset"):
        ask(running, path="/health")


def test_a_failure_of_one_answer_is_not_the_next_ones(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    body = {"model": NAME, "messages": TURN, "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(running.session, "prefill", lambda *a, **k: 1 // 0)
        status, document, _ = ask(running, body)
    assert (status, document["error"]["type"]) == (500, "server_error")
    assert "ZeroDivision" not in json.dumps(document)
    assert ask(running, body)[0] == 200
    assert any("ZeroDivisionError" in line for line in running.log)


def test_open_webui_is_answered(serve: Serve) -> None:
    """Its calls: the models, a chat's stream, its stop button, a title for the chat."""
    running = serve(api_key="sk-local", origins=())
    key = {"Authorization": "Bearer sk-local", "Content-Type": "application/json"}
    status, listed, _ = ask(running, path="/v1/models", headers=key)
    assert status == 200
    model = listed["data"][0]["id"]
    user = {"X-OpenWebUI-User-Name": "Someone", "X-OpenWebUI-User-Id": "1"}
    chat = {
        "stream": True,
        "model": model,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "max_tokens": 12,
        "stop": ["###"],
        "seed": 0,
        "frequency_penalty": 0.1,
    }
    status, stream, headers = ask(running, chat, headers={**key, **user})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = [event.removeprefix("data: ") for event in stream.decode().strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 12
    assert json.loads(events[1])["choices"][0]["delta"]["content"]

    running.session.seconds = 0.02
    began = time.monotonic()
    stopped = openai.OpenAI(base_url=running.url, api_key="sk-local").chat.completions.create(
        **{**chat, "max_tokens": 300, "temperature": 1.5}
    )
    next(iter(stopped))
    stopped.close()
    assert running.is_idle()
    assert time.monotonic() - began < 4.0
    running.session.seconds = 0.0

    title = {
        "model": model,
        "messages": [{"role": "user", "content": "### Task:\nGenerate a title"}],
        "stream": False,
        "max_completion_tokens": 10,
    }
    status, document, _ = ask(running, title, path=CHAT, headers=key)
    assert (status, document["choices"][0]["message"]["role"]) == (200, "assistant")
