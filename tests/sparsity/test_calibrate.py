"""Calibration: exact histograms, and a killed run that ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsity.interrupts import QUIET, Stop, StopsAfter

from teal_cli.errors import TealError, UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.progress import Silent
from teal_cli.sparsity import histogram
from teal_cli.sparsity.calibrate import SKIPPED_POSITIONS, calibrate
from teal_cli.sparsity.profile import Profile
from teal_cli.store import artifacts


def activations(decoder: Decoder, windows: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Everything that the sites see after the first positions, by layer and site."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        seen.setdefault((layer, site), []).append(x[SKIPPED_POSITIONS:])

    for row in windows:
        decoder.forward(row, observe=observe)
    return {place: torch.cat(parts) for place, parts in seen.items()}


def test_counts_are_those_of_a_plain_forward(decoder: Decoder, tokens: torch.Tensor) -> None:
    profile = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    assert profile.counts is not None
    for (layer, site), x in activations(decoder, tokens).items():
        expected = histogram.count(x)
        assert torch.equal(profile.counts[layer, SITES.index(site)], expected)


def test_thresholds_realise_their_sparsity_on_the_model(
    decoder: Decoder, tokens: torch.Tensor
) -> None:
    profile = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    seen = activations(decoder, tokens)
    for sparsity in (0.25, 0.5, 0.75):
        thresholds = profile.thresholds(sparsity)
        for index, projection in enumerate(PROJECTIONS):
            for layer in range(len(thresholds)):
                x = seen[layer, SITE_OF[projection]].abs()
                realised = (x <= thresholds[layer, index]).double().mean()
                assert realised == pytest.approx(sparsity, abs=0.003)


def test_disk_and_memory_agree(decoder: Decoder, tokens: torch.Tensor, tmp_path: Path) -> None:
    in_memory = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    spooled = calibrate(decoder, tokens, model="tiny", work_dir=tmp_path / "w", reporter=QUIET)
    assert in_memory.counts is not None
    assert spooled.counts is not None
    assert torch.equal(in_memory.counts, spooled.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_interrupted_run_resumes_where_it_was(
    decoder: Decoder,
    tokens: torch.Tensor,
    tmp_path: Path,
    layers: int,
    dtype: torch.dtype,
) -> None:
    decoder = as_dtype(decoder, dtype)
    undisturbed = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    with pytest.raises(Stop):
        run(decoder, tokens, tmp_path, StopsAfter(layers))
    calls = count_layers(decoder)
    reporter = StopsAfter(None)
    resumed = run(decoder, tokens, tmp_path, reporter)
    assert reporter.notes == [f"resuming at layer {layers + 1} of 4"]
    assert sorted(set(calls)) == list(range(layers, 4))
    assert resumed.counts is not None
    assert undisturbed.counts is not None
    assert torch.equal(resumed.counts, undisturbed.counts)


def test_killed_in_the_middle_of_a_layer(
    decoder: Decoder, tokens: torch.Tensor, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    code = f"""
import os, pathlib, signal, torch
from teal_cli.model.config import ModelConfig
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Silent
from teal_cli.sparsity.calibrate import calibrate
torch.set_num_threads(1)
config = ModelConfig.from_dict({tiny_settings!r})
decoder = random_decoder(config, device="cpu", dtype=torch.float32, seed=0)
tokens = torch.randint(0, 97, (6, 40), generator=torch.Generator().manual_seed(0))
layer, seen = decoder.layer, []
def layer_then_die(index, hidden, **options):
    seen.append(index)
    if seen.count(2) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return layer(index, hidden, **options)
decoder.layer = layer_then_die
folder = pathlib.Path({str(tmp_path)!r})
calibrate(decoder, tokens, model="tiny", work_dir=folder, reporter=Silent())
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    reporter = StopsAfter(None)
    resumed = run(decoder, tokens, tmp_path, reporter)
    undisturbed = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    assert reporter.notes == ["resuming at layer 3 of 4"]
    assert resumed.counts is not None
    assert undisturbed.counts is not None
    assert torch.equal(resumed.counts, undisturbed.counts)


