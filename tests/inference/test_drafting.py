"""Guessing tokens changes how fast an answer comes, and nothing of what it says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import FAMILIES, hf_model, our_decoder
from reporters import Notes
from torch import Tensor

from teal_cli.drafts.names import Wanted
from teal_cli.drafts.ready import Draft as ModelDraft
from teal_cli.inference import drafting as drafting_module
from teal_cli.inference import pace
from teal_cli.inference import session as session_module
from teal_cli.inference.drafters import Drafter, Lookup, ModelDrafter
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.generate import Finish, Token, generate
from teal_cli.inference.guesses import DraftCounts
from teal_cli.inference.sampling import Sampler, Sampling, candidates, penalised
from teal_cli.inference.session import Session
from teal_cli.inference.step import DecoderPrefill
from teal_cli.inference.verification import Verification
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import DENSE, Setting

PROMPT = torch.randint(0, 97, (21,), generator=torch.Generator().manual_seed(5)).tolist()
SAMPLINGS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.3),
    "temperature": Sampling(0.9, seed=3),
    "all": Sampling(1.2, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=4),
}
Draft = Callable[[Session], list[Drafter]]


def sparse(decoder: Decoder) -> Setting:
    return Setting("uniform", 0.3, torch.full((decoder.config.num_hidden_layers, 7), 0.1))


def itself(session: Session) -> ModelDrafter:
    decoder = session.decoder
    own = Session(
        decoder, max_length=session.max_length, cache=session.cache, setting=sparse(decoder)
    )
    return ModelDrafter("self", own, decoder.config.vocab_size, shares_cache=True)


def another(session: Session) -> ModelDrafter:
    """The same model as if it were another: with a cache of its own, and a shorter context."""
    decoder = session.decoder
    own = Session(decoder, max_length=80, setting=sparse(decoder))
    return ModelDrafter("other", own, decoder.config.vocab_size)


DRAFTERS: dict[str, Draft] = {
    "lookup": lambda session: [Lookup()],
    "self": lambda session: [itself(session)],
    "model": lambda session: [another(session)],
    "both": lambda session: [Lookup(), another(session)],
}


def answer(
    session: Session, prompt: Sequence[int], sampling: Sampling | Sampler | None = None, **more: Any
) -> tuple[list[int], Finish]:
    sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling or Sampling())
    *tokens, finish = generate(session, prompt, sampler, **{"max_new_tokens": 40, **more})
    assert isinstance(finish, Finish)
    return [token.id for token in tokens if isinstance(token, Token)], finish


def drafted(decoder: Decoder, draft: Draft, length: int | None = 4, room: int = 120) -> Session:
    session = Session(decoder, max_length=room)
    session.drafting = Drafting(draft(session), length=length)
    return session


@pytest.mark.parametrize(
    ("drafter", "family"),
    # Both ask what each does alone.
    [
        *product(DRAFTERS, ["llama"]),
        *product(["self", "both"], [f for f in FAMILIES if f != "llama"]),
    ],
)
def test_an_answer_is_the_dense_models(drafter: str, family: str) -> None:
    """Token for token: the same draws decide with and without guesses, in a second turn too."""
    decoder = our_decoder(hf_model(family))
    dense, session = Session(decoder, max_length=120), drafted(decoder, DRAFTERS[drafter])
    guessed = DraftCounts()
    for sampling in SAMPLINGS.values():
        ours, theirs = Sampler(sampling), Sampler(sampling)
        prompt = [*PROMPT]
        for _ in range(2):
            expected, _ = answer(dense, prompt, theirs, max_new_tokens=30)
            said, finish = answer(session, prompt, ours, max_new_tokens=30)
            assert said == expected
            assert session.tokens == [*prompt, *said][:-1]
            assert finish.stats.draft is not None
            guessed += finish.stats.draft
            prompt += [*said, 7, 9]
    if drafter != "lookup":
        assert 40 < guessed.accepted < guessed.guessed


def test_an_answer_that_is_interrupted_while_a_guesser_reads_ends(decoder: Decoder) -> None:
    session, dense = drafted(decoder, DRAFTERS["model"]), Session(decoder, max_length=120)
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(session.position)
        return asked.count(len(PROMPT)) > 1  # not behind the first token, but right after that

    said, finish = answer(session, PROMPT, interrupted=interrupted)
    assert (finish.reason, len(said), session.tokens) == ("interrupted", 1, PROMPT)
    again = [*PROMPT, *said, 5]
    assert answer(session, again)[0] == answer(dense, again)[0]


@pytest.mark.demo
def test_what_counts_as_a_tie_is_more_than_passes_round(demo_checkpoint: Any) -> None:
    """The likeliest of a real model's tokens, after passes whose keys are passes' own."""
    decoder = demo_checkpoint.load("cpu")
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    tokens = demo_checkpoint.tokenizer()(text)["input_ids"][600:840]
    session = Session(decoder, max_length=len(tokens))
    session.prefill(tokens[:20])
    steps = torch.stack([session.step(token).clone() for token in tokens[20:]])
    session.rewind(20)
    rows = []
    for start in range(20, len(tokens), 5):
        rows.append(session.verify(tokens[start : start + 5]).clone())
        session.tokens += tokens[start : start + 5]
    likeliest = steps.topk(5).indices
    errors = (torch.cat(rows) - steps).gather(1, likeliest) / steps.std(dim=1, keepdim=True)
    worst = (errors.amax(1) - errors.amin(1)).max().item()
    assert 0 < worst < drafting_module._ROUNDING[decoder.compute_dtype]


def test_text_that_repeats_is_looked_up() -> None:
    lookup, sampler = Lookup(), Sampler(Sampling())
    text = [1, 2, 3, 4, 5, 6, 9, 9, 9, 9, 1, 2]
    assert lookup.propose(text, 3, 4, sampler, 0) == [4, 5, 6, 9]
    assert lookup.propose([*text, 3, 4], 6, 4, sampler, 0) == []
    assert lookup.propose([*text, 3, 4, 6, 1, 2], 3, 3, sampler, 0) == [4, 6, 1]  # the last place
    assert lookup.propose([*text, 8, 9, 9], 9, 3, sampler, 0) == [1, 2, 8]  # another continuation
    assert lookup.propose([5, 1, 2, 7, 1, 2, 7, 1], 2, 5, sampler, 0) == [7, 1, 2, 7, 1]
    assert lookup.propose([1], 2, 4, sampler, 0) == []
    lookup.read([1, 2, 3, 4])
    assert lookup.propose([1, 2, 3, 4, 1, 2], 3, 1, sampler, 0) == [4]


def test_a_page_that_is_copied_with_a_change_is_guessed(decoder: Decoder) -> None:
    page = list(range(60))
    text = [*page, 200, *page[:30], 201, *page[31:]]

    class Copier(Session):
        """Says that text, whatever it was told."""

        def prefill(self, tokens: Any, *_: Any) -> Tensor:
            self.tokens += tokens[:-1]
            row = self.verify(tokens[-1:])[0]
            self.accept(tokens[-1])
            return row

        def verify(self, tokens: Sequence[int]) -> Tensor:
            following = text[self.position + 1 :][: len(tokens)]
            ids = torch.tensor(following + [0] * (len(tokens) - len(following)))
            return torch.nn.functional.one_hot(ids, 259).float()

    session = Copier(decoder, max_length=256)
    session.drafting = Drafting([Lookup()], length=7)
    said, finish = answer(session, page, max_new_tokens=61)
    assert said == text[60:]
    counts = finish.stats.draft
    assert counts is not None
    # Three tokens say where the text is, at first and after the change; the rest comes in eights.
    assert counts.accepted >= 61 - 2 * 4 - counts.rounds
    assert counts.rounds <= 9


class Table(Session):
    """A model of five tokens whose logits, [5, 5], the last token sets."""

    table: Tensor

    def verify(self, tokens: Sequence[int]) -> Tensor:
        return self.table[list(tokens)]

    def step(self, token: int) -> Tensor:
        self.tokens.append(token)
        return self.table[token]


class Wrong:
    """Guesses what the model does not."""

    name = "wrong"

    def read(self, tokens: Any, *_: Any) -> None:
        pass

    def propose(self, tokens: Any, token: int, most: int, *_: Any) -> list[int]:
        return [(token + i) % 5 for i in range(most)]


@pytest.mark.parametrize("drafter", ["model", "wrong"])
def test_draws_follow_the_dense_models_distribution(drafter: str, decoder: Decoder) -> None:
    """Pairs of tokens in 2000 answers, against their probabilities: chi-square, 0.1 % beyond."""
    generator = torch.Generator().manual_seed(1)
    table = 1.5 * torch.randn(5, 5, generator=generator)
    sampling = Sampling(1.5, top_p=0.95, repetition_penalty=1.2)
    prompt, first, draws = [3, 1, 4], 2, 2000

    def chances(tokens: list[int]) -> Tensor:
        shares, ids = candidates(penalised(table[tokens[-1]], tokens, 1.2), sampling)
        return torch.zeros(5, dtype=torch.float64).index_add_(0, ids, shares.double())

    expected = {}
    for pair in product(range(5), repeat=2):
        chance = chances([*prompt, first])[pair[0]] * chances([*prompt, first, pair[0]])[pair[1]]
        expected[pair] = draws * float(chance)

    session, own = (Table(decoder, max_length=16, backend="reference") for _ in range(2))
    session.table, own.table = table, table + torch.randn(5, 5, generator=generator)
    guesser = ModelDrafter("model", own, 5) if drafter == "model" else Wrong()
    drafting = Drafting([guesser], length=2)
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(draws):
        session.tokens = [*prompt]
        own.tokens = [*prompt]
        said = drafting.decode(session, first, Sampler(replace(sampling, seed=seed)), 3)
        counts[next(said), next(said)] += 1
    possible = [pair for pair, count in expected.items() if count > 0]
    assert counts.keys() <= {*possible}
    distance = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in possible)
    # Wilson and Hilferty's quantile of chi-square, 3.09 standard deviations from the mean.
    freedom = len(possible) - 1
    assert freedom > 10
    assert distance < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    right = drafting.counts.accepted / drafting.counts.guessed
    # A model that draws at random by itself would guess far less than one that shares the noise.
    assert right > 0.5 if drafter == "model" else 0.05 < right < 0.4


def test_a_draft_ends_where_the_answer_does(decoder: Decoder) -> None:
    """By a stop token at any place in a draft, at the longest answer, and at the context's end."""
    dense, session = Session(decoder, max_length=60), drafted(decoder, DRAFTERS["self"], room=60)
    said, _ = answer(dense, PROMPT, max_new_tokens=99)
    for end in range(1, 20):
        options: list[dict[str, Any]] = [{"max_new_tokens": end}]
        if said[end] not in said[:end]:
            options.append({"stop_token_ids": {said[end]}})
        for given in options:
            session.reset()
            heard, finish = answer(session, PROMPT, **given)
            assert heard == said[:end]
            assert finish.reason == ("length" if "max_new_tokens" in given else "stop")
            assert session.tokens == [*PROMPT, *said][: session.position]
            assert session.position == len(PROMPT) + end - (finish.reason == "length")
    session.reset()
    heard, finish = answer(session, PROMPT, max_new_tokens=99)
    assert (heard, finish.reason, session.position) == (said, "context", 60)


