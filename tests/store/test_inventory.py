"""What is stored, and its removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teal_cli.errors import MissingError
from teal_cli.progress import Silent
from teal_cli.store import artifacts, inventory, models, paths
from teal_cli.store.models import DEMO, ModelRef

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True)
def hub_cache(teal_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def convert(ref: ModelRef, dtype: str = "float16", nbytes: int = 1000) -> Path:
    """What a conversion leaves behind, but for the weights."""
    folder = paths.model_dir(ref.slug) / dtype
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(nbytes))
    artifacts.write_manifest(folder / "manifest.json", "checkpoint", {"model": ref.name})
    return folder


def calibrate(ref: ModelRef, dtype: str = "float16") -> None:
    import torch
    from safetensors.torch import save_file

    path = paths.profile_path(ref.slug, dtype)
    path.parent.mkdir(parents=True)
    header = json.dumps({"methods": ["sensitivity", "greedy"]})
    save_file({"counts": torch.zeros(1)}, path, metadata={"teal": header})


def download(hub: Path, name: str, config: dict[str, object] | None = None) -> Path:
    folder = hub / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / "one").write_bytes(bytes(5000))
    (snapshot / "model.safetensors").symlink_to("../../blobs/one")
    (snapshot / "config.json").write_text(json.dumps(config or CONFIG))
    return folder


HUB = ModelRef("hub", "org/Some-Model")


def test_nothing_is_stored_at_first() -> None:
    assert inventory.stored_models() == []
    assert inventory.names() == []


def test_every_stage_is_listed(hub_cache: Path, tmp_path: Path) -> None:
    convert(HUB)
    convert(HUB, "float32")
    calibrate(HUB)
    folder = download(hub_cache, HUB.name)
    download(hub_cache, "org/only-downloaded")
    download(hub_cache, "org/another-kind", {"model_type": "bert"})
    local = ModelRef("folder", str(tmp_path / "mine"), tmp_path / "mine")
    convert(local)
    convert(ModelRef("hub", HUB.name, revision="old"))
    models.remember(HUB)

    found = {model.name: model for model in inventory.stored_models()}
    old = next(name for name in found if name.startswith(f"{HUB.name}@"))
    assert set(found) == {HUB.name, old, str(tmp_path / "mine"), "org/only-downloaded"}
    one = found[HUB.name]
    assert [c.folder.name for c in one.checkpoints] == ["float16", "float32"]
    assert [c.methods for c in one.checkpoints] == [("sensitivity", "greedy", "uniform"), ()]
    assert 1000 < one.checkpoints[0].nbytes < 1300
    assert one.download == folder
    assert inventory.folder_bytes(folder) == 5000 + len(json.dumps(CONFIG))  # links not twice
    assert one.last_used is not None
    assert found[old].last_used is None
    assert found["org/only-downloaded"].owned == []
    assert sorted(inventory.names()) == sorted({*found} - {"org/only-downloaded"})


def test_damage_hides_no_model() -> None:
    (convert(HUB) / "manifest.json").write_text("{")
    paths.profile_path(HUB.slug, "float16").parent.mkdir(parents=True)
    paths.profile_path(HUB.slug, "float16").write_bytes(b"\xff" * 20)
    model = inventory.find(HUB.slug)
    assert (model.name, model.checkpoints[0].methods) == (HUB.slug, ())


def test_a_model_is_found_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    convert(ModelRef("folder", str(tmp_path / "mine"), tmp_path / "mine"))
    convert(ModelRef("hub", DEMO))
    monkeypatch.chdir(tmp_path)
    assert inventory.find("./mine").name == str(tmp_path / "mine")
    assert inventory.find("demo").name == DEMO
    with pytest.raises(MissingError, match="no model 'org/Some-Model' is stored"):
        inventory.find(HUB.name)


def test_removal_takes_what_is_ours_alone(hub_cache: Path) -> None:
    other = ModelRef("hub", "org/Some-Model-2")
    for ref in (HUB, other):
        convert(ref)
        calibrate(ref)
        models.remember(ref)
    models.remember(HUB)
    half_done = paths.cache_dir() / "calibration" / HUB.slug / "float16"
    half_done.mkdir(parents=True)
    (half_done / "state").write_bytes(bytes(70))
    folder = download(hub_cache, HUB.name)
    nbytes = inventory.remove(inventory.find(HUB.name), Silent())
    assert nbytes > 1070
    left = inventory.find(HUB.name)
    assert (left.owned, left.download, left.last_used) == ([], folder, None)
    assert inventory.folder_bytes(folder) > 5000
    assert models.last_used() is None
    assert [c.methods for c in inventory.find(other.name).checkpoints] == [
        ("sensitivity", "greedy", "uniform")
    ]
    assert not list((paths.data_dir() / "models").glob(f"*{HUB.slug}"))
