"""Built-in profiles, against figures taken by hand from the data they were packed from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from benchmark.commands import runner
from sparsity.preset_files import pack
from teal_kernels.tensors import RecoveryVectors

from teal_cli import pipeline, recovering
from teal_cli.errors import TealError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import SHAPES
from teal_cli.model.sites import PROJECTIONS
from teal_cli.progress import Silent
from teal_cli.sparsity import presets
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.observe import SKIPPED_POSITIONS, collect
from teal_cli.sparsity.profile import REFINED_TARGETS, Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.recovery import FIELDS, TARGETS, Recovery, own_vectors
from teal_cli.sparsity.spool import MemoryStates
from teal_cli.store import demo, hub, models
from teal_cli.text.corpora import load_corpus
from teal_cli.text.windows import windows

SHAPE_OF = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "meta-llama/Meta-Llama-3-70B": "llama-3-70b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
}


def preset(name: str) -> Profile:
    profile = presets.preset_for(name)
    assert profile is not None
    return profile


@pytest.mark.parametrize(
    ("name", "layer", "projection", "sparsity", "threshold"),
    [
        ("meta-llama/Llama-2-7b-hf", 0, "q", 0.5, 0.0049668),
        ("meta-llama/Llama-2-7b-hf", 31, "o", 0.25, 0.0192796),
        ("meta-llama/Llama-2-7b-hf", 15, "gate", 0.4, 0.1318127),
        ("meta-llama/Llama-2-7b-hf", 0, "down", 0.95, 0.0048830),
        ("meta-llama/Llama-2-7b-hf", 31, "down", 0.5, 0.0720919),
        ("mistralai/Mistral-7B-v0.1", 0, "v", 0.25, 0.000032166),
        ("mistralai/Mistral-7B-v0.1", 0, "down", 0.5, 0.00072623),
        ("mistralai/Mistral-7B-v0.1", 31, "up", 0.65, 2.5081298),
        ("meta-llama/Llama-2-70b-hf", 79, "k", 0.5, 0.1599910),
        ("meta-llama/Llama-2-70b-hf", 0, "o", 0.4, 0.00050475),
    ],
)
def test_uniform_thresholds(
    name: str, layer: int, projection: str, sparsity: float, threshold: float
) -> None:
    table = preset(name).thresholds(sparsity, "uniform")
    assert table[layer, PROJECTIONS.index(projection)] == pytest.approx(threshold, rel=6e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Meta-Llama-3-8B", (0.55, 0.4, 0.2, 0.6, 0.5, 0.4, 0.5857)),
        ("mistralai/Mistral-7B-v0.1", (0.55, 0.6, 0.2, 0.55, 0.4429, 0.4143, 0.6286)),
        ("meta-llama/Llama-2-13b-hf", (0.45, 0.55, 0.4, 0.6, 0.463, 0.4259, 0.6111)),
    ],
)
def test_greedy_table_of_layer_3_at_one_half(name: str, expected: tuple[float, ...]) -> None:
    table = presets.allocations_for(name)["greedy"]
    assert table[50, 3].tolist() == pytest.approx(expected, abs=1e-4)
    assert not table[0].any()
    assert (table.diff(dim=0) >= 0).all()
    assert table.max() <= 1


@pytest.mark.parametrize("name", SHAPE_OF)
def test_fits_its_model_and_meets_every_target(name: str) -> None:
    profile = preset(name)
    profile.check(SHAPES[SHAPE_OF[name]], "any fingerprint")
    assert profile.default_method == "greedy"
    for method in profile.methods:
        for sparsity in (0.0, 0.01, 0.25, 0.4, 0.5, 0.65, 0.8, 0.89):
            thresholds = profile.thresholds(sparsity, method)
            assert thresholds.isfinite().all()
            realised = profile.model_sparsity(profile.sparsity_at(thresholds))
            assert realised == pytest.approx(sparsity, abs=1e-6)
    with pytest.raises(TealError, match=r"ends at sparsity 0\.9"):
        profile.thresholds(0.96)


def test_saved_preset_is_the_same(tmp_path: Path) -> None:
    profile = preset("mistralai/Mistral-7B-v0.1")
    profile.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.thresholds(0.5), profile.thresholds(0.5))


def test_llama_3_8b_has_to_be_calibrated() -> None:
    assert presets.preset_for("meta-llama/Meta-Llama-3-8B") is None
    assert list(presets.allocations_for("meta-llama/Meta-Llama-3-8B")) == ["greedy"]


def test_other_models_have_none() -> None:
    for name in ("meta-llama/Llama-2-7b-chat-hf", "README", "../presets"):
        assert presets.preset_for(name) is None
        assert presets.allocations_for(name) == {}


def test_names_are_the_hub_s_whatever_their_case() -> None:
    assert presets.preset_for("mistralai/mistral-7b-v0.1") is not None


def test_files_stay_small() -> None:
    """The demo model's vectors are 0.4 MB a target."""
    folder = Path(presets.__file__).parent
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.npz")}
    assert sizes.pop("SmolLM2-135M-Instruct.Q4_1.npz") < 1_700_000
    assert max(sizes.values()) < 100_000
    assert sum(sizes.values()) < 230_000


