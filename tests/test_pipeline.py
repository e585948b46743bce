"""An unnamed dtype is the source's own, for every command, whatever else is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_cli import pipeline
from teal_cli.errors import MissingError
from teal_cli.model.checkpoint import MANIFEST
from teal_cli.progress import Silent
from teal_cli.sparsity import stored
from teal_cli.store import hub, models
from teal_cli.store.hub import Source
from teal_cli.store.models import ModelRef

REF = ModelRef("hub", "org/model")


@pytest.fixture
def on_the_hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the Hub, in bfloat16, that has been downloaded."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (weights,) = folder.glob("*.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})

    def fetch(ref: ModelRef, **_: object) -> Source:
        if not folder.is_dir():
            raise MissingError(f"{ref.name} is not on this machine")
        return Source(ref, folder, None, f"hub:{ref.name}@1", "1")

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "is_here", lambda ref: folder.is_dir())
    return folder


def converted(dtype: str | None = None, quantize: str | None = None) -> torch.dtype:
    made = pipeline.ensure_checkpoint(REF, dtype=dtype, quantize=quantize, reporter=Silent())
    return made.dtype


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_one_dtype_that_was_named_changes_no_default(
    on_the_hub: Path, teal_home: Path, quantize: str | None
) -> None:
    assert converted("float32", quantize) == torch.float32
    assert converted(None, quantize) == torch.bfloat16  # not what happened to be there
    assert converted("float16", quantize) == torch.float16
    assert converted("float32", quantize) == torch.float32
    assert converted(None, quantize) == torch.bfloat16


def test_a_profile_is_looked_for_where_it_was_made(on_the_hub: Path, teal_home: Path) -> None:
    pytest.importorskip("datasets")
    for dtype in (None, "float32"):
        checkpoint = pipeline.ensure_checkpoint(REF, dtype=dtype, reporter=Silent())
        pipeline.ensure_profile(checkpoint, quick=True, reporter=Silent())
        path = pipeline.stored_profile(REF, dtype)[1]
        assert path == stored.profile_path(checkpoint)
    assert stored.arguments(checkpoint) == "org/model --dtype float32"
    path = pipeline.stored_profile(REF)[1]
    assert path is not None
    assert path.stem == "bfloat16"


def test_a_profile_of_another_dtype_is_none(on_the_hub: Path, teal_home: Path) -> None:
    pytest.importorskip("datasets")
    checkpoint = pipeline.ensure_checkpoint(REF, dtype="float32", reporter=Silent())
    pipeline.ensure_profile(checkpoint, quick=True, reporter=Silent())
    with pytest.raises(MissingError, match="no profile yet"):
        pipeline.stored_profile(REF)
    with pytest.raises(MissingError, match="no profile yet") as error:
        pipeline.stored_profile(REF, "float16")
    assert error.value.hint == "Make one with: teal calibrate org/model --dtype float16"


def test_without_the_source_another_dtype_is_named(on_the_hub: Path, teal_home: Path) -> None:
    converted("float32")
    on_the_hub.rename(on_the_hub.with_name("gone"))
    assert converted("float32") == torch.float32
    with pytest.raises(MissingError, match="not on this machine") as error:
        converted()
    assert error.value.hint == "It is here in another dtype: --dtype float32."


def test_what_an_older_version_made_first_is_the_default(on_the_hub: Path, teal_home: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        checkpoint = pipeline.ensure_checkpoint(REF, dtype=dtype, reporter=Silent())
        manifest = json.loads((checkpoint.folder / MANIFEST).read_text())
        del manifest["own_dtype"]
        (checkpoint.folder / MANIFEST).write_text(json.dumps(manifest))
    on_the_hub.rename(on_the_hub.with_name("gone"))
    assert converted() == torch.bfloat16


def test_a_local_model_as_well(tiny_model: Path, teal_home: Path) -> None:
    ref = models.resolve(str(tiny_model))
    own = pipeline.ensure_checkpoint(ref, reporter=Silent())
    other = "float16" if own.dtype != torch.float16 else "bfloat16"
    assert not pipeline.ensure_checkpoint(ref, dtype=other, reporter=Silent()).in_own_dtype
    again = pipeline.ensure_checkpoint(ref, reporter=Silent())
    assert (again.folder, again.in_own_dtype) == (own.folder, True)


def test_ctrl_c_on_the_way_says_what_is_kept(
    on_the_hub: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pressed(Silent):
        said = ""

        def note(self, message: str) -> None:
            if message.startswith("converting"):
                raise KeyboardInterrupt
            self.said = message

    pressed = Pressed()
    with pytest.raises(KeyboardInterrupt):
        pipeline.ensure_checkpoint(REF, reporter=pressed)
    assert pressed.said == "the model's files are kept: the same command goes on from there"
