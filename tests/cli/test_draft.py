"""`--draft` as a user says it: the dense model's answers, and what cannot guess for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from benchmark.commands import Command, is_refused, prepare, runner
from evaluation.tasks_data import write_task

from teal_cli import pipeline
from teal_cli.benchmark import subject
from teal_cli.benchmark.bench import Settings
from teal_cli.benchmark.cost import weight_bytes
from teal_cli.benchmark.subject import text_prompt
from teal_cli.drafts import ready
from teal_cli.drafts.names import Wanted
from teal_cli.drafts.pairs import check_vocabularies
from teal_cli.errors import UsageError
from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.pace import Pace
from teal_cli.model.quantization import quantization
from teal_cli.progress import Silent
from teal_cli.sparsity.profile import Profile
from teal_cli.store import models

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
        (("--draft", "lokup"), "there is no model 'lokup' Did you mean lookup?"),
        (("--draft", "lookup:int8"), "lookup is text, which no integers make smaller"),
        (("--draft", ":int8"), "names no model before :int8"),
        (("--draft", "self", "--quantize", "int8", "-s", "0"), "nothing would be faster"),
        (("--draft", "self:int8", "--quantize", "int8+head"), "has to be the smaller one"),
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
    is_refused(outcome, 2, "vocabularies are not the same (2 of 259 tokens differ, as 'A')")
    # Told before rounding takes its time, and the next chat is not with what was refused.
    command("chat", tiny_model, "-p", "Hi", "-n", "2", "-s", "0")
    outcome = command("chat", tiny_model, "-p", "Hi", "--draft", f"{other}:int4")
    is_refused(outcome, 2, "vocabularies are not the same")
    assert pipeline.stored_checkpoint(models.resolve(str(other)), None, "int4") is None
    assert models.last_used() == models.resolve(str(tiny_model))


@pytest.mark.parametrize("draft", ["self:int4", "small:int4"])
def test_memory_that_is_not_there_is_said_with_the_figure_and_nothing_made(
    command: Command,
    tiny_model: Path,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    draft: str,
) -> None:
    monkeypatch.setattr(ready, "available_memory", lambda device: 1000)
    named = draft.replace("small", str(small))
    outcome = command("chat", tiny_model, "-p", "Hi", "--draft", named)
    is_refused(outcome, 1, "to guess for it needs 0.0 GB of memory, and 0.0 GB are free")
    ref = models.resolve(str(small if draft.startswith("small") else tiny_model))
    assert pipeline.stored_checkpoint(ref, None, "int4") is None


def test_what_memory_is_reckoned_is_what_a_form_takes(tiny_model: Path, home: Path) -> None:
    ref = models.resolve(str(tiny_model))
    floats = pipeline.ensure_checkpoint(ref, reporter=Silent())
    for form in (None, "int8", "int8+head"):
        made = pipeline.ensure_checkpoint(ref, quantize=form, reporter=Silent())
        reckoned = weight_bytes(made.config, floats.dtype.itemsize, quantization(form))
        assert reckoned == pytest.approx(made.nbytes, rel=0.02)


def test_a_form_that_does_not_fit_leaves_guessing_to_the_weights_that_check(
    command: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = models.resolve(str(tiny_model))
    pipeline.ensure_checkpoint(ref, quantize="int8+head", reporter=Silent())
    options = ("-p", "Hi", "-n", "8", "--json", "--draft", "self")
    code, out, said = command("chat", tiny_model, *options)
    assert "is here and guesses" in said
    assert json.loads(out)["draft"]["name"] == "self:int8+head"
    monkeypatch.setattr(ready, "available_memory", lambda device: 1000)
    code, out, said = command("chat", tiny_model, *options)
    assert code == 0, said
    assert json.loads(out)["draft"]["name"] == "self"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" Lookup , SELF ", "lookup,self"),
        ("self:int8,lookup,lookup", "lookup,self:int8"),
        ("Org/Self", "Org/Self"),
        ("a/b:int4-128+head", "a/b:int4-128+head"),
        ("a:b", "a:b"),
    ],
)
def test_a_list_names_what_guesses(text: str, name: str) -> None:
    assert Wanted.parse(text).name == name


def test_a_models_own_name_is_self(command: Command, tiny_model: Path) -> None:
    options = (tiny_model, "-p", "Hi", "-n", "8", "--json", "--draft")
    for form in ("", ":int8"):
        said = json.loads(command("chat", *options, f"{tiny_model}{form}")[1])
        assert said["draft"]["name"].startswith(f"self{form}")


@pytest.mark.parametrize("name", ["chat", "bench"])
@pytest.mark.parametrize(
    ("options", "code"),
    [(("--draft", "no/such/model"), 3), (("--draft", "lookup", "-s", "0.4"), 2)],
    ids=["missing", "text"],
)
def test_what_cannot_guess_is_told_before_a_model_is_made(
    command: Command,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: tuple[str, ...],
    code: int,
) -> None:
    monkeypatch.setattr(pipeline, "ensure_checkpoint", pytest.fail)
    prompt = ("-p", "Hi") if name == "chat" else ()
    assert command(name, tiny_model, *prompt, *options)[0] == code


def test_tokens_that_fill_up_a_vocabulary_do_not_count(tiny_model: Path) -> None:
    """A GGUF file has one for every row of the embedding, which families pad differently."""
    from transformers import AutoTokenizer

    plain, filled, other = (AutoTokenizer.from_pretrained(tiny_model) for _ in range(3))
    filled.add_tokens(["[PAD259]", "[PAD260]"])
    check_vocabularies(filled, plain, "small", "large")
    other.add_tokens(["<tool>"])
    with pytest.raises(UsageError, match=r"it has 260 tokens, not 259, as '<tool>'"):
        check_vocabularies(other, filled, "small", "large")


@pytest.mark.parametrize("name", ["chat", "bench"])
def test_guesses_go_without_vectors_where_asked(
    command: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen, setting = [], Profile.setting

    def noted(profile: Profile, *arguments: Any, **more: Any) -> Any:
        seen.append(more.get("recover", True))
        return setting(profile, *arguments, **more)

    monkeypatch.setattr(Profile, "setting", noted)
    options = ("-p", "Hi") if name == "chat" else ("--repeats", "1")
    for more in ((), ("--no-recover",)):
        command(name, tiny_model, *options, "-n", "4", "--draft", "self", "-s", "0.3", *more)
    assert seen == [True, False]


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


def test_bench_wants_to_know_what_random_weights_guess(
    command: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "random_decoder", pytest.fail)  # told before they are made
    options = (tiny_model, "--random-weights", "--draft")
    is_refused(command("bench", *options, "self"), 2, "with random weights no guess is right")
    known = ("--acceptance", "0.8")
    is_refused(command("bench", *options, "no-shape", *known), 2, "'no-shape' is none")
    is_refused(command("bench", *options, "llama-3.2-1b", *known), 2, "has to be the smaller one")
    is_refused(command("bench", *options, "lookup", "-s", "0.4"), 2, "nothing to make sparse")
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsity", "0.3,0.4"), "--draft guesses at one sparsity: name one"),
        (("--method", "uniform,greedy"), "--draft guesses at one method: name one"),
    ],
)
def test_tasks_have_guesses_of_one_kind(
    command: Command, tiny_model: Path, options: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("lm_eval")
    outcome = command("eval", tiny_model, "--tasks", "text", "--draft", "self", *options)
    is_refused(outcome, 2, message)


@pytest.mark.parametrize(
    ("kind", "told"),
    [("choice", "self guessed nothing: "), ("answer", "Answers were guessed by self: ")],
)
def test_eval_says_what_was_guessed(
    command: Command, tiny_model: Path, tmp_path: Path, kind: str, told: str
) -> None:
    pytest.importorskip("lm_eval")
    task = write_task(tmp_path, kind)
    options = ("--tasks", str(task), "--draft", "self", "-s", "0.3", "--limit", "2")
    code, out, said = command("eval", tiny_model, *options)
    assert code == 0, said
    assert told in out
