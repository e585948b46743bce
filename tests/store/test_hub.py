"""`teal download` with Hugging Face's real client, against a Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hub_server
import pytest
from hub_server import Faults, Hub, Repository

COMMIT = Repository({}).commit
NEXT_COMMIT = "f" * 40
CHUNK_BYTES = 10 * 1024 * 1024  # the client writes to the disk in pieces of this size
WEIGHTS = bytes(range(256)) * (3 * CHUNK_BYTES // 256)
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
}
UNNEEDED = {
    "README.md": b"# A model",
    "pytorch_model.bin": b"a pickle",
    "model.fp16.safetensors": b"another precision",
    "original/consolidated.00.pth": b"another format",
    "onnx/model.onnx": b"another framework",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.running() as hub:
        hub.repositories["org/model"] = Repository(
            {**SMALL, **UNNEEDED, "model.safetensors": b"weights"}
        )
        yield hub


def start(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "teal_cli", "download", *arguments],
        env={**hub.environment(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    hub: Hub, home: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    process = start(hub, home, *arguments, **environment)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def downloaded(hub: Hub, home: Path, *arguments: str, **environment: str) -> Path:
    """The folder that a run that must succeed printed."""
    done = run(hub, home, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_needed_comes_and_a_second_run_asks_one_question(
    hub: Hub, tmp_path: Path
) -> None:
    done = run(hub, tmp_path, "org/model", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    folder = Path(report["path"])
    assert names(folder) == {*SMALL, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert folder.is_relative_to(tmp_path / "hf")
    assert report["revision"] == COMMIT
    assert report["fingerprint"] == f"hub:org/model@{COMMIT}"
    assert report["bytes"] == sum(map(len, SMALL.values())) + len(b"weights")
    # The bytes are in the cache once: the snapshot links to them, teal has no copy.
    assert (folder / "model.safetensors").is_symlink()
    assert not [file for file in (tmp_path / "teal").rglob("*") if file.suffix == ".safetensors"]

    hub.requests.clear()
    assert downloaded(hub, tmp_path, "org/model") == folder
    assert [request.path for request in hub.requests] == ["/api/models/org/model"]

    hub.requests.clear()
    assert downloaded(hub, tmp_path, "org/model", "--offline") == folder
    assert downloaded(hub, tmp_path, HF_HUB_OFFLINE="1") == folder  # the last model used
    assert hub.requests == []


def test_shards_come_with_their_index_and_the_bytes_are_counted(hub: Hub, tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 600_000 for i in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub.repositories["org/model"].files = {**SMALL, **shards, **index}
    done = run(hub, tmp_path, "org/model")
    assert names(Path(done.stdout.strip())) == {*SMALL, *shards, *index}
    assert f"downloading org/model, 1.2 MB → {tmp_path / 'hf' / 'hub'}" in done.stderr
    assert "Downloading: 1.2 MB in" in done.stderr


def test_a_new_commit_brings_only_what_changed(hub: Hub, tmp_path: Path) -> None:
    old = downloaded(hub, tmp_path, "org/model")
    repository = hub.repositories["org/model"]
    repository.commit = NEXT_COMMIT
    repository.files["config.json"] = b'{"model_type": "mistral"}'
    hub.requests.clear()
    new = downloaded(hub, tmp_path, "org/model")
    assert (old.name, new.name) == (COMMIT, NEXT_COMMIT)
    assert (new / "config.json").read_bytes() == repository.files["config.json"]
    assert (new / "model.safetensors").read_bytes() == b"weights"
    assert hub.downloads() == []
    assert downloaded(hub, tmp_path, "org/model", "--offline") == new


def test_revision(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/model"].branches = ("main", "v2", "refs/pr/1")
    for revision in ("v2", "refs/pr/1", COMMIT):
        folder = downloaded(hub, tmp_path, "org/model", "--revision", revision)
        assert folder.name == COMMIT
        assert downloaded(hub, tmp_path, "org/model", "--revision", revision, "--offline") == folder
    done = run(hub, tmp_path, "org/model", "--revision", "v3")
    assert done.returncode == 3
    assert "org/model has no revision 'v3'" in done.stderr


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/model"].gated = True
    downloaded(hub, tmp_path / "a", "org/model", "--token", "hf_good")
    sent = {(r.path.startswith("/cdn/"), r.authorization) for r in hub.requests}
    assert sent == {(False, "Bearer hf_good"), (True, None)}
    downloaded(hub, tmp_path / "b", "org/model", HF_TOKEN="hf_good")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message", "hint"),
    [
        pytest.param(
            ["org/gated"],
            4,
            "access to org/gated is restricted",
            "Accept its terms",
            id="401-gated",
        ),
        pytest.param(
            ["org/gated", "--token", "hf_other"],
            4,
            "access to org/gated is restricted",
            "https://huggingface.co/org/gated",
            id="403-gated",
        ),
        pytest.param(
            ["org/model", "--token", "hf_wrong"],
            4,
            "the Hub refused the access token",
            "`hf auth login`",
            id="401-token",
        ),
        pytest.param(
            ["org/modle"], 3, "there is no model 'org/modle'", "Check the spelling", id="401-name"
        ),
        pytest.param(
            ["org/modle", "--token", "hf_good"],
            3,
            "there is no model 'org/modle'",
            "Check the spelling",
            id="404-name",
        ),
        pytest.param(
            ["Qwen/Qwen2.5-7B-Instuct"],
            3,
            "there is no model",
            "Did you mean Qwen/Qwen2.5-7B-Instruct?",
            id="near-miss",
        ),
        pytest.param(["org/private"], 3, "or it is private", "--token", id="private"),
        pytest.param(
            ["org/pickles"], 3, "no model in the safetensors format", "Choose", id="pickles"
        ),
        pytest.param(
            ["org/gguf"],
            3,
            "no model in the safetensors format",
            "hf download org/gguf --include 'm-Q4_K_M-*.gguf'",
            id="gguf",
        ),
        pytest.param(["org/lora"], 5, "holds an adapter (LoRA)", "merge_and_unload", id="adapter"),
    ],
)
def test_refusals(
    hub: Hub, tmp_path: Path, arguments: list[str], exit_code: int, message: str, hint: str
) -> None:
    files = {**SMALL, "model.safetensors": b"weights"}
    hub.repositories["org/gated"] = Repository(files, gated=True)
    hub.repositories["org/private"] = Repository(files, private=True)
    hub.repositories["org/pickles"] = Repository({**SMALL, "pytorch_model.bin": b"a pickle"})
    ggufs = ["m-BF16.gguf", "m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"]
    hub.repositories["org/gguf"] = Repository(dict.fromkeys(ggufs, b"GGUF"))
    hub.repositories["org/lora"] = Repository(
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    )
    done = run(hub, tmp_path, *arguments)
    error, next_step = done.stderr.strip().splitlines()[-2:]
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert error.startswith("error: ")
    assert message in error
    assert hint in next_step


def test_a_line_that_breaks_is_taken_up_again_by_range(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/model"].files["model.safetensors"] = WEIGHTS
    hub.faults.drop_after = CHUNK_BYTES + 1000
    folder = downloaded(hub, tmp_path, "org/model")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in hub.downloads()] == [None, f"bytes={CHUNK_BYTES}-"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_an_interrupted_download_continues_where_it_stopped(
    hub: Hub, tmp_path: Path, how: signal.Signals
) -> None:
    hub.repositories["org/model"].files["model.safetensors"] = WEIGHTS
    hub.faults.stall_after = 2 * CHUNK_BYTES + 1000
    first = start(hub, tmp_path, "org/model")
    assert hub.stalled.wait(30)
    partial = wait_for_partial(tmp_path, CHUNK_BYTES)
    first.send_signal(how)
    _, stderr = first.communicate(timeout=30)
    assert first.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert "Traceback" not in stderr
    # What is there does not look whole: offline, the model is missing.
    assert run(hub, tmp_path, "org/model", "--offline").returncode == 3

    found_bytes = partial.stat().st_size
    assert CHUNK_BYTES <= found_bytes < len(WEIGHTS)
    hub.faults.stall_after = None
    hub.requests.clear()
    done = run(hub, tmp_path, "org/model")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in hub.downloads()] == [f"bytes={found_bytes}-"]
    assert f"(the other {found_bytes / 1e6:.1f} MB are here)" in done.stderr
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def wait_for_partial(home: Path, size_bytes: int) -> Path:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for partial in home.rglob("*.incomplete"):
            if partial.stat().st_size >= size_bytes:
                return partial
        time.sleep(0.02)
    raise AssertionError("no partial file appeared")


def test_damaged_bytes_are_noticed_and_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    for fault, message in (
        (Faults(corrupt=True), "model.safetensors of org/model came in damaged"),
        (Faults(sent_bytes=3), "a file of org/model came in damaged"),
        (Faults(sent_bytes=10), "a file of org/model came in damaged"),
    ):
        hub.faults = fault
        done = run(hub, tmp_path, "org/model")
        assert done.returncode == 1
        assert message in done.stderr
        assert "Run the same command again" in done.stderr
    hub.faults = Faults()
    folder = downloaded(hub, tmp_path, "org/model")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_a_damaged_part_of_a_file_is_noticed(hub: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "hf" / "hub" / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hashlib.sha256(b'weights').hexdigest()}.teal.incomplete"
    partial.write_bytes(b"we?")
    done = run(hub, tmp_path, "org/model")
    assert done.returncode == 1
    assert "model.safetensors of org/model came in damaged" in done.stderr
    assert not partial.exists()


def test_a_hub_that_asks_to_wait_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.faults.busy = 1
    done = run(hub, tmp_path, "org/model")
    assert done.returncode == 0, done.stderr
    assert "the Hub asks to wait 0 s; the download goes on then" in done.stderr
    assert len(hub.downloads()) == 2


def test_two_processes_fetch_a_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/model"].files["model.safetensors"] = WEIGHTS
    processes = [start(hub, tmp_path, "org/model") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert len(hub.downloads()) == 1


def test_a_server_that_fails_in_the_middle(hub: Hub, tmp_path: Path) -> None:
    hub.faults.download_status = 503
    done = run(hub, tmp_path, "org/model")
    assert done.returncode == 1
    assert "the Hub failed (503) while org/model came in" in done.stderr
    assert "continues where it stopped" in done.stderr


def test_without_the_hub_the_copy_that_is_here_serves(hub: Hub, tmp_path: Path) -> None:
    missing = run(hub, tmp_path, "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert missing.returncode == 3
    assert "org/model is not on this machine, and the Hub cannot be reached" in missing.stderr
    assert "`teal download org/model` where there is a network" in missing.stderr
    offline = run(hub, tmp_path, "org/model", "--offline")
    assert offline.returncode == 3
    assert "no server may be asked" in offline.stderr

    folder = downloaded(hub, tmp_path, "org/model")
    unreachable = run(hub, tmp_path, "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert Path(unreachable.stdout.strip()) == folder
    assert "using the copy of org/model that is here" in unreachable.stderr
    for status, reason in ((502, "is out of order (502)"), (429, "asks to wait 0 s (429)")):
        hub.faults.status = status
        broken = run(hub, tmp_path, "org/model")
        assert Path(broken.stdout.strip()) == folder
        assert f"the Hub {reason}; using the copy" in broken.stderr


def test_a_hub_that_never_answers_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.faults.silent = True
    done = run(hub, tmp_path, "org/model")
    assert done.returncode == 3
    assert "cannot be reached (timed out)" in done.stderr


def test_a_disk_too_small_is_told_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_sizes = {"model.safetensors": 10**15}
    done = run(hub, tmp_path, "org/model")
    assert done.returncode == 1
    assert "the disk is too full" in done.stderr
    assert "1,000,000.00 GB" in done.stderr
    assert "HF_HOME" in done.stderr
    assert hub.downloads() == []


@contextmanager
def mounted(home: Path, options: str) -> Iterator[None]:
    """A file system of its own for Hugging Face's folder below `home`."""
    folder = home / "hf"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/model"].files["model.safetensors"] = WEIGHTS
    hub.claimed_sizes = {"model.safetensors": None}  # so that the check beforehand passes
    with mounted(tmp_path, "size=24m"):
        done = run(hub, tmp_path, "org/model")
    assert done.returncode == 1
    assert "the disk filled up while org/model came in" in done.stderr


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    with mounted(tmp_path, "ro"):
        done = run(hub, tmp_path, "org/model")
    assert done.returncode == 1
    assert "cache cannot be written" in done.stderr
    assert "HF_HOME" in done.stderr
