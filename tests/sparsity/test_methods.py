"""Allocation methods against autograd and brute force, refined thresholds, and clean resumes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparsity.interrupts import QUIET, Stop, StopsAfter

from teal_cli.errors import TealError, UsageError
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.sparsity import greedy, sensitivity
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.observe import SKIPPED_POSITIONS
from teal_cli.sparsity.profile import REFINED_TARGETS, Profile
from teal_cli.sparsity.shape import ModelShape
from teal_cli.sparsity.workspace import Workspace

ALL = ("sensitivity", "greedy", "uniform")
IN_MEMORY = Workspace(None, None)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "_STEP", 0.1)
    monkeypatch.setattr(greedy, "_STEPS", 9)


def site_gradients(
    decoder: Decoder, row: torch.Tensor, generator: torch.Generator
) -> dict[tuple[int, str], Any]:
    """(x, the loss's gradient) [T, channels] at every site, from one plain backward pass."""
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        x.retain_grad()
        seen[layer, site] = x

    decoder.weights.embed_tokens.requires_grad_()
    logits = decoder.logits(decoder.forward(row, observe=observe))
    drawn = torch.multinomial(logits.detach().log_softmax(-1).exp(), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn, reduction="sum").backward()
    decoder.weights.embed_tokens.requires_grad_(False)
    return {place: (x.detach(), x.grad) for place, x in seen.items()}


def test_costs_are_those_of_a_plain_backward_pass(decoder: Decoder, tokens: torch.Tensor) -> None:
    profile = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    with torch.no_grad():
        found = sensitivity.costs(decoder, tokens, profile, IN_MEMORY, QUIET)
    expected = torch.zeros_like(found)
    generator = torch.Generator().manual_seed(0)
    rows = [site_gradients(decoder, row, generator) for row in tokens]
    for number, level in enumerate(sensitivity.LEVELS.tolist()):
        thresholds = profile.quantiles.thresholds(torch.full((4, 7), level)).float()
        for layer, name in itertools.product(range(4), ("o", "down")):
            index = PROJECTIONS.index(name)
            for row in rows:
                x, g = (part[SKIPPED_POSITIONS:] for part in row[layer, SITE_OF[name]])
                dropped = (g * x * (x.abs() <= thresholds[layer, index])).sum(-1)
                expected[layer, number, index] += dropped.double().square().mean()
    scale = sensitivity._LOSS_SCALE**2
    for index in (3, 6):
        torch.testing.assert_close(
            found[..., index] / scale, expected[..., index], rtol=1e-3, atol=1e-9
        )


def test_projections_gradients_add_up_to_their_site_s(
    decoder: Decoder, tokens: torch.Tensor
) -> None:
    plain = site_gradients(decoder, tokens[0], torch.Generator().manual_seed(5))
    with torch.no_grad():
        inputs = [decoder.embed(tokens[0])]
        for layer in range(4):
            inputs.append(decoder.layer(layer, inputs[-1]))
    gradient = sensitivity._loss_gradient(decoder, inputs[4], torch.Generator().manual_seed(5))
    for layer in reversed(range(4)):
        gradient, projections = sensitivity.layer_gradients(decoder, layer, inputs[layer], gradient)
        for site in SITES:
            names = [name for name in PROJECTIONS if SITE_OF[name] == site]
            total = sum(projections[PROJECTIONS.index(name)][1] for name in names)
            x, expected = plain[layer, site]
            torch.testing.assert_close(projections[PROJECTIONS.index(names[0])][0], x)
            torch.testing.assert_close(
                total / sensitivity._LOSS_SCALE, expected, rtol=1e-4, atol=1e-6
            )


def test_equalised_allocation_meets_every_target(decoder: Decoder) -> None:
    shape = ModelShape.of(decoder.config)
    scale = torch.rand(4, 1, 7, generator=torch.Generator().manual_seed(2)).double().exp()
    table = sensitivity.equalise(scale * sensitivity.LEVELS[:, None] ** 3, shape)
    totals = (table.mean(1) * shape.weight_shares).sum(-1)
    torch.testing.assert_close(totals, torch.linspace(0, 0.95, 96).double(), atol=1e-6, rtol=0)
    assert (table.diff(dim=0) >= -1e-9).all()


def test_equalised_allocation_costs_least(decoder: Decoder) -> None:
    """Costs s^3 a, whose best shares have equal slopes per weight: s^2 a / f is constant."""
    shape = ModelShape.of(decoder.config)
    scale = torch.rand(4, 1, 7, generator=torch.Generator().manual_seed(3)).double() + 0.5
    scale = scale * shape.weight_shares
    table = sensitivity.equalise(scale * sensitivity.LEVELS[:, None] ** 3, shape)[50]
    slope = 3 * table**2 * scale[:, 0] / shape.weight_shares
    assert float(slope.log().std()) < 0.02
    assert float(table.std()) > 0.03


def test_a_cost_curve_that_noise_bends_down_still_allocates(decoder: Decoder) -> None:
    shape = ModelShape.of(decoder.config)
    noise = torch.rand(4, 19, 7, generator=torch.Generator().manual_seed(4)).double()
    table = sensitivity.equalise(noise, shape)
    assert table.isfinite().all()
    assert float(table.min()) >= 0
    assert float(table.max()) <= 1


def test_greedy_takes_what_hurts_least(decoder: Decoder, tokens: torch.Tensor) -> None:
    """Against a search written out: each step tries every projection, alone, on the block."""
    profile = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    shares = profile.shape.weight_shares

    class Additive:
        layer = 1

        def error(self, thresholds: torch.Tensor) -> float:
            return float((thresholds[1] * torch.tensor([3.0, 1, 4, 1, 5, 9, 2])).sum())

    found = greedy.search(Additive(), profile, 0.05, 12)  # type: ignore[arg-type]
    level = torch.zeros(7, dtype=torch.float64)
    for row in found:
        errors = {}
        for index in range(7):
            trial = level.clone()
            trial[index] = min(float(trial[index]) + 0.05 / float(shares[index]), 0.99)
            if trial[index] > level[index]:
                asked = torch.zeros(4, 7, dtype=torch.float64)
                asked[1] = trial
                errors[Additive().error(profile.quantiles.thresholds(asked).float())] = trial
        level = errors[min(errors)]
        assert torch.equal(row, level)


def test_greedy_s_block_error_is_the_norm_over_the_hidden_axis(
    decoder: Decoder, tokens: torch.Tensor
) -> None:
    hidden = decoder.embed(tokens[0])
    thresholds = torch.full((4, 7), 0.1)
    with torch.no_grad():
        found = greedy._Block(decoder, 0, [hidden]).error(thresholds)
        dense = decoder.layer(0, hidden)[30:]
        sparse = decoder.layer(0, hidden, thresholds=thresholds, sparse_from=30)[30:]
    expected = (sparse - dense).square().sum(-1).sqrt().mean()
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_greedy_s_trials_are_those_of_the_decoder(
    decoder: Decoder, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one trial leaves behind must not leak into another, whatever is kept."""
    hidden = [decoder.embed(row) for row in tokens[:2]]
    levels = torch.full((4, 7), 0.05)
    trials = [levels.clone() for _ in range(21)]
    for number, trial in enumerate(trials):
        trial[1, number % 7] = 0.1 + 0.01 * number
    for kept in (128, 3):
        monkeypatch.setattr(greedy, "_KEPT", kept)
        with torch.no_grad():
            block = greedy._Block(decoder, 1, hidden)
            for trial in trials:
                assert block.error(trial) == greedy._Block(decoder, 1, hidden).error(trial)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("method", ALL)
def test_sparsity_is_realised_on_the_sparse_model(
    decoder: Decoder, tokens: torch.Tensor, method: str
) -> None:
    profile = calibrate(decoder, tokens[:4], model="tiny", methods=(method,), reporter=QUIET)
    for target in (0.25, *REFINED_TARGETS[:3]):
        thresholds = profile.thresholds(target, method)
        dropped = torch.zeros(4, 7)

        def observe(layer: int, site: str, x: torch.Tensor, t: Any = thresholds) -> None:
            for index, name in enumerate(PROJECTIONS):
                if SITE_OF[name] == site:
                    share = (x[SKIPPED_POSITIONS:].abs() <= t[layer, index]).float().mean()
                    dropped[layer, index] += share / 4  # noqa: B023

        for row in tokens[:4]:
            decoder.forward(
                row, thresholds=thresholds, sparse_from=SKIPPED_POSITIONS, observe=observe
            )
        assert profile.model_sparsity(dropped) == pytest.approx(target, abs=0.005)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("advances", [2, 7, 14, 30, 44])
def test_interrupted_anywhere_it_ends_as_if_undisturbed(
    decoder: Decoder, tokens: torch.Tensor, tmp_path: Path, advances: int
) -> None:
    def run(folder: Path | None, reporter: Any) -> Profile:
        return calibrate(
            decoder, tokens, model="tiny", methods=ALL, work_dir=folder, reporter=reporter
        )

    undisturbed = run(None, QUIET)
    with pytest.raises(Stop):
        run(tmp_path, StopsAfter(advances))
    resumed = run(tmp_path, QUIET)
    assert undisturbed.counts is not None
    assert resumed.counts is not None
    assert torch.equal(resumed.counts, undisturbed.counts)
    for name in ALL:
        assert torch.equal(resumed.offsets[name], undisturbed.offsets[name])
    for name in ALL[:2]:
        assert torch.equal(resumed.allocations[name], undisturbed.allocations[name])


@pytest.mark.usefixtures("fast")
def test_a_method_is_added_to_a_profile(decoder: Decoder, tokens: torch.Tensor) -> None:
    both = calibrate(decoder, tokens, model="tiny", methods=ALL, reporter=QUIET)
    assert both.methods == ALL
    profile = calibrate(decoder, tokens, model="tiny", methods=("uniform",), reporter=QUIET)
    for method in ("greedy", "sensitivity"):
        profile = calibrate(
            decoder, tokens, model="tiny", methods=(method,), base=profile, reporter=QUIET
        )
    assert profile.methods == ALL
    for method in ALL:
        assert torch.equal(profile.thresholds(0.45, method), both.thresholds(0.45, method))


def test_offsets_survive_and_are_interpolated(
    decoder: Decoder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    profile = calibrate(decoder, tokens, model="tiny", methods=("uniform",), reporter=QUIET)
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    for target in (0.0, 0.2, 0.45, 0.8, 0.9):
        expected = profile.thresholds(target)
        torch.testing.assert_close(loaded.thresholds(target), expected, rtol=1e-4, atol=1e-6)
    dropped = profile.quantiles.sparsity(profile.thresholds(0.45))
    middle = 0.45 + profile.offsets["uniform"][:2].mean()
    torch.testing.assert_close(dropped, middle.expand(4, 7), rtol=0, atol=1e-4)
    assert not profile.thresholds(0.0).any()


def test_loss_that_is_not_finite(decoder: Decoder, tokens: torch.Tensor) -> None:
    profile = calibrate(decoder, tokens, model="tiny", reporter=QUIET)
    decoder.weights.lm_head[0, 0] = torch.nan
    with pytest.raises(TealError, match="loss of the dense model is not finite"):
        calibrate(
            decoder,
            tokens,
            model="tiny",
            methods=("sensitivity",),
            base=profile,
            reporter=QUIET,
        )


def test_no_such_method(decoder: Decoder, tokens: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="no method 'best'") as caught:
        calibrate(decoder, tokens, model="tiny", methods=("best",), reporter=QUIET)
    assert "sensitivity, greedy, uniform" in (caught.value.hint or "")
