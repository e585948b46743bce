"""Plain HTTP: what is malformed, who may come in, and clients that go."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from typing import Any

import pytest
from serve.conftest import NAME, Running, Serve

pytest.importorskip("starlette", reason="needs the extra `serve`")

from teal_cli.serve.api import Limits

CHAT = "/v1/chat/completions"
TURN = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, Any] = {"model": NAME, "messages": TURN, "max_tokens": 3}


@pytest.fixture(scope="module")
def running(serve: Serve) -> Running:
    return serve()


def ask(
    running: Running,
    body: bytes | Any = None,
    *,
    method: str | None = None,
    path: str = CHAT,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON (or text) and headers of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        response = connection.getresponse()
        text = response.read()
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        return response.status, text, {k.lower(): v for k, v in response.getheaders()}


def is_error(document: Any) -> bool:
    """Whether it is OpenAI's error object."""
    error = document.get("error") if isinstance(document, dict) else None
    return (
        isinstance(error, dict)
        and set(error) == {"message", "type", "param", "code"}
        and isinstance(error["message"], str)
        and bool(error["message"])
        and isinstance(error["type"], str)
    )


def test_health_and_metrics(running: Running) -> None:
    assert ask(running, path="/health")[:2] == (200, {"status": "ok", "model": NAME})
    before = ask(running, path="/metrics")[1].decode()
    assert ask(running, GOOD)[0] == 200
    status, page, headers = ask(running, path="/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")

    def value(page: str, name: str) -> float:
        return sum(float(row.split()[-1]) for row in page.splitlines() if row.startswith(name))

    new = value(page.decode(), "teal_new_tokens_total") - value(before, "teal_new_tokens_total")
    assert new == 3
    assert value(page.decode(), f'teal_requests_total{{route="{CHAT}",status="200"}}') >= 1


def mutations() -> list[tuple[str, bytes]]:
    """Hundreds of bodies that are wrong, each in one way, for either route."""
    random.seed(1)
    odd: list[Any] = [True, -1, 1.5, 10**400, "x", "", [], {}, [None], [[]], {"a": 1}, "\ud800"]
    found: list[tuple[str, Any]] = []
    for path, good in ((CHAT, GOOD), ("/v1/completions", {"model": NAME, "prompt": "Hi"})):
        whole = json.dumps(good).encode()
        cuts = random.sample(range(len(whole)), 30)
        found += [(path, whole[:cut]) for cut in cuts]
        found += [(path, whole[:cut] + b"\xff" + whole[cut:]) for cut in cuts]
        found += [(path, text) for text in (b"", b"[]", b"1", b"null", b"[" * 100_000, b'"x"')]
        found += [(path, whole[:-1] + b', "temperature": NaN}')]
        for name, fits in (
            ("temperature", lambda v: type(v) is float),
            ("top_p", lambda v: False),
            ("top_k", lambda v: v == -1 and type(v) is int),
            ("min_p", lambda v: False),
            ("presence_penalty", lambda v: v in (-1, 1.5) and v is not True),
            ("frequency_penalty", lambda v: v in (-1, 1.5) and v is not True),
            ("repetition_penalty", lambda v: type(v) is float),
            ("seed", lambda v: v == -1 and type(v) is int),
            ("max_tokens", lambda v: False),
            ("stop", lambda v: v in ("x", [], "\ud800")),
            ("stream", lambda v: v is True),
            ("stream_options", lambda v: False),
            ("response_format", lambda v: False),
            ("sparsity", lambda v: False),
            ("model", lambda v: False),
            ("n", lambda v: False),
            ("logprobs", lambda v, path=path: v is True and path == CHAT),
            ("user", lambda v: isinstance(v, str)),
            ("tools", lambda v: v == []),
            ("functions", lambda v: v == []),
            ("logit_bias", lambda v: v == {}),
            ("unheard_of", lambda v: False),
        ):
            values = [value for value in odd if not fits(value)]
            found += [(path, json.dumps({**good, name: value}).encode()) for value in values]
        for name in good:
            if name != "max_tokens":
                rest = {key: value for key, value in good.items() if key != name}
                found.append((path, json.dumps(rest).encode()))
    for messages in (
        *odd,
        [{}],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}, *TURN],
    ):
        found.append((CHAT, json.dumps({**GOOD, "messages": messages}).encode()))
    for prompt in (*(v for v in odd if not isinstance(v, str)), [1, "x"], ["a", "b"], [-1], [999]):
        found.append(("/v1/completions", json.dumps({"model": NAME, "prompt": prompt}).encode()))
    return found


def test_malformed_requests_get_an_error_object_each(running: Running) -> None:
    bodies = mutations()
    assert len(bodies) >= 500
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    with contextlib.closing(connection):
        for path, body in bodies:
            connection.request("POST", path, body)
            response = connection.getresponse()
            document = json.loads(response.read())
            assert (response.status in (400, 404), is_error(document)) == (True, True), (
                path, body[:200], document,
            )  # fmt: skip
    assert ask(running, GOOD)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/", 404),
        ("PUT", "/%00%ff", 404),
    ],
)
def test_other_paths_and_methods_are_errors_too(
    running: Running, method: str, path: str, status: int
) -> None:
    found = ask(running, method=method, path=path)
    assert (found[0], is_error(found[1])) == (status, True)


