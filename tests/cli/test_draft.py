"""`--draft` as a user says it: the dense model's answers, and what cannot guess for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from benchmark.commands import Command, is_refused, prepare, runner

from teal_cli import drafts
from teal_cli.benchmark.bench import Settings
from teal_cli.benchmark.subject import text_prompt
from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.pace import Pace

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """One home for the whole module, so that each model is made once."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(home))
        prepare(tiny_model)
    return home


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the same tokenizer, and a shorter context."""
    folder = tmp_path_factory.mktemp("small") / "tiny-small"
    return tiny.write_model(folder, num_hidden_layers=1, max_position_embeddings=64, seed=3)


@pytest.fixture
def command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("TEAL_HOME", str(home))
    # On a model this small nothing pays.
    monkeypatch.setattr(Pace, "length", lambda pace, most: 4)

    def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        return runner(name, monkeypatch, capsys)(*arguments)

    return run


@pytest.mark.parametrize("draw", [("-t", "0"), ("-t", "1.2", "--seed", "5", "--top-p", "0.9")])
@pytest.mark.parametrize("draft", ["lookup", "self", "self:int8", "lookup,small", "small:int8"])
def test_an_answer_is_the_dense_models(
    command: Command, tiny_model: Path, small: Path, draft: str, draw: tuple[str, ...]
) -> None:
    draft = draft.replace("small", str(small))
    options = (tiny_model, "-p", "ab ab ab", "-n", "80", "--json", *draw)
    code, expected, _ = command("chat", *options, "-s", "0")
    assert code == 0
    code, out, _ = command("chat", *options, "--draft", draft)
    assert code == 0
    said, dense = json.loads(out), json.loads(expected)
    assert (said["answer"], said["finish_reason"]) == (dense["answer"], dense["finish_reason"])
    assert (said["sparsity"], said["realised_sparsity"], dense["draft"]) == (0, None, None)
    assert said["draft"]["name"].startswith(draft)
    assert said["draft"]["sparsity"] == (0 if draft == "lookup" else 0.25)
    if draft != "lookup":
        assert said["draft"]["guessed"] > 20
        assert said["draft"]["tokens_per_round"] >= 1


def test_statistics_say_what_guesses_brought(command: Command, tiny_model: Path) -> None:
    _, _, said = command("chat", tiny_model, "-p", "Hello", "-n", "40", "--draft", "self")
    assert " guesses right, " in said.splitlines()[-1]
    assert " tokens a round" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draft", ""), "--draft names nothing"),
        (("--draft", "self,other"), "takes one model"),
        (("--draft", "no such model"), "there is no model"),
        (("--draft", "self:int3"), "there is no quantization 'int3'"),
        (("--draft", "lookup", "-s", "0.4"), "model that checks guesses is dense"),
        (("--draft", "self", "-s", "0", "--dtype", "float32"), "nothing would be faster"),
        (("--draft", "self", "--compare"), "nothing to --compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_guess_is_refused(
    command: Command, tiny_model: Path, options: tuple[str, ...], message: str
) -> None:
    code = 3 if message.startswith("there is no model") else 2
    is_refused(command("chat", tiny_model, "-p", "Hi", *options), code, message)


def test_a_larger_model_and_another_vocabulary_are_refused(
    command: Command, tiny_model: Path, small: Path, tmp_path: Path
) -> None:
    outcome = command("chat", small, "-p", "Hi", "--draft", tiny_model, "-s", "0")
    is_refused(outcome, 2, "has to be the smaller one")
    other = tiny.write_model(tmp_path / "other", num_hidden_layers=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = command("chat", tiny_model, "-p", "Hi", "--draft", other, "-s", "0")
    is_refused(outcome, 2, "vocabularies are not the same (2 of 259 tokens differ)")


def test_memory_that_is_not_there_is_said_with_the_figure(
    command: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "available_memory", lambda device: 1000)
    outcome = command("chat", tiny_model, "-p", "Hi", "--draft", "self:int8")
    is_refused(outcome, 1, "to guess for it needs 0.0 GB of memory, and 0.0 GB are free")


def test_the_guesser_is_not_the_last_model_used(
    command: Command, tiny_model: Path, small: Path
) -> None:
    command("chat", tiny_model, "-p", "Hi", "-n", "4", "--draft", small)
    assert (
        command("chat", "-p", "Hi", "-n", "4", "-s", "0", "--json")[1].count(tiny_model.name) == 1
    )


@pytest.mark.parametrize("more", [(), ("--random-weights",)], ids=["own", "random"])
def test_bench_measures_guesses(command: Command, tiny_model: Path, more: tuple[str, ...]) -> None:
    options = (tiny_model, *more, "--draft", "self:int8", "-s", "0,0.3", "--acceptance", "0.8")
    code, out, said = command("bench", *options, "-n", "60", "--repeats", "1", "--json")
    assert code == 0, said
    found = json.loads(out)
    rows = found["rows"]
    assert [row["label"] for row in rows] == ["dense", "self:int8 dense", "self:int8 0.3"]
    assert [row["kind"] for row in rows] == ["dense", "draft", "draft"]
    for row in rows[1:]:
        assert 0.6 < row["acceptance"] < 0.95
        assert 2 < row["tokens_per_round"] < 5
        assert "dense" in row["speedup"]
    assert any("assumed" in note for note in found["notes"])


def test_bench_asks_for_a_copy_as_a_chat_does(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    settings = Settings(copy=True)
    asked = tokenizer.decode(text_prompt(tokenizer, settings))
    assert 'only replace "butter" with "oil"' in asked
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    page = asked[asked.index("Repeat the following") : asked.index("fresh herbs.") + 12]
    assert asked == template.render([{"role": "user", "content": page}])
    tokenizer.chat_template = None
    assert tokenizer.decode(text_prompt(tokenizer, settings)).startswith("Repeat the following")
    assert len(text_prompt(tokenizer, Settings(prompt_tokens=500))) == 500


def test_bench_wants_to_know_what_random_weights_guess(command: Command, tiny_model: Path) -> None:
    outcome = command("bench", tiny_model, "--random-weights", "--draft", "self")
    is_refused(outcome, 2, "with random weights no guess is right")
    outcome = command("bench", tiny_model, "--acceptance", "0.8")
    is_refused(outcome, 2, "--acceptance is of guesses")
    outcome = command("bench", tiny_model, "--random-weights", "--copy")
    is_refused(outcome, 2, "random weights copy nothing")


def test_bench_measures_copies(command: Command, tiny_model: Path) -> None:
    options = ("--copy", "--draft", "lookup", "-n", "20", "--repeats", "1", "--json")
    code, out, said = command("bench", tiny_model, *options)
    assert code == 0, said
    found = json.loads(out)
    assert found["settings"]["prompt_tokens"] > 400  # a byte is a token here
    assert [row["label"] for row in found["rows"]] == ["dense", "lookup"]


def test_eval_of_text_has_nothing_to_guess(command: Command, tiny_model: Path) -> None:
    is_refused(command("eval", tiny_model, "--draft", "self"), 2, "--draft is about tasks")
