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


@pytest.mark.parametrize("text", ["llama-3-8b", "Llama-3-8B", "lama-3-8b", "llama3-8b"])
def test_a_short_name_leads_to_the_hubs(text: str) -> None:
    with pytest.raises(MissingError) as caught:
        models.resolve(text)
    assert "Did you mean meta-llama/Meta-Llama-3-8B-Instruct?" in str(caught.value.hint)


def test_every_shape_has_a_name_on_the_hub() -> None:
    assert set(models.SHORT_NAMES) == set(SHAPES)
    for name in models.SHORT_NAMES.values():
        assert models.resolve(name).kind == "hub"


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
