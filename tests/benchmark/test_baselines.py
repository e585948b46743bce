"""The baselines run the same model: the same logits, and so an honest comparison."""

from __future__ import annotations

import shutil

import pytest
import torch
from benchmark.subjects import TINY
from clocks import tick
from model.families import FAMILIES, hf_model, our_decoder

from teal_cli.benchmark import compiled, transformers_baseline
from teal_cli.benchmark.compiled import CompiledDecoding, compiled_decoding
from teal_cli.benchmark.timing import Run
from teal_cli.benchmark.transformers_baseline import (
    TransformersDecoding,
    fastest_transformers,
    transformers_model,
)
from teal_cli.errors import TealError
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Silent


def ids(count: int) -> torch.Tensor:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gets_exactly_our_weights(family: str) -> None:
    original = hf_model(family)
    copy = transformers_model(our_decoder(original), torch.float32)
    with torch.no_grad():
        assert torch.equal(copy(ids(40)[None]).logits, original(ids(40)[None]).logits)


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_step_is_the_same_model(family: str) -> None:
    original, prompt = hf_model(family), ids(39).tolist()
    decoding = CompiledDecoding(
        our_decoder(original), torch.float32, prompt, 6, lambda advance: advance
    )
    decoding.run()
    assert decoding.answer == greedy(original, prompt, 6)
    with torch.no_grad():
        ours = decoding._logits(torch.tensor([7]), torch.tensor([44]))[0]
        tokens = torch.tensor([[*prompt, *decoding.answer[:5], 7]])
        theirs = original(tokens).logits[0, -1]
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["int8+head", "int4"])
def test_baselines_of_integers_run_the_same_weights_as_floats(name: str) -> None:
    decoder = random_decoder(
        TINY, device="cpu", dtype=torch.float32, seed=0, kind=QUANTIZATIONS[name]
    )
    model, prompt = transformers_model(decoder, torch.float32), ids(39).tolist()
    with torch.no_grad():
        ours = decoder.logits(decoder.forward(torch.tensor(prompt)))
        torch.testing.assert_close(ours, model(torch.tensor([prompt])).logits[0])
    decoding = CompiledDecoding(decoder, torch.float32, prompt, 6, lambda advance: advance)
    decoding.run()
    assert decoding.answer == greedy(model, prompt, 6)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"
)
def test_torch_compile_changes_nothing() -> None:
    original, prompt = hf_model("qwen3"), ids(39).tolist()
    decoding, dtype = compiled_decoding(our_decoder(original), prompt, 4, Silent())
    decoding.run()
    first = decoding.answer
    if dtype == torch.float32:  # the fastest dtype is the machine's
        assert first == greedy(original, prompt, 4)
    decoding.run()
    assert decoding.answer == first


def test_each_token_of_generate_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers_model(our_decoder(hf_model("llama")), torch.float32)
    for cache in ("dynamic", "static"):
        tick(monkeypatch, transformers_baseline)
        run = TransformersDecoding(model, cache, ids(10).tolist(), 6).run()
        assert run == Run(2.0, 1.0)  # the clock is read for the prompt too, before the first token


def test_transformers_runs_in_the_dtype_and_cache_that_were_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def probe(model: object, cache: str, prompt: object) -> float:
        return {("bfloat16", "static"): 1.0}.get((str(model.dtype)[6:], cache), 2.0)  # type: ignore[attr-defined]

    monkeypatch.setattr(transformers_baseline, "_probe", probe)
    decoder = our_decoder(hf_model("llama"), torch.float16)
    decoding, dtype, cache = fastest_transformers(decoder, ids(8).tolist(), 4, Silent())
    assert (dtype, cache) == (torch.bfloat16, "static")
    assert decoding._model.dtype == torch.bfloat16


def test_no_memory_for_a_second_copy_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = our_decoder(hf_model("llama"))
    for module in (transformers_baseline, compiled):
        monkeypatch.setattr(module, "available_memory", lambda device: 1000)
    with pytest.raises(TealError, match="transformers' own copy"):
        fastest_transformers(decoder, [1, 2], 4, Silent())
    with pytest.raises(TealError, match=r"torch\.compile's own copy"):
        compiled_decoding(decoder, [1, 2], 4, Silent())


def test_a_compiler_that_fails_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: object, **options: object) -> object:
        def fail(*arguments: object) -> object:
            raise RuntimeError("no C++ compiler\nand a long trace")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(TealError, match=r"RuntimeError: no C\+\+ compiler and a long trace\)"):
        compiled_decoding(our_decoder(hf_model("llama")), [1, 2], 4, Silent())
