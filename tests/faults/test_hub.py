"""A Hub, or what stands in its place, that answers with nonsense: a sentence, or the copy here."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import Hub, Raw, Repository

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
}
COMMIT, NEXT_COMMIT = Repository({}).commit, "f" * 40
PAGE = b"<!DOCTYPE html><html><body>Welcome to the airport's network</body></html>"
BOMB = gzip.compress(bytes(200_000_000))
# Forks a process for each run, so that what takes long is imported once.
RUNS = """
import json, os, sys
import huggingface_hub, huggingface_hub.hf_api, pydantic.type_adapter
from huggingface_hub import constants, get_token, snapshot_download
from teal_cli import app
from teal_cli.commands import download
from teal_cli.store import hub

for line in sys.stdin:
    home, arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.environ["TEAL_HOME"] = home + "/teal"
        constants.HF_HUB_CACHE = home + "/hub"
        constants.DOWNLOAD_CHUNK_SIZE = 100_000
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{home}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["teal", *arguments]
        app.main()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def runner(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    environment = server.environment(tmp_path_factory.mktemp("home"))
    with subprocess.Popen(
        [sys.executable, "-c", RUNS],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.repositories = {"org/model": Repository({**FILES})}
    server.answers, server.requests = {}, []
    return server


@pytest.fixture
def run(runner: Any, hub: Hub, tmp_path: Path) -> Run:
    def call(*arguments: str) -> Done:
        runner.stdin.write(json.dumps([str(tmp_path), arguments or ["download", "org/model"]]))
        runner.stdin.write("\n")
        runner.stdin.flush()
        code = int(runner.stdout.readline())
        done = Done(code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text())
        assert "internal error" not in done.err, done.err
        assert "Traceback" not in done.err, done.err
        return done

    return call


def listed(**changes: Any) -> dict[str, Any]:
    files = [hub_server._sibling(*file) for file in FILES.items()]
    return {"id": "org/model", "sha": COMMIT, "siblings": files, **changes}


def with_file(name: Any, **changes: Any) -> Raw:
    """A listing with one more file."""
    entry = {"rfilename": name, "size": 2, "blobId": "0" * 40, **changes}
    return answer(listed(siblings=[*listed()["siblings"], entry]))


def with_config(**changes: Any) -> Raw:
    first, *others = listed()["siblings"]
    return answer(listed(siblings=[{**first, **changes}, *others]))


def with_weights(**changes: Any) -> Raw:
    *others, last = listed()["siblings"]
    return answer(listed(siblings=[*others, {**last, **changes}]))


def answer(document: Any, **changes: Any) -> Raw:
    return replace(Raw(json.dumps(document).encode()), **changes)


def moved(to: str, status: int = 302) -> Raw:
    return Raw(b"", status, {"Location": to})


LISTINGS = {
    "a page": Raw(PAGE, headers={"Content-Type": "text/html"}),
    "a page that is called JSON": Raw(PAGE, headers={"Content-Type": "application/json"}),
    "nothing": Raw(),
    "204": Raw(status=204),
    "304": Raw(status=304),
    "404 with a page": Raw(PAGE, 404),
    "403 with a page": Raw(PAGE, 403),
    "407": Raw(PAGE, 407),
    "418": Raw(PAGE, 418),
    "429": Raw(PAGE, 429, {"Retry-After": "soon"}),
    "500": Raw(PAGE, 500),
    "511, as a login page has it": Raw(PAGE, 511),
    "999": Raw(PAGE, 999),
    "null": answer(None),
    "a list": answer([]),
    "a number": answer(7),
    "NaN": Raw(b"NaN"),
    "half": Raw(json.dumps(listed()).encode()[:-40]),
    "too deep": Raw(b"[" * 200_000),
    "no UTF-8": Raw(b'{"sha": "\xff\xfe"}'),
    "a length too long": answer(listed(), headers={"Content-Length": "100000"}),
    "a length that is none": answer(listed(), headers={"Content-Length": "many"}),
    "an unknown encoding of the bytes": Raw(b"\0\1", headers={"Content-Encoding": "gzip"}),
    "a bomb": Raw(BOMB, headers={"Content-Encoding": "gzip"}),
    "no commit": answer({"id": "org/model", "siblings": listed()["siblings"]}),
    "a null commit": answer(listed(sha=None)),
    "a number for a commit": answer(listed(sha=12)),
    "a commit that leads away": answer(listed(sha="../../../evil")),
    "null files": answer(listed(siblings=None)),
    "a word for files": answer(listed(siblings="config.json")),
    "null among the files": answer(listed(siblings=[None])),
    "a file without a name": answer(listed(siblings=[{"size": 3}])),
    "a number for a name": with_file(3),
    "a name that leads away": with_file("tokenizer/../../../../evil.json"),
    "a name with backslashes": with_file("tokenizer\\..\\evil.json"),
    "a name with a drive": with_file("tokenizer:evil.json"),
    "a name with an empty part": with_file("tokenizer//evil.json"),
    "a name with a control character": with_file("tokenizer\x1b[2J.json"),
    "half a surrogate pair in a name": with_file("tokenizer\ud800.json"),
    "a name as long as a book": with_file("tokenizer" + "x" * 5000),
    "a name twice": with_file("config.json"),
    "a size below zero": with_config(size=-1),
    "a size that is a word": with_config(size="many"),
    "a size that is a fraction": with_config(size=1.5),
    "a size beyond all": with_weights(size=10**400),
    "a boolean size": with_config(size=True),
    "a blob of another kind": with_config(blobId="../../evil"),
    "weights without a digest": with_weights(lfs={}),
    "weights with a null digest": with_weights(lfs={"sha256": None}),
    "weights with another kind of digest": with_weights(lfs={"sha256": "../evil"}),
    "weights with a word for all that": with_weights(lfs="yes"),
    "a redirect to itself": moved("/api/models/org/model"),
    "a redirect to nowhere": moved("http://"),
    "a redirect to another scheme": moved("gopher://x/"),
    "a redirect to no address": moved("http://[::1/"),
    "a redirect without a place": Raw(b"", 302),
}
# With these a copy is tried too; what it is refused for makes no difference.
COPIED = [LISTINGS[name] for name in ("a page", "304", "403 with a page", "a bomb", "a name twice")]
FILE_ANSWERS = {
    "a page for a small file": {"small": Raw(PAGE)},
    "a page for the weights": {"large": Raw(PAGE)},
    "a page for the weights' bytes": {"cdn": Raw(PAGE)},
    "weights by another name": {"large": moved("/login")},
    "a redirect to itself": {"small": moved("/org/model/resolve/main/config.json")},
    "weights that lead to themselves": {"cdn": moved("/cdn/org/model/model.safetensors")},
    "204 for weights": {"cdn": Raw(status=204)},
    "304 for weights": {"cdn": Raw(status=304)},
    "404 for weights": {"cdn": Raw(PAGE, 404)},
    "418 for weights": {"cdn": Raw(PAGE, 418)},
    "a wait of a day": {"cdn": Raw(b"", 429, {"Retry-After": "86400"})},
    "501 for small files": {"small": Raw(PAGE, 501)},
    "404 for small files": {"small": Raw(PAGE, 404)},
    "other bytes for weights": {"cdn": Raw(b"WEIGHTS")},
    "too many bytes for weights": {"cdn": Raw(b"weights" * 2)},
    "no bytes for weights": {"cdn": Raw()},
    "weights that are a bomb": {"cdn": Raw(BOMB, headers={"Content-Encoding": "gzip"})},
    "weights that unpack to nothing": {"cdn": Raw(b"?", headers={"Content-Encoding": "gzip"})},
    "a small file that is a bomb": {
        "small": Raw(
            BOMB,
            headers={
                "Content-Encoding": "gzip",
                "ETag": '"a"',
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": "2",
            },
        )
    },
    "another small file of the right size": {
        "small": Raw(b"{?", headers={"ETag": '"a"', "X-Repo-Commit": COMMIT})
    },
    "a tag that leads away": {
        "small": Raw(b"{}", headers={"ETag": '"../../../evil"', "X-Repo-Commit": COMMIT})
    },
    "a page for the tree": {"tree": Raw(PAGE)},
    "null for the tree": {"tree": answer(None)},
    "an object for the tree": {"tree": answer({"error": "no"})},
    "a tree of nulls": {"tree": answer([None])},
    "a tree of nameless files": {"tree": answer([{"type": "file"}])},
    "a tree that lacks files": {"tree": answer([])},
    "a tree that leads away": {
        "tree": answer(
            [{"type": "file", "path": "tokenizer/../../../evil", "size": 2, "oid": "0" * 40}]
        )
    },
    "a tree without end": {
        "tree": answer(
            [], headers={"Link": '</api/models/org/model/tree/main?cursor=a>; rel="next"'}
        )
    },
}
# After these a newer commit is tried too: of each route one that ends otherwise.
FOLLOWED = [
    FILE_ANSWERS[name]
    for name in (
        "a page for a small file",
        "weights by another name",
        "304 for weights",
        "other bytes for weights",
        "a small file that is a bomb",
        "null for the tree",
        "a tree that lacks files",
    )
]


def refused(done: Done) -> None:
    assert done.code in (1, 3, 4)
    assert done.out == ""
    error, *hint = done.err[done.err.index("error: ") :].splitlines()
    assert len(error.split()) > 5
    assert hint, error


def test_the_valid_answer_beside_them_all_is_taken(run: Run, hub: Hub) -> None:
    hub.answers = {"listing": answer(listed(tags=None, downloads="?", usedStorage=-1))}
    done = run()
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    hub.repositories["org/model"] = Repository(
        {**FILES, "tokenizer ü.model": b"x", "..hidden/../odd\\name": b"", "README.md": b""},
        commit=NEXT_COMMIT,
    )
    hub.answers = {}
    assert run().code == 0  # names that nobody asks for are not looked at


@pytest.mark.parametrize("raw", LISTINGS.values(), ids=LISTINGS.keys())
def test_a_listing_that_is_none(raw: Raw, run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.answers = {"listing": raw}
    refused(run())
    assert not list(tmp_path.rglob("*evil*"))
    if raw not in COPIED:
        return
    # Where a copy is, it serves, and the note says why.
    hub.answers = {}
    here = run()
    assert here.code == 0, here.err
    hub.answers = {"listing": raw}
    again = run()
    assert (again.code, again.out) == (0, here.out), again.err
    assert "using the copy of org/model that is here" in again.err


@pytest.mark.parametrize("answers", FILE_ANSWERS.values(), ids=FILE_ANSWERS.keys())
def test_files_that_are_none(answers: dict[str, Raw], run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.answers = answers
    refused(run())
    assert not list(tmp_path.rglob("*evil*"))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 5_000_000
    hub.answers = {}
    here = run()  # what was refused stands in nobody's way
    assert here.code == 0, here.err
    folder = Path(here.out.strip())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    if answers not in FOLLOWED:
        return
    # A newer commit that does not come leaves the older one to use.
    changed = {**FILES, "config.json": b'{"model_type": "mistral"}', "model.safetensors": b"newer"}
    hub.repositories["org/model"] = Repository(changed, commit=NEXT_COMMIT)
    hub.answers = answers
    again = run()
    assert (again.code, again.out) == (0, here.out), again.err
    assert "using the copy of org/model that is here" in again.err
