"""The access token: stripped, checked, and never shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teal_cli.errors import AccessError
from teal_cli.store.access import access_token

SECRET = "hf_SECRETsecret"
SURROUNDED = [
    SECRET,
    f"{SECRET}\r",
    f"{SECRET}\n",
    f"{SECRET}\r\n\n",
    f"  {SECRET}\t ",
    f"\ufeff{SECRET}\u200b",
    f"{SECRET}\x1b",
    f"\x00{SECRET}\x7f\x85",
    f"\xa0{SECRET}\u2028",
]
MALFORMED = [
    f"{SECRET}\r{SECRET}",
    f"{SECRET} {SECRET}",
    f"Bearer {SECRET}",
    f"{SECRET}é",
    f"ü{SECRET}",
    f"{SECRET}\ud800",
    f"{SECRET}\x01x",
    f"{SECRET}\nX-Evil: 1",
    f"{SECRET}🤗",
    f"{SECRET}\u202e{SECRET}",
    SECRET * 1000,
]


@pytest.mark.parametrize("token", SURROUNDED, ids=ascii)
def test_what_surrounds_a_token_is_left_out(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert access_token(token) == SECRET
    if "\0" not in token:
        monkeypatch.setenv("HF_TOKEN", token)
        assert access_token(None) == SECRET


@pytest.mark.parametrize("token", [*MALFORMED, "", " \r\n"], ids=lambda t: ascii(t)[:40])
def test_what_is_no_token_is_a_sentence_without_it(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AccessError) as caught:
        access_token(token)
    assert "SECRET" not in f"{caught.value} {caught.value.hint} {caught.value.__context__}"


def test_the_stored_ones_come_by_the_clients_rules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert access_token(None) is False
    (tmp_path / "token").write_text(f"{SECRET}\x07\n")
    assert access_token(None) == SECRET
    assert access_token("hf_given") == "hf_given"
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert access_token(None) == "hf_env"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert access_token(None) is False


@pytest.mark.parametrize("how", ["bytes", "folder"])
def test_a_token_file_that_cannot_be_read(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    path = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(SECRET.encode() + b"\xff")
    with pytest.raises(AccessError) as caught:
        access_token(None)
    assert "SECRET" not in f"{caught.value} {caught.value.__context__}"


COMMANDS = """
import os, sys
import huggingface_hub.hf_api, pydantic.type_adapter
from huggingface_hub import constants, get_token, snapshot_download
from teal_cli import app
from teal_cli.commands import download
from teal_cli.store import hub
for arguments in (
    ["download", "org/model"], ["download", "org/model", "-v"],
):
    child = os.fork()
    if not child:
        token = os.environ.pop("GIVEN", None)
        sys.argv = ["teal", *arguments, *([] if token is None else ["--token", token])]
        app.main()
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("where", "debug"),
    [("GIVEN", "0"), ("GIVEN", "1"), ("HF_TOKEN", "1"), ("HF_TOKEN_PATH", "0")],
)
def test_no_command_shows_a_token(where: str, debug: str, tmp_path: Path) -> None:
    tokens = (MALFORMED[3], SURROUNDED[1]) if debug == "0" else (MALFORMED[6], SURROUNDED[6])
    for token in tokens:
        value = token
        if where == "HF_TOKEN_PATH":
            value = str(tmp_path / "token")
            Path(value).write_text(token)
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "TEAL_HOME": str(tmp_path / "teal"),
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens
                "TEAL_DEBUG": debug,
                where: value,
            },
            timeout=120,
        )
        assert done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") == 2, done.stderr
        assert "SECRET" not in done.stdout + done.stderr
        assert "internal error" not in done.stderr
        if token in MALFORMED:
            assert "error: the stored access token" in done.stderr or where == "GIVEN"
            assert "holds characters that no token has" in done.stderr
        else:
            assert "cannot be reached" in done.stderr
