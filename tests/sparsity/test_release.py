"""Import of a TEAL release that is made up here in its layout, whole and damaged."""

from __future__ import annotations

import csv
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teal_cli.errors import MissingError, TealError
from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import PROJECTIONS, SITES
from teal_cli.sparsity.release import import_release

BINS = 10_000
COLUMNS = ("Effective Sparsity", "Activation Error", "Baseline Error", *PROJECTIONS)


def activations(layer: int, site: int, channels: int) -> torch.Tensor:
    """Not quite symmetric, as activations are not."""
    generator = torch.Generator().manual_seed(10 * layer + site)
    x = torch.randn(1000 * channels, generator=generator, dtype=torch.float64)
    return torch.where(x > 0, 1.3 * x, x) * (layer + 1)


def histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and centers as released: the outer bins hold a hundredth of x on each side."""
    low, high = x.quantile(0.01).item(), x.quantile(0.99).item()
    width = (high - low) / (BINS - 2)
    bins = ((x - low) / width).floor().long().add(1).clamp(0, BINS - 1)
    centers = low + (torch.arange(BINS, dtype=torch.float64) - 0.5) * width
    return torch.bincount(bins, minlength=BINS).float(), centers.float()


def write_release(folder: Path, config: ModelConfig) -> Path:
    sizes = list(config.site_sizes.values())
    for layer in range(config.num_hidden_layers):
        for module, sites in (("self_attn", (0, 1)), ("mlp", (2, 3))):
            content = {}
            for name, site in zip(("h1", "h2"), sites, strict=True):
                counts, centers = histogram(activations(layer, site, sizes[site]))
                content |= {name: counts, f"{name}_centers": centers}
            path = folder / "histograms" / f"layer-{layer}" / module / "histograms.pt"
            path.parent.mkdir(parents=True)
            torch.save(content, path)
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for step in range(19):
                level = 0.05 * step
                writer.writerow([level, 0.1, 0.2, *[level * (0.7 + 0.05 * p) for p in range(7)]])
    return folder


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 16,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
        }
    )


@pytest.fixture
def release(tmp_path: Path, config: ModelConfig) -> Path:
    return write_release(tmp_path / "release", config)


def test_thresholds_are_quantiles_of_the_absolute_value(release: Path, config: ModelConfig) -> None:
    profile = import_release(release, config, model="some/model", fingerprint="abc")
    profile.check(config, "abc")
    assert profile.methods == ("greedy", "uniform")
    first = {"attn_in": "q", "attn_out": "o", "mlp_in": "up", "mlp_act": "down"}
    for sparsity in (0.1, 0.25, 0.5, 0.65, 0.9):
        thresholds = profile.thresholds(sparsity, "uniform")
        for layer in range(2):
            for site, name in enumerate(SITES):
                x = activations(layer, site, config.site_sizes[name]).abs()
                threshold = thresholds[layer, PROJECTIONS.index(first[name])]
                assert (x <= threshold).double().mean() == pytest.approx(sparsity, abs=0.002)


def test_greedy_search_meets_targets_by_the_model_s_own_weights(
    release: Path, config: ModelConfig
) -> None:
    profile = import_release(release, config, model="some/model", fingerprint="abc")
    realised = profile.sparsity_at(profile.thresholds(0.5, "greedy"))
    assert profile.model_sparsity(realised) == pytest.approx(0.5, abs=1e-4)
    ratios = realised[0] / realised[0, 0]
    expected = [(0.7 + 0.05 * p) / 0.7 for p in range(7)]
    assert ratios.tolist() == pytest.approx(expected, rel=1e-3)
    assert profile.fingerprint == "abc"


def test_histograms_alone_are_enough(release: Path, config: ModelConfig) -> None:
    (release / "lookup").rename(release / "elsewhere")
    profile = import_release(release, config, model="some/model", fingerprint=None)
    assert profile.methods == ("uniform",)


def test_histograms_of_another_model(release: Path, config: ModelConfig) -> None:
    wider = dataclasses.replace(config, intermediate_size=56)
    with pytest.raises(TealError, match="no multiple of 56"):
        import_release(release, wider, model="some/model", fingerprint=None)
    shallow = dataclasses.replace(config, num_hidden_layers=1, sliding_windows=(None,))
    with pytest.raises(TealError, match="more than 1 layers"):
        import_release(release, shallow, model="some/model", fingerprint=None)
    deep = dataclasses.replace(config, num_hidden_layers=3, sliding_windows=(None,) * 3)
    with pytest.raises(MissingError, match="layer-2"):
        import_release(release, deep, model="some/model", fingerprint=None)


def test_not_a_release(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(MissingError, match="no folder 'histograms'"):
        import_release(tmp_path, config, model="some/model", fingerprint=None)


class Intruder:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (exec, ("raise SystemExit('code of the file ran')",))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def unsafe(path: Path) -> None:
    path.write_bytes(pickle.dumps(Intruder(), protocol=2))


def other_content(path: Path) -> None:
    torch.save({"h1": torch.ones(4)}, path)


def no_dict(path: Path) -> None:
    torch.save(torch.ones(4), path)


def not_finite(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["h1"][5] = torch.nan
    torch.save(content, path)


def one_sided(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["h1_centers"] += 1000
    torch.save(content, path)


@pytest.mark.parametrize(
    "harm", [truncate, empty, unsafe, other_content, no_dict, not_finite, one_sided]
)
def test_damaged_histogram(
    release: Path, config: ModelConfig, harm: Callable[[Path], None]
) -> None:
    harm(release / "histograms" / "layer-1" / "mlp" / "histograms.pt")
    with pytest.raises(TealError, match=r"layer-1.*is damaged"):
        import_release(release, config, model="some/model", fingerprint=None)


@pytest.mark.parametrize(
    "content",
    [
        "",
        ",".join(COLUMNS) + "\n",
        "a,b\n1,2\n",
        ",".join(COLUMNS) + "\n0,0,0,0,0,0,0,0,0,x\n",
        ",".join(COLUMNS) + "\n0,0,0,0\n",
        ",".join(COLUMNS) + "\n0,0,0,1,1,1,1,1,1,2\n",
        ",".join(COLUMNS) + "\n0,0,0,1,1,1,1,1,1,nan\n",
        ",".join(COLUMNS) + "\n0,0,0,.2,.2,.2,.2,.2,.2,.2\n0,0,0,.1,.2,.2,.2,.2,.2,.2\n",
    ],
    ids=["empty", "no rows", "columns", "letter", "short row", "range", "nan", "falling"],
)
def test_damaged_search(release: Path, config: ModelConfig, content: str) -> None:
    (release / "lookup" / "layer-1" / "results.csv").write_text(content)
    with pytest.raises(TealError, match=r"results\.csv is damaged"):
        import_release(release, config, model="some/model", fingerprint=None)
    (release / "lookup" / "layer-1" / "results.csv").unlink()
    with pytest.raises(MissingError, match=r"results\.csv is missing"):
        import_release(release, config, model="some/model", fingerprint=None)
