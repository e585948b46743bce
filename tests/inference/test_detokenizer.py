"""Streaming text: the pieces make what decoding the whole makes, less what a terminal obeys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teal_cli.inference.detokenizer import Detokenizer, Printable, printable

# The same examples in every run, and as long as a busy machine takes.
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=300)

TEXTS = [
    "plain words, 12 of them",
    "Grüße, naïve café",
    "Привет, мир",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "হ্যালো বিশ্ব",
    "வணக்கம் உலகம்",
    "హలో ప్రపంచం",
    "ಹಲೋ ವಿಶ್ವ",
    "ഹലോ ലോകം",
    "ආයුබෝවන් ලෝකය",
    "สวัสดีชาวโลก",
    "ສະບາຍດີຊາວໂລກ",
    "မင်္ဂလာပါကမ္ဘာ",
    "សួស្តី​ពិភពលោក",
    "გამარჯობა მსოფლიო",
    "Բարեւ աշխարհ",
    "ሰላም ልዑል",
    "你好，世界",
    "こんにちは世界",
    "안녕하세요 세계",
    "བཀྲ་ཤིས་བདེ་ལེགས",
    "𓀀𓂀 𐍈𐌰",
    "👍🏽 and 👩‍👩‍👧‍👦, 🏳️‍🌈, 🇩🇪🇯🇵, 1️⃣ done",
    "a literal \ufffd and \ufeff",
    " lead  two\n\tb \n",
]


def byte_fallback(decoder: Any) -> Any:
    """SentencePiece's vocabulary: pieces, and a token for each byte of all other text."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["▁", *map(chr, range(33, 127)), "▁a", "▁▁", "界", "\ufffd", "é"]
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces])}
    tokenizer = Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(
        [AddedToken(p, special=True, normalized=False) for p in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a byte: every character beyond ASCII is split."""
    import tiny
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["byte-level", "llama", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, byte_level: Any) -> Any:
    from tokenizers import decoders

    if request.param == "byte-level":
        return byte_level
    first = {
        "llama": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
        "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
    }[request.param]
    last = [decoders.Strip(" ", 1, 0)] if request.param == "llama" else []
    return byte_fallback(decoders.Sequence([*first, *last]))


def streamed(tokenizer: Any, tokens: list[int], **options: Any) -> list[str]:
    """The text that comes out after each token, and at the end."""
    stream = Detokenizer(tokenizer, **options)
    return [*(stream.add(token) for token in tokens), stream.finish()]


def shown(tokenizer: Any, text: str) -> str:
    cleaned = Printable()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return "".join([*map(cleaned.add, streamed(tokenizer, tokens)), cleaned.finish()])


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_make_the_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)
    assert tokenizer.decode(tokens).strip() == text.strip()


# Numbers beyond the vocabulary are tokens of models whose matrices are padded.
@repeatable
@given(tokens=st.lists(st.integers(0, 380), max_size=24))
def test_any_tokens_stream_as_they_decode(tokenizer: Any, tokens: list[int]) -> None:
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(streamed(tokenizer, tokens)) == whole


@repeatable
@given(st.data())
def test_bytes_that_are_nearly_text_stream_as_they_decode(
    tokenizer: Any, data: st.DataObject
) -> None:
    """Whole characters and parts of them, with special and other tokens between."""
    characters = st.sampled_from("é世😀\u200d🇩a \ufffd")
    part = st.builds(lambda c, n: c.encode()[:n], characters, st.integers(1, 4))
    tokens: list[int] = []
    for raw in data.draw(st.lists(part | st.binary(max_size=2), max_size=12)):
        tokens += [byte_token(tokenizer, byte) for byte in raw]
        tokens += data.draw(st.sampled_from([[], [], [2], [300]]))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(streamed(tokenizer, tokens)) == whole


def byte_token(tokenizer: Any, byte: int) -> int:
    """The token of a byte: `<0xE4>`, or GPT-2's printable stand-in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = (
        chr(byte)
        if byte in plain
        else chr(256 + [b for b in range(256) if b not in plain].index(byte))
    )
    number = tokenizer.backend_tokenizer.token_to_id(f"<0x{byte:02X}>")
    return int(tokenizer.convert_tokens_to_ids(stand_in) if number is None else number)


def test_a_character_appears_with_its_last_byte(byte_level: Any) -> None:
    tokens = byte_level.encode("a👍", add_special_tokens=False)
    assert streamed(byte_level, tokens) == ["a", "", "", "", "👍", ""]


def test_a_run_of_byte_tokens_appears_with_what_follows() -> None:
    """Its decoder takes a run as text or as nothing: a later byte can undo a whole character."""
    from tokenizers import decoders

    tokenizer = byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    run = [byte_token(tokenizer, byte) for byte in "😀".encode()]
    word, broken = tokenizer.convert_tokens_to_ids(["x", "<0xFF>"])
    assert streamed(tokenizer, [*run, word]) == ["", "", "", "", "😀x", ""]
    assert streamed(tokenizer, [*run, broken, word]) == ["", "", "", "", "", "\ufffd" * 5 + "x", ""]


def test_a_character_cut_short_is_marked(byte_level: Any) -> None:
    tokens = [byte_token(byte_level, byte) for byte in "ab👍".encode()[:-1]]
    assert "".join(streamed(byte_level, tokens)) == byte_level.decode(tokens) == "ab\ufffd"


def test_text_that_continues_keeps_its_space(tokenizer: Any) -> None:
    tokens = tokenizer.encode("a Paris", add_special_tokens=False)
    after = tokens[len(tokenizer.encode("a", add_special_tokens=False)) :]
    assert "".join(streamed(tokenizer, after, continues=True)) == " Paris"


def test_special_tokens_are_not_shown(byte_level: Any) -> None:
    tokens = byte_level.encode("a<|im_end|>b", add_special_tokens=False)
    assert streamed(byte_level, tokens) == ["a", "", "b", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("a\x1b]0;open\nb", "a\nb"),
        ("a\x1b[3\x07b", "ab"),
        ("a\x1bcb", "ab"),
        ("a\x07\x08\rb\x7f\x9bc", "abc"),
        ("a\u202eb\u2066c\u200fd", "abcd"),
        ("👩‍👧 ❤️", "👩‍👧 ❤️"),
        ("line\n\ttab", "line\n\ttab"),
        ("end\x1b", "end"),
        ("end\x1b[31", "end[31"),
        ("x\x1b]" + "y" * 300, "x]" + "y" * 300),
    ],
    ids=[
        "colour",
        "title",
        "link",
        "open-title",
        "broken",
        "reset",
        "controls",
        "direction",
        "joiners",
        "kept",
        "lone",
        "open",
        "endless",
    ],
)
def test_what_a_terminal_would_obey_is_stripped(byte_level: Any, text: str, expected: str) -> None:
    assert shown(byte_level, text) == expected


@repeatable
@example("\x1b]\x1b0\n")
@given(st.text("ab\x1b[]0;m\x07\r\n世", max_size=40))
def test_stripping_in_pieces_strips_the_whole(text: str) -> None:
    cleaned = Printable()
    assert "".join([*map(cleaned.add, text), cleaned.finish()]) == printable(text)
