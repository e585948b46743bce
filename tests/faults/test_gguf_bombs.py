"""GGUF headers that claim more than they hold, or ask for endless work; and large ones that don't.

The headers are written here byte by byte, as ggml's docs/gguf.md has them.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest
from faults.damage import outcome
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.errors import TealError
from teal_cli.model.gguf_header import read_header
from teal_cli.model.gguf_tokenizer import write_tokenizer
from teal_cli.model.tokenizer import complete_tokenizer, load_tokenizer
from teal_cli.progress import Silent

U8, U32, FLOAT, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
_PACKED = {U8: "<B", U32: "<I", FLOAT: "<f", BOOL: "<?", U64: "<Q"}


def text(value: bytes | str, length: int | None = None) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def packed(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack(_PACKED[kind], value)


def entry(name: str, kind: int, value: Any) -> bytes:
    return text(name) + struct.pack("<I", kind) + packed(kind, value)


def array(name: str, kind: int, values: list[Any], count: int | None = None) -> bytes:
    count = len(values) if count is None else count
    head = text(name) + struct.pack("<IIQ", ARRAY, kind, count)
    return head + b"".join(packed(kind, value) for value in values)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    counts = counts or (len(tensors), len(entries))
    content = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join([*entries, *tensors])
    return content + b"\0" * (-len(content) % 32) + data


GOOD = {
    "entries": header([entry("a.b", U32, 7), entry("ok", BOOL, True), entry("n", STRING, "é")]),
    "arrays": header(
        [array("t", STRING, ["a", "", "c"]), array("f", FLOAT, [0.5]), array("e", U8, [])]
    ),
    "tensor": header([], [tensor("w", [32, 2])], data=bytes(256)),
    "quantized": header([], [tensor("w", [32, 2], kind=8)], data=bytes(68)),
    "alignment": header([entry("general.alignment", U32, 32)], [tensor("w", [2])], data=bytes(8)),
}
BAD = {
    "more entries than bytes": header(counts=(0, 2**60)),
    "more tensors than bytes": header(counts=(2**60, 0)),
    "a string beyond the end": header([text("a") + struct.pack("<I", STRING) + text("b", 2**40)]),
    "a name beyond the end": header([text("a", 2**63)]),
    "an array beyond the end": header([array("a", U32, [1], 2**40)]),
    "an array that overflows": header([array("a", U64, [1], 2**62)]),
    "strings beyond the end": header([array("a", STRING, ["x"], 2**59)]),
    "an array of arrays": header([text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]),
    "arrays without end": header(
        [text("a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 10**5]
    ),
    "an unknown kind": header([text("a") + struct.pack("<I", 77) + bytes(8)]),
    "no UTF-8": header([entry("a", STRING, b"\xff")]),
    "half a surrogate pair": header([entry("a", STRING, b"\xed\xa0\x80")]),
    "a name twice": header([entry("a", U32, 1)] * 2),
    "a tensor twice": header([], [tensor("w", [2])] * 2, data=bytes(8)),
    "a tensor beyond the end": header([], [tensor("w", [2**20])], data=bytes(8)),
    "a tensor that overflows": header([], [tensor("w", [2**33, 2**33])], data=bytes(8)),
    "a place beyond the end": header([], [tensor("w", [2], offset=2**63)], data=bytes(8)),
    "no dimensions": header([], [tensor("w", [])], data=bytes(8)),
    "a thousand dimensions": header([], [tensor("w", [1] * 1000)], data=bytes(8)),
    "an empty tensor": header([], [tensor("w", [0])], data=bytes(8)),
    "half a block": header([], [tensor("w", [16], kind=8)], data=bytes(34)),
    "an alignment of 3": header([entry("general.alignment", U32, 3)]),
    "an alignment of 0": header([entry("general.alignment", U32, 0)]),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD.keys())
def test_a_sound_header_is_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    metadata, tensors = read_header(path)
    assert metadata or tensors


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_header_that_claims_more_than_there_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(TealError, match="is not a GGUF file, or is truncated: "):
        read_header(path)


def test_values_are_those_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD["entries"])
    assert read_header(path)[0] == {"a.b": 7, "ok": True, "n": "é"}
    path.write_bytes(GOOD["arrays"])
    assert read_header(path)[0] == {"t": ["a", "", "c"], "f": [0.5], "e": []}
    path.write_bytes(GOOD["quantized"])
    stored = read_header(path)[1]["w"]
    assert (stored.kind.name, stored.shape, stored.nbytes) == ("Q8_0", (32, 2), 68)
    assert stored.read(1, 2).tolist() == [[0.0] * 32]


def test_large_arrays_take_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokens = [f"token {i}" for i in range(262_144)]
    path.write_bytes(header([array("t", STRING, tokens), array("n", FLOAT, [1.0] * 1_000_000)]))
    began_s = time.process_time()
    metadata, _ = read_header(path)
    assert time.process_time() - began_s < 10  # 0.3 s where nothing else runs
    assert (metadata["t"], len(metadata["n"])) == (tokens, 1_000_000)


@pytest.mark.parametrize("kind", [U8, U32, STRING, ARRAY], ids=["u8", "u32", "string", "array"])
@given(data=st.data())
def test_any_header_ends_in_a_sentence_or_is_read(
    data: st.DataObject, kind: int, tmp_path: Path
) -> None:
    numbers = st.sampled_from([0, 1, 2, 31, 2**16, 2**31, 2**40, 2**62, 2**63, 2**64 - 1])
    pieces = st.one_of(
        st.binary(max_size=24),
        numbers.map(lambda n: struct.pack("<Q", n)),
        st.integers(0, 15).map(lambda n: struct.pack("<I", n)),
        st.sampled_from([*GOOD.values(), *BAD.values()]).map(lambda content: content[24:400]),
    )
    body = text(data.draw(st.text(max_size=4))) + struct.pack("<I", kind)
    body += b"".join(data.draw(st.lists(pieces, max_size=6)))
    counts = struct.pack("<QQ", data.draw(numbers | st.just(0)), data.draw(numbers | st.just(1)))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + counts + body)
    outcome(lambda: read_header(path))


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def vocabulary(tokens: list[str], kind: int) -> dict[str, Any]:
    base = ["<unk>", "<s>", "</s>", *BYTES, *"ab"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*base, *tokens],
        "tokenizer.ggml.scores": [0.0] * (len(base) + len(tokens)),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, *[kind] * len(tokens)],
    }


@pytest.mark.parametrize(
    "tokens",
    [["a" * 200_000], ["a" * (4096 - i) for i in range(1000)]],
    ids=["one", "many"],
)
def test_long_tokens_are_refused(tokens: list[str], tmp_path: Path) -> None:
    with pytest.raises(TealError, match=r"damaged: tokens of up to (200,000|4,096) characters"):
        write_tokenizer(tmp_path, vocabulary(tokens, 1), 64, Silent())


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        (["a" * 2**i for i in range(1, 9)], 1),
        ([f"<|{i}|>" for i in range(12_000)], 3),
        ([f"<|{i}|>" for i in range(12_000)], 4),
    ],
    ids=["long", "control", "user-defined"],
)
def test_large_vocabularies_are_taken(tokens: list[str], kind: int, tmp_path: Path) -> None:
    began_s = time.process_time()
    write_tokenizer(tmp_path, vocabulary(tokens, kind), 64, Silent())
    complete_tokenizer(tmp_path, "large")
    assert time.process_time() - began_s < 30  # 1.5 s where nothing else runs
    tokenizer = load_tokenizer(tmp_path, "large")
    assert tokenizer.encode(tokens[-1], add_special_tokens=False)[-1] == len(tokenizer) - 1
