"""Built-in profiles, against figures taken by hand from the data they were packed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teal_cli.errors import TealError
from teal_cli.model.random_weights import SHAPES
from teal_cli.model.sites import PROJECTIONS
from teal_cli.sparsity import presets
from teal_cli.sparsity.profile import Profile

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
    folder = Path(presets.__file__).parent
    assert sum(path.stat().st_size for path in folder.glob("*.npz")) < 300_000
