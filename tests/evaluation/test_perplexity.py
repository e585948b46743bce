"""`evaluate` against transformers in float64 with the thresholds put in by hooks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model.families import hf_model, our_decoder
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.evaluation.perplexity import evaluate
from teal_cli.evaluation.protocols import Protocol
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import Setting

LAYERS, VOCAB = 3, 97
STANDARD = Protocol("standard", 40, 40, 4, 1)
TEAL = Protocol("teal", 40, 8, 20, 32)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """A tiny random Llama in transformers."""
    return hf_model("llama")


@pytest.fixture(scope="module")
def decoder(oracle: Any) -> Decoder:
    # In float64 as well, so that rounding takes no channel across its threshold.
    return our_decoder(oracle, torch.float64)


@pytest.fixture(scope="module")
def thresholds() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor([0.5, 0.5, 0.3, 0.05, 0.5, 0.7, 0.05])
    return levels * (0.8 + 0.4 * torch.rand(LAYERS, 7, generator=generator))


def oracle_logits(
    oracle: Any, window: Tensor, thresholds: Tensor | None, sparse_from: int
) -> tuple[Tensor, Tensor]:
    """Float64 logits [T, V] of a whole window, and the share zeroed by layer and projection."""
    zeroed = torch.zeros(LAYERS, 7, dtype=torch.float64)
    handles = []
    for layer, block in enumerate(oracle.model.layers if thresholds is not None else ()):
        for index, name in enumerate(PROJECTIONS):
            owner = block.self_attn if name in "qkvo" else block.mlp

            def hook(_: Any, inputs: tuple[Tensor], at: tuple[int, int] = (layer, index)) -> Tensor:
                x = inputs[0].clone()
                part = x[:, sparse_from:]
                drop = part.abs().float() <= thresholds[at]
                # The last position feeds no score, and evaluate never computes it.
                zeroed[at] = drop[:, :-1].double().mean()
                part[drop] = 0
                return x

            module = getattr(owner, f"{name}_proj")
            handles.append(module.register_forward_pre_hook(lambda m, i, h=hook: (h(m, i),)))
    oracle.double()
    with torch.no_grad():
        logits = oracle(window[None]).logits[0]
    oracle.float()
    for handle in handles:
        handle.remove()
    return logits, zeroed


@pytest.mark.parametrize("protocol", [STANDARD, TEAL], ids=lambda p: p.name)
def test_every_figure_agrees_with_float64(
    oracle: Any, decoder: Decoder, thresholds: Tensor, protocol: Protocol
) -> None:
    windows = torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(5))
    result = evaluate(decoder, windows, [Setting("half", 0.5, thresholds)], protocol, Silent())

    nll, dense_nll, kl, agreement, variation, shares = [], [], [], [], [], []
    for window in windows:
        targets = window[protocol.scored_from :]
        rows = slice(protocol.scored_from - 1, -1)
        dense = oracle_logits(oracle, window, None, 0)[0][rows].log_softmax(-1)
        logits, zeroed = oracle_logits(oracle, window, thresholds, protocol.sparse_from)
        sparse = logits[rows].log_softmax(-1)
        dense_nll.append(-dense.gather(-1, targets[:, None]).mean().item())
        nll.append(-sparse.gather(-1, targets[:, None]).mean().item())
        kl.append((dense.exp() * (dense - sparse)).sum(-1).mean().item())
        agreement.append((dense.argmax(-1) == sparse.argmax(-1)).double().mean().item())
        variation.append((dense.exp() - sparse.exp()).abs().sum(-1).mean().item() / 2)
        shares.append(zeroed)

    assert result.windows == 3
    assert result.scored_tokens == 3 * protocol.scored
    assert result.dense.nll.value == pytest.approx(sum(dense_nll) / 3, rel=1e-5)
    assert result.dense.realised_sparsity == 0
    assert result.dense.kl.value == 0
    assert result.dense.agreement.value == 1
    (half,) = result.sparse
    assert half.nll.value == pytest.approx(sum(nll) / 3, rel=1e-5)
    assert half.perplexity.value == pytest.approx(math.exp(sum(nll) / 3), rel=1e-5)
    assert half.kl.value == pytest.approx(sum(kl) / 3, rel=1e-4)
    assert half.agreement.value == pytest.approx(sum(agreement) / 3, abs=1e-9)
    assert half.total_variation.value == pytest.approx(sum(variation) / 3, rel=1e-5)
    assert 0.01 < half.total_variation.value < 1
    assert half.by_window.total_variation == pytest.approx(variation, rel=1e-5)
    assert half.by_window.nll == pytest.approx(nll, rel=1e-5)
    assert half.by_window.kl == pytest.approx(kl, rel=1e-4)
    by_projection = torch.stack(shares).mean((0, 1))
    realised = torch.tensor(list(half.realised_by_projection.values()))
    assert torch.allclose(realised.double(), by_projection, atol=1e-6)
    sizes = torch.tensor([i * o for i, o in decoder.config.projection_shapes.values()]).double()
    expected = float((by_projection * sizes).sum() / sizes.sum())
    assert half.realised_sparsity == pytest.approx(expected, abs=1e-9)
    assert 0.2 < half.realised_sparsity < 0.8
    mlp = by_projection[4] * sizes[4] + by_projection[5] * sizes[5]
    assert half.realised_by_site["mlp_in"] == pytest.approx(float(mlp / sizes[4:6].sum()))


def test_thresholds_of_zero_change_nothing(decoder: Decoder) -> None:
    windows = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(6))
    zero = torch.zeros(LAYERS, 7)
    result = evaluate(decoder, windows, [Setting("exact", 0.0, zero)], STANDARD, Silent())
    (exact,) = result.sparse
    assert exact.nll.value == pytest.approx(result.dense.nll.value, rel=1e-6)
    assert exact.kl.value == pytest.approx(0, abs=1e-6)
    assert exact.agreement.value == 1
    assert exact.total_variation.value == pytest.approx(0, abs=1e-6)
    assert exact.realised_sparsity == 0


def test_chunks_of_positions_change_nothing(
    decoder: Decoder, thresholds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(7))
    whole = evaluate(decoder, windows, [Setting("half", 0.5, thresholds)], STANDARD, Silent())
    monkeypatch.setattr("teal_cli.evaluation.perplexity.LOGITS_CHUNK", 7 * VOCAB)
    chunked = evaluate(decoder, windows, [Setting("half", 0.5, thresholds)], STANDARD, Silent())
    assert chunked.sparse[0].nll.value == pytest.approx(whole.sparse[0].nll.value, rel=1e-6)
    assert chunked.sparse[0].kl.value == pytest.approx(whole.sparse[0].kl.value, rel=1e-5)
    assert chunked.sparse[0].realised_sparsity == whole.sparse[0].realised_sparsity


def test_a_loss_that_is_not_finite_is_an_error(decoder: Decoder) -> None:
    weights = decoder.weights
    broken = Decoder(
        decoder.config,
        type(weights)(weights.embed_tokens, weights.layers, weights.norm * 1e39, weights.lm_head),
    )
    windows = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(8))
    with pytest.raises(TealError, match="dense model is not finite"):
        evaluate(broken, windows, [], STANDARD, Silent())


def test_a_setting_whose_loss_is_not_finite_is_named(decoder: Decoder) -> None:
    windows = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(8))
    logits = decoder.logits
    broken = Decoder(decoder.config, decoder.weights)
    calls: list[int] = []

    def second_is_nan(hidden: Tensor) -> Tensor:
        calls.append(1)
        return logits(hidden) * (float("nan") if len(calls) == 2 else 1)

    broken.logits = second_is_nan  # type: ignore[method-assign]
    setting = Setting("greedy", 0.5, torch.zeros(LAYERS, 7))
    with pytest.raises(TealError, match=r"sparse model \(greedy 0\.5\) is not finite"):
        evaluate(broken, windows, [setting], STANDARD, Silent())