@pytest.mark.parametrize("harm", ["other windows", "short file", "no file", "damaged state"])
def test_what_cannot_be_resumed_starts_afresh(
    decoder: Decoder, tokens: torch.Tensor, tmp_path: Path, harm: str
) -> None:
    with pytest.raises(Stop):
        run(decoder, tokens, tmp_path, StopsAfter(2))
    folder = tmp_path / "histograms"
    hidden, state = folder / "hidden-0.bin", folder / "state.safetensors"
    if harm == "other windows":
        tokens = tokens.flip(0)
    elif harm == "short file":
        hidden.write_bytes(hidden.read_bytes()[:-4])
    elif harm == "no file":
        hidden.unlink()
    else:
        state.write_bytes(state.read_bytes()[:100])
    reporter = StopsAfter(None)
    profile = run(decoder, tokens, tmp_path, reporter)
    assert reporter.notes == []
    expected = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    assert torch.equal(profile.thresholds(0.5), expected.thresholds(0.5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activation_that_is_not_finite(
    decoder: Decoder, tokens: torch.Tensor, value: float
) -> None:
    decoder.weights.layers[2].gate_up[3, 5] = value
    with pytest.raises(TealError, match="layer 2, site mlp_act: an activation is not finite"):
        calibrate(decoder, tokens, model="tiny", reporter=QUIET)


@pytest.mark.parametrize("length", [SKIPPED_POSITIONS, 129])
def test_window_length_out_of_range(decoder: Decoder, length: int) -> None:
    with pytest.raises(UsageError, match="from 5 to 128 fit this model"):
        calibrate(decoder, torch.zeros(2, length).long(), model="tiny", reporter=QUIET)


def test_full_disk_is_noticed_before_work_starts(
    decoder: Decoder, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: usage)
    calls = count_layers(decoder)
    with pytest.raises(TealError, match="disk is too full"):
        run(decoder, tokens, tmp_path, QUIET)
    assert calls == []


def test_provenance_and_allocations(decoder: Decoder, tokens: torch.Tensor) -> None:
    greedy = torch.linspace(0, 0.9, 10)[:, None, None].expand(10, 4, 7)
    profile = calibrate(
        decoder,
        tokens,
        model="tiny",
        fingerprint="abc",
        allocations={"greedy": greedy},
        provenance={"dataset": "random", "seed": 0},
        reporter=QUIET,
    )
    profile.check(decoder.config, "abc")
    assert profile.default_method == "greedy"
    made_of = ("dataset", "seed", "samples", "seq_len", "tokens")
    assert [profile.provenance[name] for name in made_of] == ["random", 0, 6, 40, 6 * 36]
    assert {"date", "teal"} <= set(profile.provenance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(
    tiny_config: ModelConfig, tokens: torch.Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    on_gpu = random_decoder(tiny_config, device="cuda", dtype=dtype, seed=0)
    profile = run(on_gpu, tokens, tmp_path, QUIET)
    assert profile.counts is not None
    for (layer, site), x in activations(on_gpu, tokens).items():
        expected = histogram.count(x.cpu())
        assert torch.equal(profile.counts[layer, SITES.index(site)], expected)


def run(decoder: Decoder, tokens: torch.Tensor, folder: Path, reporter: Silent) -> Profile:
    return calibrate(decoder, tokens, model="tiny", work_dir=folder, reporter=reporter)


def count_layers(decoder: Decoder) -> list[int]:
    """The index of every layer that runs from now on."""
    calls: list[int] = []
    layer = decoder.layer

    def counted(index: int, hidden: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(index)
        return layer(index, hidden, **options)  # type: ignore[arg-type]

    decoder.layer = counted  # type: ignore[method-assign]
    return calls


def as_dtype(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """The decoder computing in its weights' dtype, as on a GPU."""
    weights = decoder.weights
    layers = [
        dataclasses.replace(
            layer,
            **{
                field.name: value.to(dtype)
                for field in dataclasses.fields(layer)
                if (value := getattr(layer, field.name)) is not None
            },
        )
        for layer in weights.layers
    ]
    narrow = dataclasses.replace(
        weights,
        embed_tokens=weights.embed_tokens.to(dtype),
        layers=layers,
        norm=weights.norm.to(dtype),
        lm_head=weights.lm_head.to(dtype),
    )
    return Decoder(decoder.config, narrow, compute_dtype=dtype)
