"""Random templates, tokenizers, texts and kernel caches of the kinds that ask for too much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import tiny
from faults.damage import outcome, spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
from teal_kernels.cpu.code_cache import CodeCache

from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.detokenizer import Detokenizer
from teal_cli.model.tokenizer import complete_tokenizer, load_tokenizer

# Of what takes half a second each.
FEW = settings(max_examples=-(-settings.default.max_examples // 4))
SAYS = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def original(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tokenizer.json").read_text()))


def odd_texts() -> st.SearchStrategy[str]:
    """Any text, with half surrogate pairs and long runs of one character."""
    runs = st.tuples(st.sampled_from(" a\n\t-ß🙂\0"), st.integers(1, 3000)).map(
        lambda x: x[0] * x[1]
    )
    halves = st.text(st.characters(min_codepoint=0xD7FF, max_codepoint=0xE000), max_size=4)
    return st.lists(st.text(max_size=8) | runs | halves, max_size=4).map("".join)


def expressions() -> st.SearchStrategy[str]:
    """Parts of a template that make much of little, or little."""
    size = st.sampled_from([0, 1, 7, 300, 10**5, 10**8, 10**9, 10**12, 10**30])
    forms = st.sampled_from(
        [
            "{{ 'ab' * %d }}",
            "{{ ['a'] * %d }}",
            "{{ '%%%dd' % 3 }}",
            "{{ '%%.%df' % 0.1 }}",
            "{{ '{:%d}'.format(1) }}",
            "{{ 'a'.ljust(%d) }}",
            "{{ '7'.zfill(%d) }}",
            "{{ '\\t'.expandtabs(%d) }}",
            "{{ 'a' | center(%d) }}",
            "{{ 'a\nb' | indent(%d) }}",
            "{{ [1] | batch(%d, 'x') | list }}",
            "{{ messages | tojson(indent=%d) }}",
            "{{ range(%d) | list }}",
            "{{ 'a' | replace('a', 'bc' * %d) }}",
            "{{ 10 ** %d }}",
            "{{ (1).__class__ }}{{ %d }}",
            "{{ lipsum(n=%d) }}",
        ]
    )
    doubled = st.integers(0, 60).map(
        lambda n: (
            f"{{% set s = namespace(x='ab') %}}{{% for i in range({n}) %}}"
            "{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}"
        )
    )
    return st.tuples(forms, size).map(lambda x: x[0].replace("%d", str(x[1]))) | doubled


@FEW
@given(parts=st.lists(expressions() | odd_texts(), max_size=3), said=odd_texts())
def test_templates(parts: list[str], said: str, folder: Path) -> None:
    tokenizer = load_tokenizer(folder, "tiny")
    tokenizer.chat_template = "".join([*parts, SAYS])
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    messages = [{"role": "user", "content": said}]
    text = outcome(lambda: template.render(messages))
    assert text is None or len(text.encode()) >= len(said)


def steps() -> st.SearchStrategy[dict[str, Any]]:
    """Changes of a tokenizer.json: steps that grow, regexes that try everything."""
    replace = st.tuples(st.sampled_from("aß \n"), st.integers(0, 4), st.integers(0, 14)).map(
        lambda x: [{"type": "Replace", "pattern": {"String": x[0]}, "content": x[0] * x[1]}] * x[2]
    )
    regexes = st.sampled_from(
        [r"(a|aa)+$", r"(\s+)+$", r"(?=(a+))*b", r"\p{L}+", "", "(", r"(a?){50}"]
    )
    split = regexes.map(
        lambda regex: {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return st.one_of(
        replace.map(lambda r: {"normalizer": {"type": "Sequence", "normalizers": r}}),
        replace.map(lambda r: {"decoder": {"type": "Sequence", "decoders": r}}),
        st.lists(split, max_size=3).map(
            lambda s: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*s, byte_level]}}
        ),
    )


def use(folder: Path, said: str) -> None:
    complete_tokenizer(folder, "tiny")
    tokenizer = load_tokenizer(folder, "tiny")
    tokens = tokenizer.encode(said)
    tokenizer.decode(tokens)
    detokenizer = Detokenizer(tokenizer)
    assert isinstance("".join(map(detokenizer.add, tokens)) + detokenizer.finish(), str)


@FEW
@given(changes=st.lists(steps(), max_size=2), said=odd_texts())
def test_tokenizers(
    changes: list[dict[str, Any]], said: str, folder: Path, original: dict[str, Any]
) -> None:
    content = {**original}
    for change in changes:
        content |= change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    try:
        outcome(lambda: use(folder, said))
    finally:
        (folder / "tokenizer.json").write_text(json.dumps(original))
    use(folder, said)  # what its makers stored takes any text


def triple(x: int) -> int:
    return 3 * x


def kernel_runs() -> int:
    """How often the code was found on disk, in a process that begins."""
    function: Any = numba.njit(triple)
    function._cache = CodeCache(triple)
    assert function(14) == 42
    assert function._cache.problem is None
    return sum(function._cache_hits.values())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, bytes]]:
    """The files of a kernel cache as they should be."""
    place = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba.config.CACHE_DIR", str(place))
        kernel_runs()
        yield {path: path.read_bytes() for path in sorted(place.rglob("*.nb?"))}


@given(data=st.data())
def test_kernel_caches(data: st.DataObject, stored: dict[Path, bytes]) -> None:
    for path, content in stored.items():
        path.write_bytes(content)
    path = data.draw(st.sampled_from(list(stored)))
    damaged = data.draw(spoilt(stored[path]))
    path.write_bytes(damaged)
    assert kernel_runs() == (damaged == stored[path])
    assert kernel_runs() == 1
