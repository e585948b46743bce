"""tokenizer.json is the tokenizer, whatever stands beside it; other forms become one."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model.families import hf_model
from model.sources import converted, save_folder, write_gguf
from model.vocabularies import LLAMA_3, QWEN_2, TEKKEN, TEXTS, byte_level, corpus, sentencepiece
from packaging.version import Version

from teal_cli.errors import MissingError, TealError
from teal_cli.model import convert as convert_module
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import COMPANIONS, convert
from teal_cli.model.tokenizer import complete_tokenizer, load_tokenizer
from teal_cli.progress import Silent

FILES: dict[str, Callable[[], Any]] = {
    "llama-2": sentencepiece,
    "llama-2 without a space": lambda: sentencepiece(spaced=False),
    "llama-3": lambda: byte_level(LLAMA_3, ignore_merges=True),
    "qwen-2": lambda: byte_level(QWEN_2),  # its class would compose characters
    "gpt-2": lambda: byte_level(None),
}
# tokenizer_config.json; None is no file at all.
CONFIGS: dict[str, dict[str, Any] | None] = {
    "no file": None,
    "empty": {},
    "null": {"tokenizer_class": None},
    "unknown": {"tokenizer_class": "TokenizerOfTomorrow"},
    "llama": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True},
    "llama fast": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    "qwen": {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False},
    "gemma": {"tokenizer_class": "GemmaTokenizer"},
    "gpt": {"tokenizer_class": "GPT2Tokenizer", "errors": "replace"},
    "remote code": {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    },
    "flags": {
        "add_bos_token": False,
        "add_eos_token": True,
        "model_max_length": 1e30,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "vocab_file": "/nowhere/tokenizer.model",
        "tokenizer_file": "/nowhere/tokenizer.json",
        "name_or_path": "/nowhere",
        "use_default_system_prompt": False,
    },
    "list": {"extra_special_tokens": [], "additional_special_tokens": None},
}


def folder_of(tokenizer: Any, folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("file", FILES)
def test_ids_are_those_of_tokenizer_json(file: str, config: str, tmp_path: Path) -> None:
    oracle = FILES[file]()
    tokenizer = load_tokenizer(folder_of(oracle, tmp_path, CONFIGS[config]), "the model")
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle.encode(text).ids
        plain = oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == plain
        assert tokenizer.decode(plain) == oracle.decode(plain, skip_special_tokens=False)


def test_truncation_and_padding_of_the_file_are_not_for_prompts(tmp_path: Path) -> None:
    oracle = byte_level(None)
    expected = oracle.encode(TEXTS[0]).ids
    oracle.enable_truncation(4)
    oracle.enable_padding(length=500)
    assert load_tokenizer(folder_of(oracle, tmp_path), "the model").encode(TEXTS[0]) == expected


def test_added_and_special_tokens_of_the_config(tmp_path: Path) -> None:
    oracle = byte_level(None, special=("<|endoftext|>",), plain=())
    size = oracle.get_vocab_size()
    added = {"content": "<|tool|>", "special": True, "normalized": False}
    added |= {"lstrip": False, "rstrip": False, "single_word": False}
    config = {
        "eos_token": "<|endoftext|>",
        "added_tokens_decoder": {str(size): added},
        "extra_special_tokens": ["<|tool|>"],
    }
    tokenizer = load_tokenizer(folder_of(oracle, tmp_path, config), "the model")
    assert tokenizer.encode("<|tool|>") == [size]
    assert tokenizer.eos_token_id == size - 1
    assert tokenizer.decode([size], skip_special_tokens=True) == ""


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    folder = folder_of(byte_level(None), tmp_path, {})
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_tokenizer(folder, "the model").eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "in the config"}}, "in the config"),
        ({"chat_template.json": {"chat_template": "in a file"}}, "in a file"),
        (
            {
                "tokenizer_config.json": {"chat_template": "in the config"},
                "chat_template.json": {"chat_template": "in a file"},
                "chat_template.jinja": "in its own",
            },
            "in its own",
        ),
        (
            {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"},
            {"default": "a", "tool_use": "b"},
        ),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "c"}]}},
            {"rag": "c"},
        ),
        ({}, None),
    ],
)
def test_templates_reach_the_checkpoint(
    files: dict[str, Any], expected: Any, tmp_path: Path, teal_home: Path
) -> None:
    folder = save_folder(hf_model("llama"), tmp_path / "model")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    assert converted(folder).tokenizer().chat_template == expected


def test_loading_does_not_import_every_tokenizer(tmp_path: Path) -> None:
    folder = folder_of(sentencepiece(), tmp_path, CONFIGS["llama"])
    program = (
        "import sys; from pathlib import Path; from teal_cli.model.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(folder)!r}), 'the model');"
        "print('transformers.models.auto.tokenization_auto' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer"),
    ],
)
def test_damage_is_a_sentence(file: str, content: str, said: str, tmp_path: Path) -> None:
    folder = folder_of(byte_level(None), tmp_path, {})
    (folder / file).write_text(content)
    with pytest.raises(TealError, match=f"the model has no usable {said}"):
        load_tokenizer(folder, "the model")


# Other forms than tokenizer.json.


def model_in(folder: Path, **more: Any) -> Path:
    """A tiny Llama without a tokenizer."""
    tiny.write_model(folder, **more)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained sentencepiece model's file, and its own processor."""
    library = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    lines = (line for text in corpus() for line in text.splitlines() if line.strip())
    library.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(path.with_suffix("")),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = path.parent
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    try:
        complete_tokenizer(folder, "the model")
    except TealError as error:  # before 5.24
        assert Version(transformers.__version__) < Version("5.24")
        pytest.skip(str(error))
    return library.SentencePieceProcessor(model_file=str(path)), load_tokenizer(folder, "it")


