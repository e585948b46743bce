"""Whatever the system refuses is a sentence and a next step, in every command."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark.commands import runner

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.faults import explain
from teal_cli.printable import printable
from teal_cli.store import paths

EXPECTED = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "read-only",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "is a file, not a folder",
    errno.EISDIR: "is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "lead in a circle",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.ENOLCK: "no locks",
    errno.ESTALE: "network file system",
    errno.EIO: "does not read or write",
    errno.EILSEQ: "allows no such name",
    errno.ETIMEDOUT: "does not answer",
    errno.ENOMEM: "not enough memory",
}


@pytest.mark.parametrize("code", sorted(errno.errorcode), ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("name", ["some/file", None, b"some/bytes", 7], ids=ascii)
def test_every_number_has_a_sentence(code: int, name: Any) -> None:
    error = OSError(code, os.strerror(code)) if name is None else OSError(code, "?", name)
    found = explain(error)
    assert "internal error" not in found.message
    assert "Errno" not in found.message
    assert EXPECTED.get(code, "") in found.message
    assert found.hint
    if isinstance(name, (str, bytes)) and code != errno.ENOMEM:
        assert found.message.endswith(os.fsdecode(name))


@pytest.mark.parametrize(
    "error",
    [
        OSError("Can't load tokenizer for 'x'.\nIf you were trying to load it from the Hub, …"),
        OSError(),
        FileNotFoundError("No such file or directory: model.safetensors"),
        OSError(99_999, "Unknown error"),
        socket.gaierror(-2, "Name or service not known"),
        socket.gaierror(8, "nodename nor servname provided"),
        ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
        ssl.SSLCertVerificationError(1, "certificate verify failed"),
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.ENOENT, "No such file", os.fsdecode(b"caf\xe9")),
        OSError("x" * 100_000),
    ],
    ids=lambda error: repr(error)[:40],
)
def test_those_without_a_number_or_with_anothers(error: OSError) -> None:
    found = explain(error)
    assert "internal error" not in found.message
    assert "permission" not in found.message
    assert found.message
    assert found.hint
    assert len(found.message) < 600


def test_a_name_that_is_no_text_and_links_in_a_circle() -> None:
    for error, said in (
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), "not UTF-8"),
        (RuntimeError("Symlink loop from '/a/b'"), "the links lead in a circle: /a/b"),
    ):
        assert said in explain(error).message
    # A bug of ours stays one.
    for bug in (
        UnicodeEncodeError("latin-1", "日", 0, 1, "ordinal not in range"),
        RuntimeError("loop"),
        ValueError("some\ntext"),
    ):
        assert "internal error" in explain(bug).message


@pytest.mark.parametrize(
    "code", [errno.ENOLCK, errno.ESTALE, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.ELOOP]
)
@pytest.mark.parametrize("call", ["mkdir", "rename", "replace", "open", "listdir", "scandir"])
def test_a_command_says_so(
    call: str,
    code: int,
    tiny_model: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real: Callable[..., Any] = getattr(os, call)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith(str(teal_home)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **options)

    command = runner("convert", monkeypatch, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        status, out, err = command(tiny_model)
    assert "internal error" not in err
    assert (status == 0) == (out != "")
    assert status == 0 or "error: " in err
    assert command(tiny_model)[0] == 0  # what was refused stands in nobody's way


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_path_that_is_no_text(
    tiny_model: Path,
    tmp_path: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd, plain = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "plain café"
    for name in (odd, plain):
        name.symlink_to(tiny_model)
    (tmp_path / os.fsdecode(b"h\xff")).mkdir()
    inside = tmp_path / os.fsdecode(b"h\xff") / "model"
    inside.mkdir()
    command = runner("convert", monkeypatch, capsys)
    status, _, err = command(inside)
    assert status == 2
    assert "not UTF-8 text" in err
    assert command(odd)[0] == 0  # it leads to a plain name
    assert command(plain)[0] == 0
    monkeypatch.setenv("TEAL_HOME", str(odd))
    with pytest.raises(UsageError, match="TEAL_HOME is a name that is not UTF-8 text"):
        paths.data_dir()


def test_messages_of_names_that_are_hostile(capsys: pytest.CaptureFixture[str]) -> None:
    console.report(OSError(errno.ENOENT, "?", "a\x1b]0;x\x07\u202eb\nerror: c"))
    err = capsys.readouterr().err
    assert err == printable(err)
    assert err.count("\nerror:") == 0
