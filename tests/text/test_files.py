"""Reading a user's own files, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.text.files import read_file


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_table_gives_its_text_column(tmp_path: Path, name: str) -> None:
    path = write_rows(
        tmp_path / name, [{"id": 1, "text": "one", "body": "eins"}, {"text": "two", "body": None}]
    )
    assert list(read_file(path)) == ["one", "two"]
    assert list(read_file(path, "body")) == ["eins", ""]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_missing_column_names_those_there(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"title": "a", "story": "b"}])
    with pytest.raises(UsageError, match="no column 'text'; it has: title, story"):
        list(read_file(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_column_of_numbers_is_refused(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"text": 7}])
    with pytest.raises(UsageError, match="holds int, not text"):
        list(read_file(path))


def test_plain_text_is_one_row_without_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    assert list(read_file(path)) == ["one\n\ntwo"]
    with pytest.raises(UsageError, match="no columns"):
        read_file(path, "text")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe", b"ok\0ay"])
@pytest.mark.parametrize("name", ["image.txt", "image.parquet"])
def test_binary_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TealError, match=r"not UTF-8 text|not a readable Parquet file"):
        list(read_file(path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_damaged_json_lines(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(TealError, match=problem):
        list(read_file(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file"):
        read_file(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="is a folder"):
        read_file(tmp_path)