@settings(max_examples=100, deadline=None)  # "<": control tokens are not text to the library
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<")))
def test_sentencepiece_is_as_its_library_does_it(spm: Any, text: str) -> None:
    processor, ours = spm
    assert ours.encode(text, add_special_tokens=False) == processor.encode(text)


def test_sentencepiece_begins_with_bos(spm: Any) -> None:
    processor, ours = spm
    for text in TEXTS[:2]:
        assert ours.encode(text) == [processor.bos_id(), *processor.encode(text)]
    assert ours.eos_token_id == processor.eos_id()


def test_a_conversion_to_other_tokens_is_refused(
    spm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers before 5.24 leaves the merges out, and every word comes in letters."""
    from transformers.convert_slow_tokenizer import SpmConverter

    build = SpmConverter.build_tokenizer_from_spm_proto

    def without_merges(*given: Any, **named: Any) -> Any:
        state = json.loads(build(*given, **named).to_str())
        state["model"]["merges"] = []
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    monkeypatch.setattr(
        SpmConverter, "build_tokenizer_from_spm_proto", staticmethod(without_merges)
    )
    processor, _ = spm
    (tmp_path / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TealError, match=r"another tokenizer of its tokenizer\.model") as caught:
        complete_tokenizer(tmp_path, "the model")
    assert "tokenizer.json" in str(caught.value.hint)


def test_sentencepiece_that_is_not_installed_is_said_before_the_weights(
    tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    monkeypatch.setattr(convert_module, "write_shard", pytest.fail)
    folder = model_in(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(MissingError, match="sentencepiece") as caught:
        converted(folder)
    assert "pip install" in str(caught.value.hint)
    assert "tokenizer.json" in str(caught.value.hint)


def byte_files(folder: Path, oracle: Any, tokenizer_class: str | None) -> None:
    """vocab.json and merges.txt, as GPT-2 and Qwen were first published."""
    state = json.loads(oracle.to_str())
    special = {str(token["id"]): token for token in state["added_tokens"]}
    for token in special.values():
        del token["id"]
    (folder / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in state["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": tokenizer_class, "added_tokens_decoder": special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "oracle"),
    [
        ("qwen2", "Qwen2Tokenizer", {"split": QWEN_2, "composed": True}),
        ("qwen3", "Qwen2TokenizerFast", {"split": QWEN_2, "composed": True}),
        ("llama", "GPT2Tokenizer", {"split": None}),
    ],
)
def test_vocabulary_and_merges(
    model_type: str, tokenizer_class: str, oracle: Any, tmp_path: Path, teal_home: Path
) -> None:
    folder = model_in(tmp_path / "model", model_type=model_type)
    expected = byte_level(**oracle)
    byte_files(folder, expected, tokenizer_class)
    tokenizer = converted(folder).tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text).ids


def test_tekken(tmp_path: Path, teal_home: Path) -> None:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    words = [*(bytes([i]) for i in range(256)), b"th", b"he", b"the", b" the"]
    stored = {
        "config": {
            "pattern": TEKKEN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for i, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(special)
        ],
    }
    folder = model_in(tmp_path / "model", model_type="mistral")
    (folder / "tekken.json").write_text(json.dumps(stored))
    tokenizer = converted(folder).tokenizer()
    ids = [words.index(w) + len(special) for w in (b"the", b" ", b"1", b"2", b" the")]
    assert tokenizer.encode("[INST]the 12 the") == [1, 3, *ids]
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no tokenizer: none of tokenizer.json"),
        ({"vocab.json": "{}"}, "no merges.txt"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}, "vocab.json"),
        ({"tokenizer.json": "{}"}, "no usable tokenizer"),
        ({"tekken.json": "{}"}, "tekken.json cannot be converted"),
        ({"tokenizer.model": "no base64, no protobuf"}, "tokenizer.model cannot be converted"),
    ],
)
def test_no_tokenizer_is_said_before_the_weights(
    files: dict[str, str],
    said: str,
    tmp_path: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convert_module, "write_shard", pytest.fail)
    folder = model_in(tmp_path / "model")
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(TealError, match=said):
        converted(folder)
    assert not list(teal_home.rglob("config.json"))


# Checkpoints that an older version made.


def aged(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Make a checkpoint as one of an older version, whose tokenizer was another; its shards."""
    path = checkpoint.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["companions"]
    path.write_text(json.dumps(manifest))
    byte_level(None).save(str(checkpoint.folder / "tokenizer.json"))
    return shards_of(checkpoint)


def shards_of(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    shards = sorted(checkpoint.folder.glob("model-*"))
    return [(shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in shards]


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_an_old_tokenizer_is_renewed_and_the_weights_stay(
    form: str, tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    if form == "folder":
        path = save_folder(hf_model("llama"), tmp_path / "model")
    else:
        write_gguf(path, hf_model("llama"))
    checkpoint = converted(path)
    expected = checkpoint.tokenizer().encode(TEXTS[0])
    before = aged(checkpoint)
    assert Checkpoint(checkpoint.folder).tokenizer().encode(TEXTS[0]) != expected
    monkeypatch.setattr(convert_module, "write_shard", pytest.fail)
    again = converted(path)
    assert again.tokenizer().encode(TEXTS[0]) == expected
    assert shards_of(again) == before
    assert again.companions == COMPANIONS
    assert again.fingerprint == checkpoint.fingerprint  # its profile stays
    assert again.load().config == checkpoint.config
    written = (again.folder / "manifest.json").stat().st_mtime_ns
    assert (converted(path).folder / "manifest.json").stat().st_mtime_ns == written


def test_weights_are_copied_where_there_are_no_links(
    tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError("not supported")

    path = save_folder(hf_model("llama"), tmp_path / "model")
    aged(converted(path))
    monkeypatch.setattr(convert_module.os, "link", link)
    assert converted(path).load()


def test_a_checkpoint_of_the_hub_is_renewed_without_asking_it(
    tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teal_cli import pipeline
    from teal_cli.store import hub
    from teal_cli.store.hub import Source
    from teal_cli.store.models import ModelRef

    path = save_folder(hf_model("llama"), tmp_path / "model")
    ref = ModelRef("hub", "org/model")
    source = Source(ref, path, None, "hub:org/model@1", "1")
    checkpoint = Checkpoint(convert(source, reporter=Silent()))
    expected = checkpoint.tokenizer().encode(TEXTS[0])
    before = aged(checkpoint)

    def fetch(ref: ModelRef, *, offline: bool = False, **_: Any) -> Source:
        assert offline
        return found

    monkeypatch.setattr(hub, "fetch", fetch)
    found = Source(ref, path, None, "hub:org/model@2", "2")  # newer than what was converted
    used = pipeline.ensure_checkpoint(ref, reporter=Silent())
    assert used.tokenizer().encode(TEXTS[0]) != expected
    found = source
    used = pipeline.ensure_checkpoint(ref, reporter=Silent())
    assert used.tokenizer().encode(TEXTS[0]) == expected
    assert shards_of(used) == before

    def gone(*_: Any, **__: Any) -> Source:
        raise MissingError("no such model here")

    aged(used)
    monkeypatch.setattr(hub, "fetch", gone)
    assert pipeline.ensure_checkpoint(ref, reporter=Silent()).folder == used.folder
