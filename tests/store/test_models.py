"""What the user may call a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from teal_cli.errors import MissingError, UsageError
from teal_cli.model.random_weights import SHAPES
from teal_cli.progress import Silent
from teal_cli.store import hub, models, paths
from teal_cli.store.models import DEMO, ModelRef, resolve

pytestmark = pytest.mark.usefixtures("teal_home")


def test_without_a_name_it_is_the_last_one_used_and_at_first_the_demo(tmp_path: Path) -> None:
    assert resolve(None) == ModelRef("hub", DEMO) == resolve("demo")
    models.remember(resolve("org/model", "v2"))
    assert resolve(None) == ModelRef("hub", "org/model", revision="v2")
    assert resolve(None, "v3") == ModelRef("hub", "org/model", revision="v3")

    folder = tmp_path / "a model"
    folder.mkdir()
    models.remember(resolve(str(folder)))
    assert resolve(None) == ModelRef("folder", str(folder), folder)
    folder.rmdir()
    assert resolve(None) == ModelRef("hub", DEMO)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": "hub"}', b"\xff"])
def test_a_damaged_memory_is_forgotten(content: bytes) -> None:
    models.remember(resolve("org/model"))
    (paths.state_dir() / "last-model.json").write_bytes(content)
    assert resolve(None) == ModelRef("hub", DEMO)


def test_local_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve(str(gguf)) == ModelRef("gguf", str(gguf), gguf)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == ModelRef("folder", str(tmp_path), tmp_path)
    # A folder that is there goes before a name on the Hub.
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model").path == tmp_path / "org" / "model"
    assert resolve("org/other") == ModelRef("hub", "org/other")

    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"not a \.gguf"):
        resolve("weights.bin")
    with pytest.raises(UsageError, match="--revision"):
        resolve(str(gguf), "main")


@pytest.mark.parametrize(
    "text",
    [
        *["gpt2", "", "a/b/c", "../model", "/no/where", "org/", "/model", "org/mo del", "org/a--b"],
        *["org/a..b", "org/.a", "org/a.", f"org/{'a' * 5000}", "örg/model", "m.gguf", "~nobody/a"],
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(MissingError) as caught:
        resolve(text)
    assert repr(text) in caught.value.message
    assert "org/name" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *[
            (text, "meta-llama/Meta-Llama-3-8B-Instruct")
            for text in ("llama-3-8b", "Llama3", "llama3:8b")
        ],
        *[
            (text, "meta-llama/Llama-3.1-8B-Instruct")
            for text in ("llama3.1", "Meta-Llama-3.1-8B-Instruct")
        ],
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama3.2:latest", "meta-llama/Llama-3.2-3B-Instruct"),
        ("llama2-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("QWEN3_8B", "Qwen/Qwen3-8B"),
        ("smollm2", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        ("smollm2:135m", DEMO),
    ],
)
def test_a_short_name_is_taken_for_what_it_means(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(text, "v2") == ModelRef("hub", name, revision="v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).mkdir()  # what is here goes before a name
    assert resolve(text).kind == "folder"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        *[("lama-3-8b", "llama-3-8b"), ("qwen3-80b", "qwen3-8b"), ("tinylama", "tinyllama")],
        *[("dmeo", "demo"), ("llama3.1:8b-q4_0", "llama-3.1-8b"), ("./my-modle", "./my-model")],
    ],
)
def test_a_near_miss_is_asked_about(
    text: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError) as caught:
        resolve(text)
    assert f"Did you mean {meant}?" in str(caught.value.hint)
    with pytest.raises(MissingError) as caught:
        resolve("gpt2")
    assert "Did you mean" not in str(caught.value.hint)


def test_a_prompt_in_the_models_place_and_a_lost_token_are_told() -> None:
    with pytest.raises(MissingError) as caught:
        resolve("What is the capital of France?")
    assert "A prompt goes behind the model's name" in str(caught.value.hint)
    with pytest.raises(MissingError) as caught:
        resolve("hf_SECRETsecretSECRET")
    assert "SECRET" not in caught.value.message + str(caught.value.hint)


def test_short_names_are_told_apart_and_name_every_shape() -> None:
    assert set(SHAPES) < set(models.SHORT_NAMES)
    assert set(models.FAMILIES.values()) <= set(models.SHORT_NAMES)
    for name in models.SHORT_NAMES:
        assert models.short_name(name) == name
        assert resolve(name) == resolve(models.SHORT_NAMES[name])
    for family, name in models.FAMILIES.items():
        assert models.short_name(family) == name


def test_every_model_has_a_folder_name_of_its_own(tmp_path: Path) -> None:
    for folder in ("a/model", "b/model"):
        (tmp_path / folder).mkdir(parents=True)
    refs = [
        resolve("org/model"),
        resolve("org/model", "v2"),
        resolve(str(tmp_path / "a" / "model")),
        resolve(str(tmp_path / "b" / "model")),
    ]
    slugs = [ref.slug for ref in refs]
    assert slugs[0] == "org--model"
    assert len(set(slugs)) == len(slugs)
    assert not any("/" in slug for slug in slugs)


def test_a_local_models_fingerprint_follows_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part-one.safetensors").write_bytes(b"one")
    (tmp_path / "README.md").write_text("unread")
    ref = resolve(str(tmp_path))
    before = hub.fetch(ref, reporter=Silent())
    assert before.folder == tmp_path
    assert before.nbytes == 5
    (tmp_path / "README.md").write_text("changed")
    assert hub.fetch(ref, reporter=Silent()).fingerprint == before.fingerprint
    (tmp_path / "part-one.safetensors").write_bytes(b"other")
    assert hub.fetch(ref, reporter=Silent()).fingerprint != before.fingerprint


def test_a_gguf_files_fingerprint_follows_it(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    ref = resolve(str(gguf))
    before = hub.fetch(ref, reporter=Silent())
    assert (before.gguf, before.nbytes) == (gguf, 4)
    gguf.write_bytes(b"GGUF 2")
    assert hub.fetch(ref, reporter=Silent()).fingerprint != before.fingerprint
