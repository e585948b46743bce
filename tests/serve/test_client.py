"""The server as the `openai` client sees it; transformers says what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serve.conftest import NAME, Running, Serve

openai = pytest.importorskip("openai")

TURN = [{"role": "user", "content": "Grüße"}]


@pytest.fixture(scope="module")
def running(serve: Serve) -> Running:
    return serve()


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Any:
    """What transformers answers: text, tokens and log probabilities, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def answer(prompt: str | list[dict[str, str]], tokens: int, **options: Any) -> Any:
        if isinstance(prompt, str):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(
            ids,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        new = made.sequences[0, ids.shape[1] :]
        logprobs = torch.log_softmax(torch.cat(made.logits).float(), -1)
        text = tokenizer.decode(new, skip_special_tokens=True)
        return text, logprobs[range(len(new)), new].tolist(), logprobs

    return answer


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:dense"]
    assert client.models.retrieve(f"{NAME}:0.3").id == f"{NAME}:0.3"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("gpt-4o")
    assert found.value.code == "model_not_found"


def test_a_chat_is_answered_as_by_transformers(client: Any, oracle: Any) -> None:
    text, logprobs, every = oracle(TURN, 12)
    answer = client.chat.completions.create(
        model=NAME, messages=TURN, max_tokens=12, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.message.content.split() == text.split()
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    found = choice.logprobs.content
    assert [entry.logprob for entry in found] == pytest.approx(logprobs, abs=1e-4)
    for entry, row in zip(found, every, strict=True):
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    said = b"".join(bytes(entry.bytes) for entry in found)
    assert said.decode("utf-8", "replace").strip() == choice.message.content.strip()
    assert answer.usage.completion_tokens == 12


def test_a_text_is_continued_as_by_transformers(client: Any, oracle: Any) -> None:
    text, logprobs, _ = oracle("Hello there", 16)
    answer = client.completions.create(model=NAME, prompt="Hello there", logprobs=1)
    assert answer.choices[0].text == text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    tokens = [*b"Hello there"]  # bytes, which are no tokens of the vocabulary as they are
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=NAME, prompt=[*tokens, 100_000])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5, "top_p": 0.9}])
def test_a_stream_says_what_the_whole_answer_says(client: Any, options: dict[str, Any]) -> None:
    asked = {"model": NAME, "messages": TURN, "max_tokens": 20, "logprobs": True, **options}
    whole = client.chat.completions.create(**asked)
    chunks = [
        *client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    ]
    *steps, usage = chunks
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert steps[0].choices[0].delta.role == "assistant"
    said = "".join(step.choices[0].delta.content or "" for step in steps)
    assert said == whole.choices[0].message.content
    assert [step.choices[0].finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    entries = [e for s in steps if s.choices[0].logprobs for e in s.choices[0].logprobs.content]
    assert [e.token for e in entries] == [e.token for e in whole.choices[0].logprobs.content]
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_stream_too(client: Any) -> None:
    whole = client.completions.create(model=NAME, prompt="Hello", max_tokens=9)
    steps = [*client.completions.create(model=NAME, prompt="Hello", max_tokens=9, stream=True)]
    assert "".join(step.choices[0].text for step in steps) == whole.choices[0].text


def test_stop_texts_end_an_answer(client: Any) -> None:
    asked = {"model": NAME, "prompt": "Hello", "max_tokens": 16}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[6:8]
    for given in (stop, ["never said", stop]):
        answer = client.completions.create(**asked, stop=given).choices[0]
        assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_penalties_are_transformers_and_openais(client: Any, oracle: Any) -> None:
    text, *_ = oracle("Hello", 24, repetition_penalty=1.3)
    asked = {"model": NAME, "prompt": "Hello", "max_tokens": 24}
    answer = client.completions.create(**asked, extra_body={"repetition_penalty": 1.3})
    assert answer.choices[0].text == text
    for presence, frequency in ((1.5, 0.0), (0.0, 0.7), (-0.5, 0.2)):

        def penalised(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times = torch.bincount(ids[0, len("Hello") :], minlength=scores.shape[1])
            return scores - frequency * times - presence * (times > 0)  # noqa: B023

        text, logprobs, _ = oracle("Hello", 24, logits_processor=[penalised])
        answer = client.completions.create(
            **asked, presence_penalty=presence, frequency_penalty=frequency, logprobs=0
        )
        assert answer.choices[0].text == text
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)


def test_sparsity_is_the_requests_own(client: Any) -> None:
    asked = {"messages": TURN, "max_tokens": 12}

    def answer(model: str, **extra: Any) -> Any:
        return client.chat.completions.create(model=model, **asked, extra_body=extra)

    tagged, given = answer(f"{NAME}:0.3"), answer(NAME, sparsity=0.3)
    assert tagged.choices[0].message.content == given.choices[0].message.content
    assert tagged.usage.sparsity == given.usage.sparsity > 0
    assert answer(f"{NAME}:dense").usage.sparsity is None
    with pytest.raises(openai.BadRequestError, match="leave one out"):
        answer(f"{NAME}:0.3", sparsity=0.2)


def test_a_served_sparsity_is_what_plain_requests_get(serve: Serve) -> None:
    running = serve(sparsity=0.3)
    client = openai.OpenAI(base_url=running.url, api_key="none")
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:0.3", f"{NAME}:dense"]
    answers = {
        model: client.completions.create(model=model, prompt="Hello")
        for model in (NAME, f"{NAME}:0.3", f"{NAME}:dense")
    }
    assert answers[NAME].usage.sparsity == answers[f"{NAME}:0.3"].usage.sparsity > 0
    assert answers[f"{NAME}:dense"].usage.sparsity is None


def test_a_model_without_thresholds_is_dense(serve: Serve) -> None:
    client = openai.OpenAI(base_url=serve(profile=False).url, api_key="none")
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.completions.create(model=f"{NAME}:dense", prompt="Hello").usage.sparsity is None
    with pytest.raises(openai.BadRequestError, match="teal calibrate"):
        client.completions.create(model=f"{NAME}:0.3", prompt="Hello")


def test_a_conversation_that_goes_on_reads_its_new_part_only(client: Any) -> None:
    first = client.chat.completions.create(model=NAME, messages=TURN, max_tokens=10)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    other = [{"role": "user", "content": "Something else altogether"}]
    client.chat.completions.create(model=NAME, messages=other, max_tokens=10)
    turns = [*TURN, said, {"role": "user", "content": "And then?"}]
    usage = client.chat.completions.create(model=NAME, messages=turns, max_tokens=4).usage
    known = usage.prompt_tokens_details.cached_tokens
    assert known >= first.usage.prompt_tokens
    assert usage.prompt_tokens > known


def test_a_prompt_beyond_the_context_is_openais_error(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt="x" * 401)
    assert error.value.code == "context_length_exceeded"
    answer = client.completions.create(model=NAME, prompt="x" * 395, max_tokens=100).choices[0]
    assert answer.finish_reason in ("length", "stop")


def test_what_is_not_there_is_refused_by_name(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for options in (
        {"tools": [tool]},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"logit_bias": {"1": 5}},
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model=NAME, messages=TURN, **options)
        assert error.value.param == next(iter(options))
        assert error.value.type == "invalid_request_error"


def test_a_base_model_continues_texts_only(serve: Serve) -> None:
    client = openai.OpenAI(base_url=serve(chat=False).url, api_key="none")
    assert client.completions.create(model=NAME, prompt="Hello").choices[0].text
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model=NAME, messages=TURN)