@pytest.mark.parametrize(
    "request_",
    [
        b"HELLO\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: odd\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000,
    ],
)
def test_what_is_no_http_is_an_error_object(running: Running, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as sock:
        sock.sendall(request_)
        head, _, body = b"".join(iter(lambda: sock.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.split()[1][:1] in (b"4", b"5")
    assert is_error(json.loads(body))


def test_a_large_body_is_refused_before_it_is_read(serve: Serve) -> None:
    running = serve(limits=Limits(60.0, body_bytes=1000, body_s=0.3))
    assert ask(running, GOOD)[0] == 200
    status, document, _ = ask(running, b"x" * 1001)
    assert (status, is_error(document)) == (413, True)

    def sent(head: bytes, parts: list[bytes]) -> bytes:
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + head)
            for part in parts:
                sock.sendall(part)
            return sock.recv(65536)

    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    assert b" 413 " in sent(b"Transfer-Encoding: chunked\r\n\r\n", [chunk] * 3)
    assert b" 413 " in sent(b"Content-Length: 100000000000\r\n\r\n", [])
    assert b" 408 " in sent(b"Content-Length: 500\r\n\r\n", [b"{"])  # and then nothing more


def test_a_key_is_asked_for(serve: Serve) -> None:
    running = serve(api_key="sésame")
    good = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
    assert ask(running, path="/health")[0] == 200
    for headers in (
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sesame"},
        {"Authorization": good["Authorization"] + "x"},
        {"Authorization": good["Authorization"].replace("Bearer", "Basic")},
    ):
        for path in ("/v1/models", "/metrics", CHAT, "/nothing"):
            status, document, sent = ask(running, path=path, headers=headers)
            assert (status, is_error(document)) == (401, True)
            assert sent["www-authenticate"] == "Bearer"
    assert ask(running, path="/v1/models", headers=good)[0] == 200
    assert not any("same" in line for line in running.log)


def test_web_pages_may_not_ask_unless_they_are_named(running: Running, serve: Serve) -> None:
    page = {"Origin": "https://evil.example"}
    assert ask(running, GOOD, headers=page)[0] == 403
    assert ask(running, path="/v1/models", headers={"Host": "evil.example:8642"})[0] == 403
    for host in ("localhost:8642", "127.0.0.1", "[::1]:80", "127.9.9.9"):
        assert ask(running, path="/v1/models", headers={"Host": host})[0] == 200
    assert "access-control-allow-origin" not in ask(running, GOOD)[2]

    named = serve(origins=("http://localhost:3000",))
    own = {"Origin": "http://localhost:3000"}
    status, _, headers = ask(named, GOOD, headers=own)
    assert (status, headers["access-control-allow-origin"]) == (200, own["Origin"])
    wish = {**own, "Access-Control-Request-Method": "POST"}
    assert ask(named, method="OPTIONS", path=CHAT, headers=wish)[0] == 200
    assert ask(named, GOOD, headers=page)[0] == 403


def test_the_log_has_a_line_each_and_no_words(running: Running) -> None:
    before = len(running.log)
    secret = {**GOOD, "messages": [{"role": "user", "content": "my secret words"}]}
    assert ask(running, secret)[0] == 200
    ask(running, path="/my/secret/path?secret=1")
    ask(running, path="/v1/models/secret")
    until(lambda: len(running.log) - before >= 3)  # a line follows its answer
    lines = running.log[before:]
    assert len(lines) == 3
    assert f"POST {CHAT} 200 prompt " in lines[0]
    assert "GET (other) 404" in lines[1]
    assert not any("secret" in line for line in lines)


def raw(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def test_clients_that_hang_up_leave_nothing_behind(running: Running) -> None:
    """At any byte of the request, and at any of the answer."""
    request = raw({**GOOD, "stream": True})
    for cut in range(0, len(request), 3):
        with socket.create_connection(("127.0.0.1", running.port)) as sock:
            sock.sendall(request[:cut])
            if cut % 2:
                abort(sock)
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as sock:
        sock.sendall(request)
        whole = read_until(sock, b"[DONE]")
    for cut in range(1, len(whole), len(whole) // 25):
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as sock:
            sock.sendall(request)
            got = 0
            while got < cut:
                got += len(sock.recv(cut - got))
            if cut % 2:
                abort(sock)
    assert running.is_idle()
    assert ask(running, GOOD)[0] == 200


def abort(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def read_until(sock: socket.socket, end: bytes) -> bytes:
    got = b""
    while end not in got:
        part = sock.recv(65536)
        assert part, got
        got += part
    return got


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_goes(serve: Serve, stream: bool) -> None:
    running = serve(max_length=400)
    running.session.seconds = 0.02
    long = raw({**GOOD, "stream": stream, "max_tokens": 300, "temperature": 1.0})
    first = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    first.sendall(long)
    waiting = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    until(lambda: running.engine.running)
    waiting.sendall(long)
    until(lambda: running.engine.waiting == 1)
    waiting.close()
    until(lambda: running.engine.waiting == 0)
    assert running.engine.running
    began = time.monotonic()
    first.close()
    assert running.is_idle()
    assert time.monotonic() - began < 3.0  # 300 tokens take 6 s


def until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
