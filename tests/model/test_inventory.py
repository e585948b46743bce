"""What is stored, and its removal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teal_cli.commands import models as models_command
from teal_cli.errors import MissingError, TealError
from teal_cli.model import inventory
from teal_cli.progress import Silent
from teal_cli.store import artifacts, models, paths
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


def calibrate(ref: ModelRef, dtype: str = "float16", **more: object) -> None:
    import torch
    from safetensors.torch import save_file

    path = paths.profile_path(ref.slug, dtype)
    path.parent.mkdir(parents=True)
    header = json.dumps({"methods": ["sensitivity", "greedy"], **more})
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


def test_quick_thresholds_and_vectors_are_told() -> None:
    quick, recovered, plain = (ModelRef("hub", f"org/{name}") for name in "abc")
    for ref in (quick, recovered, plain):
        convert(ref)
    calibrate(quick, methods=[], provenance={"quick": True})
    calibrate(recovered, recovery={"sensitivity": {"targets": [0, 0.5]}})
    calibrate(plain)
    stages = {
        model.name: models_command._stage(model.checkpoints[0].profile)
        for model in inventory.stored_models()
    }
    assert stages == {
        "org/a": "quick thresholds: uniform",
        "org/b": "calibrated: sensitivity, greedy, uniform; vectors for sensitivity",
        "org/c": "calibrated: sensitivity, greedy, uniform",
    }


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
    methods = [checkpoint.profile.methods for checkpoint in one.checkpoints]
    assert methods == [("sensitivity", "greedy", "uniform"), ()]
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
    assert (model.name, model.checkpoints[0].profile.methods) == (HUB.slug, ())


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
    assert [c.profile.methods for c in inventory.find(other.name).checkpoints] == [
        ("sensitivity", "greedy", "uniform")
    ]
    assert not list((paths.data_dir() / "models").glob(f"*{HUB.slug}"))


def everything(ref: ModelRef) -> None:
    """All that teal may store of a model, finished and not."""
    folder = convert(ref)
    calibrate(ref)
    models.remember(ref)
    (folder.parent / ".float32.partial-abc").mkdir()
    (folder.parent / ".float32.partial-abc" / "shard").write_bytes(bytes(50))
    half_done = paths.cache_dir() / "calibration" / ref.slug / "float16"
    half_done.mkdir(parents=True)
    (half_done / "state").write_bytes(bytes(70))


class Killed(BaseException):
    pass


def test_a_removal_that_is_broken_off_anywhere_is_finished_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = 0

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            real(*arguments, **options)

        return call

    places = 0
    while True:
        everything(HUB)
        places, left = places + 1, places + 1
        model = inventory.find(HUB.name)
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                inventory.remove(model, Silent())
            except Killed:
                pass
            else:
                break
        for stored in inventory.stored_models():
            assert inventory.find(HUB.name).slug == stored.slug == HUB.slug
            inventory.remove(stored, Silent())
        assert inventory.stored_models() == []
        assert not [p for p in paths.data_dir().rglob("*") if p.is_file()]
    assert places > 12
    assert inventory.stored_models() == []


def test_what_is_being_made_is_not_removed() -> None:
    everything(HUB)
    model = inventory.find(HUB.name)
    for made in (model.checkpoints[0].folder, paths.profile_path(HUB.slug, "float16")):
        code = (
            "import sys, time; from pathlib import Path; from teal_cli.store import artifacts; "
            "from teal_cli.progress import Silent\n"
            "with artifacts.lock(Path(sys.argv[1]), Silent()): print('ready', flush=True); "
            "time.sleep(60)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(made)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        number = process.pid if sys.platform == "linux" else r"\d+"
        with pytest.raises(TealError, match=f"is in use: (process {number}|another process)"):
            inventory.remove(model, Silent())
        assert len(model.owned) == 3
        assert (model.checkpoints[0].folder / "model.safetensors").exists()
        process.kill()
        process.wait()
        process.stdout.close()
    inventory.remove(model, Silent())
    assert model.owned == []


def test_who_waits_for_a_removal_makes_the_folder_anew() -> None:
    path = convert(HUB)
    notes = threading.Event()

    class Reporter(Silent):
        def note(self, message: str) -> None:
            notes.set()

    def make() -> None:
        with artifacts.lock(path, Reporter()), artifacts.atomic_dir(path) as temporary:
            (temporary / "file").write_text("new")

    maker = threading.Thread(target=make)
    with artifacts.lock(path, Silent()):
        maker.start()
        assert notes.wait(30)
        artifacts.discard(path.parent)
    maker.join(30)
    assert (path / "file").read_text() == "new"


def test_a_folder_that_goes_as_its_lock_is_made_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, mkdir, tries = convert(HUB), Path.mkdir, []

    def gone_once(folder: Path, *arguments: Any, **options: Any) -> None:
        tries.append(folder)
        if len(tries) == 1:  # what pathlib says of a folder that was there and is not any more
            raise FileExistsError(17, "File exists", str(folder))
        mkdir(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", gone_once)
    with artifacts.lock(path, Silent()):
        assert tries[:2] == [path.parent] * 2


def test_all_that_is_there_is_listed_and_can_be_removed(tmp_path: Path) -> None:
    calibrate(ModelRef("hub", "org/profile-alone"))
    convert(ModelRef("folder", "/x/.hidden", Path("/x/.hidden")))
    odd = Path(os.fsdecode(b"/x/caf\xe9 \x1b[2J\nname"))
    convert(ModelRef("folder", str(odd), odd))
    long = Path("/x") / ("ü" * 120)
    convert(ModelRef("folder", str(long), long))
    store = paths.data_dir() / "models"
    (store / "no-manifest" / "float16").mkdir(parents=True)
    (store / "no-manifest" / "float16" / "shard").write_bytes(bytes(10))
    (store / ".org--killed.partial-removed").mkdir()
    (store / ".org--killed.partial-removed" / "shard").write_bytes(bytes(20))
    (store / "stray").write_text("a file")
    (store / "to-nothing").symlink_to(tmp_path / "nothing")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (store / "linked").symlink_to(tmp_path / "elsewhere")
    (paths.data_dir() / "profiles" / "odd-profile").mkdir(parents=True)
    (paths.data_dir() / "profiles" / "odd-profile" / "notes.txt").write_text("mine")
    demo = paths.cache_dir() / "demo"
    demo.mkdir(parents=True)
    (demo / "model.gguf").write_bytes(bytes(3000))
    for locked in ("locks-alone", "org--killed"):
        (store / locked).mkdir()
        (store / locked / ".float16.lock").touch()

    found = {model.name: model for model in inventory.stored_models()}
    assert set(found) == {
        *("org--profile-alone", "/x/.hidden", str(odd), str(long), "no-manifest", "org--killed"),
        *("stray", "to-nothing", "linked", "odd-profile", DEMO),
    }
    whats = {name: [item.what for item in model.others] for name, model in found.items()}
    assert whats["org--profile-alone"] == [
        "profile without its checkpoint: sensitivity, greedy, uniform"
    ]
    assert whats["no-manifest"] == ["not a checkpoint"]
    assert whats["org--killed"] == ["being made, or left by a run that was killed"]
    assert whats["linked"] == ["not a checkpoint", "a link"]
    assert whats[DEMO] == ["fetched"]
    assert found[DEMO].others[0].nbytes == 3000
    for name in [*found, "demo"][:-1]:
        inventory.remove(inventory.find(name), Silent())
        assert name not in inventory.names()
    assert inventory.stored_models() == []
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"
    assert inventory.names() == []


def test_two_models_of_one_name_are_both_listed() -> None:
    convert(ModelRef("hub", "org/name"))
    other = paths.model_dir("another") / "float16"
    artifacts.write_manifest(other / "manifest.json", "checkpoint", {"model": "org/name"})
    assert [model.name for model in inventory.stored_models()] == ["org/name", "org/name"]
    for _ in range(2):
        inventory.remove(inventory.find("org/name"), Silent())
    assert inventory.stored_models() == []
