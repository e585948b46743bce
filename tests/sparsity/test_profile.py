"""Profiles: thresholds from targets, what they refuse, and files that survive or are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import PROJECTIONS, SITES
from teal_cli.sparsity import histogram
from teal_cli.sparsity.profile import REFINED_TARGETS, Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.shape import ModelShape

LAYERS = 3


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 8,
            "intermediate_size": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 16,
        }
    )


@pytest.fixture
def profile(config: ModelConfig) -> Profile:
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [
            torch.stack(
                [
                    histogram.count((1 + layer) * torch.randn(50_000, generator=generator))
                    for _ in SITES
                ]
            )
            for layer in range(LAYERS)
        ]
    )
    steps = torch.linspace(0, 1, 11).pow(torch.tensor([1.0, 3.0, 0.5])[:, None])  # [LAYERS, 11]
    ramp = (0.9 * steps.T)[..., None] * torch.linspace(0.6, 1, len(PROJECTIONS))
    return Profile(
        model="some/model",
        fingerprint="abc",
        shape=ModelShape.of(config),
        quantiles=Quantiles.from_counts(counts),
        counts=counts,
        allocations={"greedy": ramp},
        provenance={"dataset": "some text", "seed": 3},
    )


def test_zero_skips_zeros_only(profile: Profile) -> None:
    for method in profile.methods:
        thresholds = profile.thresholds(0.0, method)
        assert thresholds.shape == (LAYERS, len(PROJECTIONS))
        assert thresholds.dtype == torch.float32
        assert not thresholds.any()


@pytest.mark.parametrize("sparsity", [0.05, 0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("method", ["uniform", "greedy", None])
def test_target_is_met_model_wide(profile: Profile, method: str | None, sparsity: float) -> None:
    realised = profile.sparsity_at(profile.thresholds(sparsity, method))
    assert profile.model_sparsity(realised) == pytest.approx(sparsity, abs=1e-4)
    if method == "uniform":
        assert (realised - sparsity).abs().max() < 1e-4
    else:
        assert realised.std() > 0.02


def test_a_setting_is_made_of_the_best_method_or_the_one_named(profile: Profile) -> None:
    best, uniform = profile.setting(0.4), profile.setting(0.4, "uniform")
    assert (best.method, best.label) == (profile.default_method, f"{profile.default_method} 0.4")
    assert (uniform.method, uniform.target_sparsity) == ("uniform", 0.4)
    assert uniform.thresholds is not None
    assert torch.equal(uniform.thresholds, profile.thresholds(0.4, "uniform"))


def test_model_sparsity_is_weighted_by_weights(profile: Profile, config: ModelConfig) -> None:
    table = torch.rand(LAYERS, len(PROJECTIONS), generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([i * o for i, o in config.projection_shapes.values()])
    expected = (table * sizes).sum() / (sizes.sum() * LAYERS)
    assert profile.model_sparsity(table) == pytest.approx(expected.item(), rel=1e-5)


def test_methods(profile: Profile) -> None:
    assert profile.methods == ("greedy", "uniform")
    assert profile.default_method == "greedy"
    plain = dataclasses.replace(profile, allocations={})
    assert plain.default_method == "uniform"
    with pytest.raises(UsageError, match="no allocation 'greedy'") as caught:
        plain.thresholds(0.5, "greedy")
    assert "uniform" in (caught.value.hint or "")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(profile: Profile, sparsity: float) -> None:
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        profile.thresholds(sparsity)


def test_offsets_grow_with_the_square_of_a_target_up_to_the_first_refined(
    profile: Profile,
) -> None:
    first, second = REFINED_TARGETS[:2]
    offsets = torch.linspace(0.02, 0.05, len(REFINED_TARGETS), dtype=torch.float64)
    refined = dataclasses.replace(profile, offsets={"greedy": offsets})
    step = float(offsets[1] - offsets[0])
    for target, offset in (
        (0.0, 0.0),
        (first / 4, 0.02 / 16),
        (first / 2, 0.02 / 4),
        (first, 0.02),
        ((first + second) / 2, 0.02 + step / 2),
    ):
        assert refined.asked(target, "greedy") == pytest.approx(target + offset)
    assert refined.asked(first, "uniform") == first  # which has no offsets


def test_out_of_an_allocation_s_reach(profile: Profile) -> None:
    with pytest.raises(TealError, match=r"greedy allocation of some/model ends at sparsity 0\.7"):
        profile.thresholds(0.85)
    assert (profile.thresholds(0.85, "uniform") > 0).all()


def test_another_model_is_refused(profile: Profile, config: ModelConfig) -> None:
    profile.check(config, "abc")
    profile.check(config)
    with pytest.raises(TealError, match="other weights"):
        profile.check(config, "abd")
    with pytest.raises(TealError, match="another shape"):
        profile.check(dataclasses.replace(config, intermediate_size=25), "abc")
    dataclasses.replace(profile, fingerprint=None).check(config, "abd")


@pytest.mark.parametrize("counted", [True, False])
def test_saved_and_loaded_is_the_same(profile: Profile, counted: bool, tmp_path: Path) -> None:
    if not counted:
        profile = dataclasses.replace(profile, counts=None, fingerprint=None)
    path = tmp_path / "deep" / "p.safetensors"
    profile.save(path)
    loaded = Profile.load(path)
    for sparsity in (0.0, 0.3, 0.6):
        for method in profile.methods:
            expected = profile.thresholds(sparsity, method)
            assert torch.equal(loaded.thresholds(sparsity, method), expected)
    same = ("model", "fingerprint", "shape", "methods", "provenance")
    assert all(getattr(loaded, name) == getattr(profile, name) for name in same)
    assert (loaded.counts is not None) == counted
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no profile") as caught:
        Profile.load(tmp_path / "p.safetensors")
    assert "teal calibrate" in (caught.value.hint or "")


def header(path: Path) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["teal"])
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"kind": "checkpoint"},
        {"methods": ["greedy", "other"]},
        {"num_hidden_layers": 4},
        {"projections": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_file_that_says_something_else(
    profile: Profile, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "p.safetensors"
    profile.save(path)
    metadata = {"teal": json.dumps({**header(path), **change})}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(TealError, match=r"damaged|another version") as caught:
        Profile.load(path)
    assert "--force" in (caught.value.hint or "")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(profile: Profile, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "p.safetensors"
    profile.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TealError, match="is damaged"):
        Profile.load(path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(TealError, match="is damaged"):
        Profile.load(path)
