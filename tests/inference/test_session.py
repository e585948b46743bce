"""A session against the decoder's full forward."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reporters import Notes
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.inference import session as session_module
from teal_cli.inference.generate import Finish, Token, generate
from teal_cli.inference.sampling import Sampler, Sampling, penalised
from teal_cli.inference.session import Session
from teal_cli.inference.step import DecoderPrefill, DecoderStep
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS, SITE_OF
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import DENSE, Setting

PROMPT = torch.randint(0, 259, (21,), generator=torch.Generator().manual_seed(5)).tolist()
BACKENDS = ["reference", "auto"]


def half(thresholds: Tensor | None) -> Setting:
    return DENSE if thresholds is None else Setting("uniform", 0.5, thresholds)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums, a few thousandths of a percent of the spread."""
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_steps_equal_a_full_forward(
    decoder: Decoder, thresholds: Tensor, backend: str, sparse: bool
) -> None:
    levels = thresholds if sparse else None
    session = Session(decoder, max_length=40, setting=half(levels), backend=backend)  # type: ignore[arg-type]
    actual = [session.prefill(PROMPT[:12]), *(session.step(token) for token in PROMPT[12:])]
    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(PROMPT), thresholds=levels, sparse_from=12)
        expected = decoder.logits(hidden)[11:]
    assert session.position == len(PROMPT)
    for a, b in zip(actual, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_realised_sparsity_counts_what_the_decoder_sees(
    decoder: Decoder, thresholds: Tensor, backend: str
) -> None:
    session = Session(decoder, max_length=40, setting=half(thresholds), backend=backend)  # type: ignore[arg-type]
    session.prefill(PROMPT[:12])
    assert session.realised_sparsity() is None
    for token in PROMPT[12:]:
        session.step(token)

    kept = torch.zeros(thresholds.shape, dtype=torch.float64)

    def observe(layer: int, site: str, x: Tensor) -> None:
        for index, name in enumerate(PROJECTIONS):
            if SITE_OF[name] == site:
                kept[layer, index] = (x[12:].abs() > thresholds[layer, index]).double().mean()

    with torch.inference_mode():
        decoder.forward(
            torch.tensor(PROMPT), thresholds=thresholds, sparse_from=12, observe=observe
        )
    skips = session.skips()
    assert skips is not None
    assert (1 - skips.shares - kept).abs().max() < 1e-6
    weights = torch.tensor([a * b for a, b in decoder.config.projection_shapes.values()]).double()
    expected = 1 - float((kept.mean(0) * weights).sum() / weights.sum())
    assert session.realised_sparsity() == pytest.approx(expected)
    assert 0.1 < expected < 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_apply_at_once_and_zero_is_exact(
    decoder: Decoder, thresholds: Tensor, backend: str
) -> None:
    def last(session: Session, levels: Tensor | None) -> Tensor:
        session.reset()
        session.prefill(PROMPT[:12])
        session.use(half(levels))
        return session.step(7).clone()

    session = Session(decoder, max_length=40, backend=backend)  # type: ignore[arg-type]
    dense = last(session, None)
    assert session.realised_sparsity() is None
    close(last(session, torch.zeros_like(thresholds)), dense)
    assert session.realised_sparsity() == pytest.approx(0.0, abs=1e-6)
    sparse = last(session, thresholds)
    assert (sparse - dense).abs().max() > 0.01 * dense.std()
    assert torch.equal(last(session, None), dense)
    assert bool(last(session, torch.full_like(thresholds, 1e30)).isfinite().all())
    assert session.realised_sparsity() == 1.0


def test_the_kernels_are_told_the_target(
    decoder: Decoder, thresholds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    class Choosing(DecoderStep):
        start = follow = advance = chosen = next_token = take_back = DecoderStep.__call__

        def expect(self, sparsity: float) -> None:
            told.append(sparsity)

    monkeypatch.setattr(
        session_module,
        "choose_kernels",
        lambda decoder, cache, *rest: (Choosing(decoder, cache), DecoderPrefill(decoder, cache)),
    )
    session = Session(decoder, max_length=40, setting=Setting("greedy", 0.65, thresholds))
    session.use(DENSE)
    session.use(Setting("greedy", 0.3, thresholds))
    assert told == [0.65, 0.0, 0.3]


def test_thresholds_of_another_model_are_refused(decoder: Decoder, thresholds: Tensor) -> None:
    with pytest.raises(ValueError, match="of 2 layers, not 3"):
        Session(decoder, max_length=40, setting=half(thresholds[:2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewinding_forgets(decoder: Decoder, thresholds: Tensor, backend: str) -> None:
    session = Session(decoder, max_length=40, setting=half(thresholds), backend=backend)  # type: ignore[arg-type]
    session.prefill(PROMPT[:12])
    first = session.step(3).clone()
    session.prefill(PROMPT[12:])
    session.rewind(12)
    assert torch.equal(session.step(3), first)


def test_both_backends_give_the_same_greedy_tokens(decoder: Decoder, thresholds: Tensor) -> None:
    def answer(backend: str) -> list[int]:
        session = Session(decoder, max_length=64, setting=half(thresholds), backend=backend)  # type: ignore[arg-type]
        steps = generate(session, PROMPT, Sampler(Sampling()), max_new_tokens=30)
        return [step.id for step in steps if isinstance(step, Token)]

    assert answer("reference") == answer("auto")


def test_without_numba_it_decodes_in_torch_and_says_so(
    decoder: Decoder, thresholds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Notes()
    monkeypatch.setitem(sys.modules, "teal_kernels.cpu", None)  # as if the import failed
    session = Session(decoder, max_length=40, setting=half(thresholds), reporter=listener)
    assert session.backend == "torch"
    assert len(listener.notes) == 1
    assert "plain torch" in listener.notes[0]
    session.prefill(PROMPT)
    assert session.step(1).isfinite().all()


class _Broken:
    """A fused step of a Triton that imports, but fails at the first launch."""

    def __init__(self, **tensors: object) -> None:
        pass

    def __call__(self, token: int, position: int) -> Tensor:
        raise RuntimeError("no kernel image is available\nptxas: a page of its output")


@pytest.mark.parametrize("fault", ["import", "launch"])
@pytest.mark.filterwarnings("error")
def test_a_broken_triton_costs_one_warning_and_no_text(
    fault: str, decoder: Decoder, thresholds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Notes()
    broken = SimpleNamespace(DecodeStep=_Broken) if fault == "launch" else None
    monkeypatch.setitem(sys.modules, "teal_kernels.gpu", broken)
    monkeypatch.setitem(session_module.FUSED_STEPS, "cpu", ("teal_kernels.gpu", "triton"))
    session = Session(decoder, max_length=64, setting=half(thresholds), reporter=listener)
    expected = Session(decoder, max_length=64, setting=half(thresholds), backend="reference")
    assert session.backend == "torch"
    assert run(session, PROMPT, max_new_tokens=12)[0] == run(expected, PROMPT, max_new_tokens=12)[0]
    assert session.realised_sparsity() == expected.realised_sparsity()
    assert len(listener.notes) == 1
    assert "plain torch" in listener.notes[0]
    assert "\n" not in listener.notes[0]


def test_a_cpu_decodes_with_the_compiled_step(decoder: Decoder) -> None:
    assert Session(decoder, max_length=40).backend == "numba"
    assert Session(decoder, max_length=40, backend="reference").backend == "torch"


def test_a_long_prompt_is_prefilled_in_chunks(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Session(decoder, max_length=40).prefill(PROMPT)
    monkeypatch.setattr("teal_cli.inference.session._PREFILL_CHUNK", {"cpu": 8})
    close(Session(decoder, max_length=40).prefill(PROMPT), whole)


def test_the_context_is_a_limit(decoder: Decoder) -> None:
    session = Session(decoder, max_length=12)
    with pytest.raises(UsageError, match="do not fit"):
        session.prefill(PROMPT)
    assert session.position == 0
    session.prefill(PROMPT[:12])
    with pytest.raises(UsageError, match="full"):
        session.step(1)
    with pytest.raises(UsageError, match="out of range"):
        Session(decoder, max_length=decoder.config.max_position_embeddings + 1)


def run(session: Session, prompt: list[int], **options: object) -> tuple[list[int], Finish]:
    *tokens, finish = generate(session, prompt, Sampler(Sampling()), **options)  # type: ignore[arg-type]
    assert isinstance(finish, Finish)
    return [token.id for token in tokens if isinstance(token, Token)], finish


def test_generation_ends_for_each_reason(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_STRETCH", 1)  # asked before every layer
    session = Session(decoder, max_length=40)
    tokens, finish = run(session, PROMPT, max_new_tokens=6)
    assert (len(tokens), finish.reason) == (6, "length")
    assert finish.stats.new_tokens == 6
    assert finish.stats.tokens_per_s is not None

    stopped, finish = run(session, PROMPT, max_new_tokens=6, stop_token_ids={tokens[3]})
    assert finish.reason == "stop"
    assert stopped == tokens[: tokens.index(tokens[3])]

    _, finish = run(session, PROMPT, max_new_tokens=99)
    assert finish.reason == "context"
    assert finish.stats.new_tokens == 40 - len(PROMPT) + 1

    reading = [False] * decoder.config.num_hidden_layers
    answers = iter([*reading, False, False, True])
    heard, finish = run(session, PROMPT, max_new_tokens=6, interrupted=lambda: next(answers))
    assert (heard, finish.reason) == (tokens[:3], "interrupted")

    with pytest.raises(UsageError, match="no room"):
        run(session, PROMPT * 2, max_new_tokens=1)


def test_an_answer_of_nothing_has_no_speed(decoder: Decoder) -> None:
    session = Session(decoder, max_length=40)
    first, _ = run(session, PROMPT, max_new_tokens=1)
    tokens, finish = run(session, PROMPT, max_new_tokens=9, stop_token_ids=first)
    assert (tokens, finish.stats.new_tokens, finish.stats.tokens_per_s) == ([], 0, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_penalty_is_over_prompt_and_answer(decoder: Decoder, backend: str) -> None:
    """In a following turn too: of all that the model sees."""
    session = Session(decoder, max_length=80, backend=backend)  # type: ignore[arg-type]
    sampling = Sampling(repetition_penalty=1.4)
    prompt, plain = [*PROMPT], [*PROMPT]
    for _ in range(2):
        expected = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                logits = decoder.logits(decoder.forward(torch.tensor(expected)))[-1]
            expected.append(int(penalised(logits, expected, 1.4).argmax()))
        steps = generate(session, prompt, Sampler(sampling), max_new_tokens=6)
        answer = [step.id for step in steps if isinstance(step, Token)]
        assert [*prompt, *answer] == expected
        prompt = [*expected, 7, 7]
    plain += run(Session(decoder, max_length=80), plain, max_new_tokens=6)[0]
    assert plain != prompt[: len(plain)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_are_an_error(
    decoder: Decoder, backend: str, temperature: float
) -> None:
    """From the prompt on, or from a token in the midst of an answer."""
    session = Session(decoder, max_length=60, backend=backend)  # type: ignore[arg-type]
    sampler = Sampler(Sampling(temperature, seed=1))
    steps = generate(session, PROMPT, sampler, max_new_tokens=9)
    heard = [next(steps), next(steps)]
    session.cache.values[1, 0, 4, 3] = torch.nan
    with pytest.raises(TealError, match="logits are not finite"):
        next(steps)
    assert len(heard) == 2
    with pytest.raises(TealError, match="logits are not finite"):
        next(generate(session, [*session.tokens, 1, 2], sampler, max_new_tokens=9))
    session.reset()
    assert run(session, PROMPT, max_new_tokens=4)[1].reason == "length"


def test_a_following_turn_computes_only_what_is_new(decoder: Decoder) -> None:
    session = Session(decoder, max_length=80)
    said, _ = run(session, PROMPT, max_new_tokens=5)
    turn = [*PROMPT, *said, 1, 2, 3]
    tokens, finish = run(session, turn, max_new_tokens=5)
    assert finish.stats.reused_tokens == len(PROMPT) + 4  # the last one said was never fed
    fresh, finish = run(Session(decoder, max_length=80), turn, max_new_tokens=5)
    assert finish.stats.reused_tokens == 0
    assert tokens == fresh
    again, finish = run(session, turn, max_new_tokens=5)
    assert finish.stats.reused_tokens == len(turn) - 1
    assert again == fresh


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answers_sparsity_is_its_own(decoder: Decoder, thresholds: Tensor, backend: str) -> None:
    def realised(session: Session, prompt: list[int]) -> float | None:
        return run(session, prompt, max_new_tokens=5)[1].stats.realised_sparsity

    def fresh() -> Session:
        return Session(decoder, max_length=80, setting=half(thresholds), backend=backend)  # type: ignore[arg-type]

    session = fresh()
    first, second = realised(session, PROMPT), realised(session, PROMPT[:7])
    assert first != second
    assert second == realised(fresh(), PROMPT[:7])


def test_only_a_long_prompt_is_reported(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Follower(Silent):
        def __init__(self) -> None:
            self.seen: list[tuple[str, int | None]] = []

        def task(self, label: str, total: int | None = None, unit: str = "it") -> Any:
            self.seen.append((label, total))
            return super().task(label, total, unit)

    monkeypatch.setitem(session_module._PREFILL_CHUNK, "cpu", 4)
    session, follower = Session(decoder, max_length=40), Follower()
    session.prefill([1, 2, 3, 4], reporter=follower)
    assert follower.seen == []
    session.prefill([1, 2, 3, 4, 5], reporter=follower)
    assert follower.seen == [("Reading", 5)]