def test_a_request_can_have_guesses_or_none(serve: Serve, client: Any, oracle: Any) -> None:
    from teal_cli.inference.drafters import Lookup
    from teal_cli.inference.drafting import Drafting

    drafting = Drafting([Lookup()], length=4)
    guessed = openai.OpenAI(
        base_url=serve(drafting=drafting, draft="lookup").url, api_key="none", max_retries=0
    )
    text = "one two three one two three one two three"

    def ask(at: Any, **body: Any) -> Any:
        return at.completions.create(
            model=NAME, prompt=text, temperature=0, max_tokens=20, extra_body=body
        )

    expected, *_ = oracle(text, 20)
    for body, drafted in (({}, True), ({"draft": "lookup"}, True), ({"draft": "none"}, False)):
        answer = ask(guessed, **body)
        assert answer.choices[0].text == expected
        counted = answer.usage.completion_tokens_details.accepted_prediction_tokens
        assert (counted is not None) == drafted
    assert drafting.counts.guessed > 0
    sparse = ask(guessed, sparsity=0.3)  # which nothing guesses for
    assert sparse.usage.completion_tokens_details.accepted_prediction_tokens is None
    for at, body, words in (
        (guessed, {"draft": "lookup", "sparsity": 0.3}, "has to be dense"),
        (guessed, {"draft": "lookup", "logprobs": 1}, "log probabilities"),
        (guessed, {"draft": "self"}, "draft is 'lookup' here"),
        (client, {"draft": "lookup"}, "nothing guesses here"),
        (client, {"draft": 3}, "draft"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(at, **body)
