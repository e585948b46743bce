"""A Hub on this machine: as much of its HTTP API as downloading a model needs, and its failures.

The real client talks to it in a process of its own, which `environment` points here. Weights go
the Hub's way for large files: the answer to `resolve` is a redirect to another host, with the size
and SHA-256 in headers of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A model's files at one commit."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    branches: tuple[str, ...] = ("main",)
    gated: bool = False  # files ask for a token; the listing does not
    private: bool = False  # without a token it is as if it were not there


@dataclass
class Request:
    """What the client asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Faults:
    """What goes wrong, and how often."""

    status: int | None = None  # of every answer
    download_status: int | None = None  # of every GET of a file's bytes
    busy: int = 0  # so many GETs of a file's bytes are told to come back later
    sent_bytes: int | None = None  # of a file, with a Content-Length to match, instead of all
    drop_after: int | None = None  # bytes of a weight file, then the connection breaks
    drops: int = 1  # how many times
    stall_after: int | None = None  # bytes of a weight file, then nothing more comes
    silent: bool = False  # takes connections and never answers
    corrupt: bool = False  # weights arrive with one bit changed


@dataclass
class Raw:
    """An answer of any kind in place of the Hub's."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """The server's repositories, faults and memory."""

    url: str = ""
    cdn: str = ""  # another host than the Hub's, so that the token must not go there
    repositories: dict[str, Repository] = field(default_factory=dict)
    accepted_tokens: set[str] = field(default_factory=lambda: {"hf_good"})
    known_tokens: set[str] = field(default_factory=lambda: {"hf_good", "hf_other"})
    claimed_sizes: dict[str, int | None] = field(default_factory=dict)  # instead of the true ones
    faults: Faults = field(default_factory=Faults)
    # Answers in place of the Hub's: to "listing", "tree", "small" and "large" files, and "cdn".
    answers: dict[str, Raw] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that downloads from here, into folders below `home`."""
        kept = {name: os.environ[name] for name in os.environ if not name.startswith("HF_")}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TEAL_HOME": str(home / "teal"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def downloads(self) -> list[Request]:
        """The requests for a weight file's bytes."""
        return [r for r in self.requests if r.method == "GET" and r.path.startswith("/cdn/")]


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that serves until the block ends."""
    hub = Hub()

    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.cdn = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away: tests kill them."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.hub.requests.append(
            Request(
                self.command, path, self.headers.get("Range"), self.headers.get("Authorization")
            )
        )
        faults = self.hub.faults
        if (raw := self.hub.answers.get(_kind(path))) is not None:
            self._raw(raw)
        elif faults.silent:
            self.hub.closing.wait()
        elif faults.status is not None:
            self._refuse(faults.status, "", "out of order")
        elif path.startswith("/cdn/"):
            self._bytes(path.removeprefix("/cdn/"))
        elif match := _MODEL.match(path):
            revision = urllib.parse.unquote(match[3] or "main")  # "refs/pr/1" comes as one part
            self._listing(match[1], match[2], revision)
        elif match := _RESOLVE.match(path):
            self._resolve(match[1], *map(urllib.parse.unquote, match.group(2, 3)))
        else:
            self._refuse(404, "", "not found")

    def _raw(self, raw: Raw) -> None:
        self.send_response(raw.status)
        for header, value in raw.headers.items():
            self.send_header(header, value)
        if "Content-Length" not in raw.headers:
            self.send_header("Content-Length", str(len(raw.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw.body)
        self.close_connection = True

    def _repository(self, name: str, revision: str) -> Repository | None:
        """The repository at this revision; answers with the Hub's refusal if there is none."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.known_tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token not in self.hub.accepted_tokens):
            # To a stranger the Hub does not tell what does not exist from what is private.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in (*repository.branches, repository.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository

    def _listing(self, name: str, what: str | None, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if what == "tree":
            self._json([_tree_entry(*file) for file in repository.files.items()])
        else:
            claimed = self.hub.claimed_sizes
            siblings = [
                _sibling(path, content) | ({"size": claimed[path]} if path in claimed else {})
                for path, content in repository.files.items()
            ]
            self._json({"id": name, "sha": repository.commit, "siblings": siblings})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository.gated and token not in self.hub.accepted_tokens:
            self._refuse(
                403 if token else 401, "GatedRepo", f"Access to model {name} is restricted"
            )
            return
        if path not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = repository.files[path]
        headers = {"X-Repo-Commit": repository.commit}
        if _is_large(path):
            self.send_response(302)
            headers |= {
                "Location": f"{self.hub.cdn}/cdn/{name}/{path}",
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Content-Length": "0",
            }
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
        else:
            headers["ETag"] = f'"{_git_sha1(content)}"'
            self._send(content, headers)

    def _bytes(self, path: str) -> None:
        """A weight file's bytes, from where the client wants them, with what goes wrong."""
        owner, name, file = path.split("/", 2)
        content = self.hub.repositories[f"{owner}/{name}"].files[file]
        faults = self.hub.faults
        if faults.download_status is not None:
            self._refuse(faults.download_status, "", "out of order")
            return
        if faults.busy > 0:
            faults.busy -= 1
            self._refuse(429, "", "too many requests")
            return
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
        if faults.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if faults.sent_bytes is not None:
            content = content.ljust(faults.sent_bytes, b"?")[: faults.sent_bytes]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if faults.drop_after is not None and faults.drops > 0:
            faults.drops -= 1
            self.wfile.write(content[start : start + faults.drop_after])
            self.close_connection = True
        elif faults.stall_after is not None:
            self.wfile.write(content[start : start + faults.stall_after])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.closing.wait()
        else:
            self.wfile.write(content[start:])

    def _json(self, document: object) -> None:
        self._send(json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        headers |= {"Retry-After": "0"} if status == 429 else {}
        self._send(json.dumps({"error": message}).encode(), headers, status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _kind(path: str) -> str:
    if path.startswith("/cdn/"):
        return "cdn"
    if match := _MODEL.match(path):
        return "tree" if match[2] == "tree" else "listing"
    return "large" if _is_large(path) else "small"


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".gguf"))


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _sibling(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": path, "size": len(content)}
    entry["blobId"] = _git_sha1(content)
    if _is_large(path):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return entry


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = _git_sha1(content)
    if _is_large(path):
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 134,
        }
    return entry