DEMO_SOURCE = f"sha256:{demo.GGUF_SHA256}"


def test_the_demo_model_is_known_by_its_content() -> None:
    profile = presets.preset_for("/some/where/model.gguf", DEMO_SOURCE)
    assert profile is not None
    assert (profile.model, profile.fingerprint) == ("/some/where/model.gguf", None)
    assert profile.methods == ("sensitivity", "uniform")
    assert set(profile.offsets) == {"sensitivity", "uniform"}
    assert all(len(offsets) == len(REFINED_TARGETS) for offsets in profile.offsets.values())
    profile.check(SHAPES["smollm2-135m"])
    for method in profile.methods:
        for sparsity in (0.0, 0.25, 0.4, 0.5, 0.65, 0.8, 0.94):
            allocation = profile.allocation(profile.asked(sparsity, method), method)
            realised = profile.model_sparsity(
                profile.sparsity_at(profile.thresholds(sparsity, method))
            )
            assert realised == pytest.approx(profile.model_sparsity(allocation), abs=1e-4)
    said = profile.provenance
    assert "Wikipedia" in said["dataset"]
    assert said["tokens"] == said["samples"] * (said["seq_len"] - SKIPPED_POSITIONS)
    assert {"teal", "torch", "date"} <= said.keys()
    assert "/" not in str(dict(said))


def test_the_demo_model_has_vectors() -> None:
    profile = presets.preset_for("model.gguf", DEMO_SOURCE)
    assert profile is not None
    assert list(profile.recovery) == ["sensitivity"]
    found = profile.recovery["sensitivity"]
    assert found.targets[1:] == TARGETS
    assert all(abs(offset) < 0.05 for offset in found.offsets)
    for target in (0.1, *TARGETS, 0.45):
        assert profile.setting(target).vectors is not None
        assert profile.setting(target, recover=False).vectors is None
        assert profile.setting(target, "uniform").vectors is None
    # Halfway between two targets, halfway between their vectors and their sparsity.
    middle = (found.at(0.4).down + found.at(0.5).down) / 2
    torch.testing.assert_close(found.at(0.45).down, middle)
    assert profile.setting(0.7).vectors is None
    assert not found.vectors[0].qkv.any()
    assert all(v.qkv.any() and v.down.any() for v in found.vectors[1:])
    said = found.provenance
    assert said["dataset"].startswith("articles of English Wikipedia")
    assert {"samples", "seq_len", "steps", "seed", "teal", "torch", "date"} <= said.keys()
    assert "/" not in str(dict(said))


