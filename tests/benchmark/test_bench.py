"""The benchmark on a tiny decoder: what is measured, and that random weights are really sparse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmark.subjects import TINY

from teal_cli.benchmark import bench, subject
from teal_cli.benchmark.bandwidth import Bandwidth
from teal_cli.benchmark.bench import Settings, measure, require_memory_for
from teal_cli.benchmark.decode import SessionDecoding
from teal_cli.benchmark.self_calibration import met_setting, self_calibrated
from teal_cli.errors import TealError, UsageError
from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import SHAPES, random_decoder
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import DENSE, Setting

PROMPT = [5, 9, 200, 31]
BANDWIDTH = Bandwidth(3e15, "made up")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(TINY, device="cpu", dtype=torch.float16, seed=0)


@pytest.fixture
def session(decoder: Decoder) -> Session:
    return Session(decoder, max_length=64, backend="reference")


@pytest.mark.parametrize("target", [0.25, 0.5, 0.65])
def test_random_weights_meet_their_target_on_decoded_tokens(
    decoder: Decoder, session: Session, target: float
) -> None:
    profile = self_calibrated(decoder, seed=0, reporter=Silent())
    setting = met_setting(session, profile, target, PROMPT)
    assert setting.target_sparsity == target
    run = SessionDecoding(session, setting, PROMPT, 40).run()
    assert run.realised_sparsity == pytest.approx(target, abs=0.02)


def test_no_sparsity_is_exact(decoder: Decoder, session: Session) -> None:
    profile = self_calibrated(decoder, seed=0, reporter=Silent())
    thresholds = met_setting(session, profile, 0.0, PROMPT).thresholds
    assert thresholds is not None
    assert not thresholds.any()


def test_every_repeat_answers_the_whole_prompt(session: Session) -> None:
    decoding = SessionDecoding(session, DENSE, PROMPT, 10)
    decoding.warm_up()
    first = decoding.run()
    tokens = list(session.tokens)
    decoding.run()
    assert session.tokens == tokens
    assert len(tokens) == len(PROMPT) + 9  # the last token is not computed any further
    assert first.realised_sparsity is None


def test_measure_gives_a_row_for_everything_asked(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*arguments: object) -> object:
        raise TealError("torch.compile cannot be used here")

    monkeypatch.setattr(bench, "compiled_decoding", no_compiler)
    settings = Settings(
        sparsities=(0.0, 0.5),
        tokens=4,
        prompt_tokens=len(PROMPT),
        repeats=2,
        baselines=("transformers", "compile"),
    )

    def setting_for(session: Session, sparsity: float) -> Setting:
        return Setting("uniform", sparsity, torch.full((TINY.num_hidden_layers, 7), sparsity))

    reads = iter([Bandwidth(1.0, "slow"), BANDWIDTH, Bandwidth(2.0, "slow")])  # one more than runs
    bandwidth, rows, notes = measure(
        decoder, PROMPT, settings, setting_for, lambda: next(reads), Silent()
    )
    assert bandwidth == Bandwidth(BANDWIDTH.bytes_per_s, "made up, the fastest read")
    assert next(reads, None) is None
    assert [row.label for row in rows] == ["dense", "sparse 0", "sparse 0.5", "transformers"]
    assert rows[0].realised_sparsity is None
    assert rows[1].realised_sparsity == pytest.approx(0, abs=0.01)
    assert rows[2].realised_sparsity > 0.2
    assert rows[2].bytes_per_token < rows[1].bytes_per_token <= rows[0].bytes_per_token
    assert set(rows[2].speedup) == {"dense", "transformers"}
    assert notes == ("no --baseline compile: torch.compile cannot be used here",)


def test_a_context_too_short_is_refused(decoder: Decoder) -> None:
    settings = Settings(tokens=100, prompt_tokens=100)
    with pytest.raises(UsageError, match="longer than this model's context of 128"):
        measure(decoder, PROMPT, settings, lambda s, t: DENSE, lambda: BANDWIDTH, Silent())


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "available_memory", lambda device: 20 * 10**9)
    cpu, settings = torch.device("cpu"), Settings()
    require_memory_for(SHAPES["llama-2-7b"], torch.float16, cpu, settings, "llama-2-7b")
    with pytest.raises(TealError, match=r"llama-2-70b in float16 needs 13\d\.\d GB"):
        subject.random_subject("llama-2-70b", torch.float16, settings, cpu, Silent())
    with_copy = dataclasses.replace(settings, baselines=("transformers",))
    with pytest.raises(TealError, match="with 1 more copy for --baseline"):
        require_memory_for(SHAPES["llama-2-7b"], torch.float16, cpu, with_copy, "llama-2-7b")


@pytest.mark.parametrize("model", [None, "llama-9", "org/name"])
def test_random_weights_need_a_shape(model: str | None) -> None:
    with pytest.raises(UsageError, match="needs a shape") as caught:
        subject.random_subject(model, torch.float16, Settings(), torch.device("cpu"), Silent())
    assert caught.value.hint is not None
    assert "tinyllama-1.1b" in caught.value.hint


def test_a_shape_is_named_as_people_write_it() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(TealError, match=r"llama-2-70b in float32 needs"):
        subject.random_subject("Llama2:70b", torch.float32, Settings(), cpu, Silent())
    with pytest.raises(UsageError, match="'lama-2-70b' is none") as caught:
        subject.random_subject("lama-2-70b", torch.float32, Settings(), cpu, Silent())
    assert str(caught.value.hint).startswith("Did you mean llama-2-70b? ")