def test_an_interrupted_draft_leaves_what_was_heard(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_STRETCH", 1)  # asked before every layer
    said, _ = answer(Session(decoder, max_length=120), PROMPT)
    reading = [False] * decoder.config.num_hidden_layers
    for end in range(1, 12):
        session = drafted(decoder, DRAFTERS["self"])
        flags = iter([*reading, *[False] * (end - 1), True])
        heard, finish = answer(session, PROMPT, interrupted=lambda flags=flags: next(flags))
        assert (heard, finish.reason) == (said[:end], "interrupted")
        assert session.tokens == [*PROMPT, *said][: len(PROMPT) + end - 1]
        assert (
            answer(session, [*PROMPT, *heard])[0]
            == said[end:] + answer(Session(decoder, max_length=120), [*PROMPT, *said])[0][:end]
        )


@pytest.mark.parametrize("phase", ["guess", "check", "choice"])
def test_ctrl_c_in_a_round_leaves_nothing_half_accepted(
    phase: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, _ = answer(Session(decoder, max_length=120), PROMPT)
    session = drafted(decoder, DRAFTERS["self"])
    steps = generate(session, PROMPT, Sampler(Sampling()), max_new_tokens=40)
    heard = [next(steps).id for _ in range(4)]  # type: ignore[union-attr]
    assert session.drafting is not None
    drafter: Any = session.drafting.drafters[0]
    owner, name = {
        "guess": (drafter.session, "step"),
        "check": (session._prefill, "read"),
        "choice": (Sampler, "sample"),
    }[phase]

    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        heard.extend(step.id for step in steps)  # type: ignore[union-attr]
    monkeypatch.undo()
    assert heard == said[: len(heard)]
    assert session.tokens == [*PROMPT, *heard][: session.position]
    assert answer(session, [*PROMPT, *heard])[0][:20] == said[len(heard) : len(heard) + 20]


def test_what_rounding_may_decide_is_decided_by_a_step(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token has a twin, and a pass over several tokens is off in its last bits."""

    class Rounded(Session):
        def verify(self, tokens: Sequence[int]) -> Tensor:
            rows = super().verify(tokens)
            noise = torch.rand(
                rows.shape, generator=torch.Generator().manual_seed(len(self.tokens))
            )
            return rows if len(tokens) == 1 else rows + 1e-5 * noise

    weights = random_decoder(decoder.config, device="cpu", dtype=torch.float32, seed=0).weights
    assert isinstance(weights.lm_head, Tensor)
    weights.lm_head[1::2] = weights.lm_head[:-1:2]
    twins = Decoder(decoder.config, weights)
    expected, _ = answer(Session(twins, max_length=120), PROMPT)

    def said() -> list[int]:
        session = Rounded(twins, max_length=120)
        session.drafting = Drafting([itself(session)], length=4)
        return answer(session, PROMPT)[0]

    assert said() == expected
    monkeypatch.setattr(drafting_module, "_is_tie", lambda *_: False)
    assert said() != expected


def test_a_token_is_decoded_alone_now_and_then(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether guesses pay depends on what a token takes, which is not known for ever."""
    monkeypatch.setattr(pace, "_FRESH", 3)
    monkeypatch.setattr(pace.Pace, "length", lambda pace, most: 2)
    session = drafted(decoder, DRAFTERS["self"], length=None)
    counts: list[int] = []
    verify = Session.verify

    def verified(own: Session, tokens: Sequence[int]) -> Tensor:
        counts.append(len(tokens))
        return verify(own, tokens)

    monkeypatch.setattr(Session, "verify", verified)
    said, _ = answer(session, PROMPT)
    assert said == answer(Session(decoder, max_length=120), PROMPT)[0]
    assert counts[:9] == [3, 3, 3, 1, 3, 3, 3, 1, 3]


def test_what_a_token_takes_is_known_before_the_first(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the quickest of a few: what disturbs one would let guesses seem to pay."""
    session = drafted(decoder, DRAFTERS["self"], length=None)
    step, pauses = session.step, iter([0.0, 0.3, 0.0, 0.3])

    def slow(token: int) -> Tensor:
        time.sleep(next(pauses, 0.0))
        return step(token)

    monkeypatch.setattr(session, "step", slow)
    assert isinstance(session.drafting, Drafting)
    session.drafting.warm_up(session)
    assert session.tokens == []
    assert 0 < session.drafting._costs.token_s < 0.2


def test_a_guesser_reads_a_token_before_the_first(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its step would be compiled within a round, where a whole round of guesses was right."""
    session = drafted(decoder, DRAFTERS["model"], length=None)
    assert isinstance(session.drafting, Drafting)
    guesser, read = session.drafting.session, []
    assert guesser is not None
    step = guesser.step

    def noted(token: int) -> Tensor:
        read.append(token)
        return step(token)

    def nothing(*_: Any) -> Iterator[int]:
        yield from ()

    monkeypatch.setattr(guesser, "step", noted)
    monkeypatch.setattr(guesser, "decode", nothing)
    session.drafting.warm_up(session)
    assert read == [0]
    assert session.tokens == []


def test_passes_that_cannot_be_compiled_are_the_decoders(decoder: Decoder) -> None:
    """As soon as a session is made, and not in the midst of a prompt."""

    def broken(*_: object) -> Tensor:
        raise RuntimeError("no such instruction")

    reporter = Notes()
    cache = decoder.new_cache(20)
    prefill = DecoderPrefill(decoder, cache)
    verification = Verification(decoder, cache, prefill, reporter, on_device=True)
    verification._kernels = broken  # type: ignore[assignment]
    verification.warm_up()
    assert "no such instruction" in reporter.notes[0]
    assert verification.short_prompt == 0
    assert verification.logits([1, 2], 0).shape == (2, decoder.config.vocab_size)


def test_what_ties_take_is_counted(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what guesses have lost, and not as the time of the round that it fell in."""
    session = drafted(decoder, DRAFTERS["self"], length=2)
    counted: list[float] = []

    def slow(position: int) -> None:
        time.sleep(0.3)
        Session.rewind(session, position)

    def ended(self: pace.Pace, guesses: int, right: int, seconds: float, *_: Any) -> None:
        counted.append(seconds)

    monkeypatch.setattr(session, "rewind", slow)
    monkeypatch.setattr(drafting_module, "_is_tie", lambda *_: True)
    monkeypatch.setattr(pace.Pace, "round_ended", ended)
    assert isinstance(session.drafting, Drafting)
    list(generate(session, PROMPT, Sampler(Sampling()), max_new_tokens=12))
    assert session.drafting._costs._lost > 0.3
    assert min(counted) < 0.3


def test_after_a_wrong_guess_few_tokens_are_decoded_anew(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tie later on asks for all that came after what a pass has cached."""

    class Wrong(Lookup):
        def propose(self, tokens: Sequence[int], token: int, *_: Any) -> list[int]:
            guess, self.wrong = self.wrong, []
            return guess

    expected, _ = answer(Session(decoder, max_length=120), PROMPT)
    session, drafter, anew = Session(decoder, max_length=120), Wrong(), []
    drafter.wrong = [(expected[1] + 1) % decoder.config.vocab_size]
    settle = Drafting._settle

    def settled(own: Drafting, session: Session, start: int) -> Tensor:
        anew.append(session.position - start)
        return settle(own, session, start)

    monkeypatch.setattr(Drafting, "_settle", settled)
    late = len(PROMPT) + 10
    monkeypatch.setattr(drafting_module, "_is_tie", lambda *_: session.position > late)
    session.drafting = Drafting([drafter], length=1)
    assert answer(session, PROMPT)[0] == expected
    assert anew == [1]


@pytest.mark.parametrize(("acceptance", "guesses"), [(0.9, [4, 4]), (None, [])])
def test_where_nothing_repeats_assumed_guesses_are_made(
    decoder: Decoder, acceptance: float | None, guesses: list[int]
) -> None:
    """Text of random weights does not, and lookup's speed there would be that of no guesses."""
    session = Session(decoder, max_length=40)
    draft = ModelDraft(Wanted.parse("lookup"), 0.0, None, lambda own: own)
    draft.attach(session, DENSE, acceptance=acceptance, reporter=Silent())
    assert isinstance(session.drafting, Drafting)
    (lookup,) = session.drafting.drafters
    assert lookup.propose([1, 2, 3], 4, 2, Sampler(Sampling()), 0) == guesses
    assert lookup.propose([1, 2, 3, 5, 1, 2], 3, 2, Sampler(Sampling()), 0) == [5, 1]


def test_assumed_acceptance_is_what_is_met(decoder: Decoder) -> None:
    session = Session(decoder, max_length=256)
    session.drafting = Drafting([itself(session)], length=2, acceptance=0.8)
    counts = DraftCounts()
    for seed in range(4):
        session.reset()
        finish = answer(session, PROMPT, Sampling(1.0, seed=seed), max_new_tokens=200)[1]
        assert finish.stats.draft is not None
        counts += finish.stats.draft
    rate = counts.tokens_per_round
    assert rate is not None
    assert abs(rate - (1 + 0.8 + 0.8**2)) < 0.15  # four standard errors of some 330 rounds