@pytest.mark.demo
def test_the_demo_model_is_better_with_its_vectors(
    demo_gguf: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a user has it: on text of another kind than they were learnt from."""
    evaluate = runner("eval", monkeypatch, capsys)
    options = ("--dataset", "pydoc", "--context", "384", "--samples", "3", "-s", "0.5")
    rows = {}
    for flags in ((), ("--no-recover",)):
        code, out, said = evaluate(demo_gguf, *options, *flags, "--offline", "--json")
        assert code == 0, said
        rows[flags] = json.loads(out)["sparse"]
    assert not (teal_home / "data" / "profiles").exists()
    for with_vectors, without in zip(rows[()], rows[("--no-recover",)], strict=True):
        assert with_vectors["recovered"]
        assert not without["recovered"]
        sparsities = (with_vectors["realised_sparsity"], without["realised_sparsity"])
        assert sparsities[0] == pytest.approx(sparsities[1], abs=0.01)
        for name in ("kl", "total_variation"):  # perplexity takes more windows
            assert with_vectors[name] < 0.99 * without[name], name


@pytest.mark.demo
def test_it_is_said_that_a_profile_takes_the_built_in_ones_place(
    demo_gguf: Path,
    teal_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The cat sat on the mat and looked at the rain. " * 100)
    options = ("--dataset", text, "--samples", "1", "--seq-len", "16", "--method", "uniform")
    calibrate = runner("calibrate", monkeypatch, capsys)
    code, _, said = calibrate(demo_gguf, *options, "--offline")
    assert code == 0, said
    path = next((teal_home / "data" / "profiles").rglob("*.safetensors"))
    place = f"the place of the built-in profile and its vectors; to have that again, remove {path}"
    assert f"takes {place}" in said
    assert "takes the place" not in calibrate(demo_gguf, *options, "--force", "--offline")[2]
    assert f"in {place}" in calibrate(demo_gguf, "--show")[2]
    path.unlink()
    assert "the place of" not in calibrate(demo_gguf, "--show")[2]
    monkeypatch.setitem(recovering.EFFORT, "cpu", (1, 32))
    more = ("--recover", "--force", "--dataset", text, "--samples", "16", "--seq-len", "32")
    code, _, said = calibrate(demo_gguf, *more, "-s", "0.4", "--offline")
    assert code == 0, said
    assert f"takes {place}" in said


def test_other_weights_of_the_demo_model_have_none() -> None:
    for source in ("", f"hub:{models.DEMO}@0123", "sha256:" + "0" * 64):
        assert presets.preset_for(models.DEMO, source) is None
    # Its allocations are of its own text: calibrated on another, they are found again.
    assert presets.allocations_for(models.DEMO) == {}


def test_a_file_is_the_demo_model_by_its_bytes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "any name.gguf", tmp_path / "other.gguf"
    file.write_bytes(b"GGUF" * 9)
    other.write_bytes(b"GGUF" * 8 + b"gguf")
    monkeypatch.setattr(demo, "GGUF_BYTES", 36)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"GGUF" * 9).hexdigest())
    found = {
        path: hub.fetch(models.ModelRef("gguf", str(path), path), reporter=Silent())
        for path in (file, other)
    }
    assert found[file].fingerprint == f"sha256:{demo.GGUF_SHA256}"
    assert found[file].ref.path == file
    assert found[other].fingerprint.startswith("files:")


@pytest.mark.demo
def test_the_demo_model_needs_no_calibration(
    demo_gguf: Path, tmp_path: Path, teal_home: Path
) -> None:
    file = tmp_path / "renamed.gguf"
    file.symlink_to(demo_gguf)
    ref = models.resolve(str(file))
    checkpoint = pipeline.ensure_checkpoint(ref, dtype="float16", reporter=Silent())
    profile = pipeline.ensure_profile(checkpoint, reporter=Silent())
    assert "built in" in profile.provenance["dataset"]
    assert not (teal_home / "data" / "profiles").exists()
    assert pipeline.stored_profile(ref, "float16")[1] is None

    # Text of another kind, and still about what is asked for.
    corpus = load_corpus("pydoc", split_role="calibration", reporter=Silent())
    tokens = windows(checkpoint.tokenizer(), corpus, seq_len=128, samples=3, seed=0)
    thresholds = profile.thresholds(0.4)
    counts = collect(
        checkpoint.load(),
        tokens,
        MemoryStates(),
        thresholds=thresholds,
        label="sparse",
        reporter=Silent(),
    )
    realised = profile.model_sparsity(Quantiles.from_counts(counts).sparsity(thresholds))
    assert realised == pytest.approx(0.4, abs=0.03)


@pytest.mark.demo
def test_packing_keeps_thresholds(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Within the histograms' bins, a 64th of a value wide, all of a calibrated profile is kept."""
    corpus = load_corpus("pydoc", split_role="calibration", reporter=Silent())
    tokens = windows(demo_checkpoint.tokenizer(), corpus, seq_len=64, samples=2, seed=0)
    made = calibrate(
        demo_checkpoint.load(), tokens, model="m", methods=("sensitivity",), reporter=Silent()
    )
    content = pack(made, {"dataset": "pydoc"})
    assert len(content) < 120_000
    (tmp_path / "some--model.npz").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "_FOLDER", tmp_path)
        packed = presets.preset_for("some/model")
    assert packed is not None
    assert packed.provenance == {"dataset": "pydoc"}
    for method in ("sensitivity", "uniform"):
        for sparsity in (0.05, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9):
            expected = made.thresholds(sparsity, method)
            torch.testing.assert_close(
                packed.thresholds(sparsity, method), expected, rtol=1 / 64, atol=1e-7
            )


def test_packing_keeps_vectors(
    decoder: Decoder, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = own_vectors(decoder)
    vectors = RecoveryVectors(*(getattr(own, name) + 0.5 for name in FIELDS))
    recovery = Recovery.nothing(decoder, {"dataset": "/mine.txt", "steps": 7})
    recovery = recovery.learnt(0.5, -0.02, vectors)
    made = calibrate(decoder, tokens, model="tiny", reporter=Silent())
    content = pack(made.recovered("uniform", recovery), {"dataset": "pydoc"})
    (tmp_path / "some--model.npz").write_bytes(content)
    monkeypatch.setattr(presets, "_FOLDER", tmp_path)
    packed = presets.preset_for("some/model")
    assert packed is not None
    found = packed.recovery["uniform"]
    assert (found.targets, found.offsets) == ((0.0, 0.5), (0.0, -0.02))
    assert found.provenance["steps"] == 7
    assert "/mine.txt" not in str(found.provenance)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found.at(0.5), name), getattr(vectors, name), atol=1e-3, rtol=1e-3
        )
