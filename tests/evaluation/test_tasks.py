"""lm-eval's tasks on our decoder, against lm-eval's own transformers model."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark.commands import Command, is_refused
from evaluation.tasks_data import DOCUMENTS, write_group, write_task
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.evaluation import task_files, text_tasks
from teal_cli.evaluation.task_files import check_specs
from teal_cli.inference.drafters import ModelDrafter
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.generate import Token, generate
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.text.corpora import Corpus

pytest.importorskip("lm_eval")

# Four passages of three sentences, each of which ends in a word that it has had.
PROSE = "\n\n".join(
    f"The {animal} was the first to cross the {place} in that year. Nobody had seen it there\n"
    f"before the winter began. All of them said that it was a very large {animal}."
    for animal, place in (
        ("horse", "river"),
        ("camel", "desert"),
        ("goose", "street"),
        ("sheep", "bridge"),
    )
)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """The documents' cache of the `datasets` library."""
    import datasets.config

    cache = str(tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def checkpoint(home: Path, tiny_model: Path) -> Checkpoint:
    from teal_cli import pipeline
    from teal_cli.store import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(home))
        return pipeline.ensure_checkpoint(
            models.resolve(str(tiny_model)), dtype="float32", reporter=Silent()
        )


def teal_lm(
    checkpoint: Checkpoint, thresholds: Tensor | None, target: float = 0.5, **changes: Any
) -> Any:
    from teal_cli.evaluation.harness import Subject, TealLM

    settings = {"protocol": "standard", "context": 512, **changes}
    subject = Subject(
        checkpoint.load(), checkpoint.tokenizer(), checkpoint.eos_token_ids, **settings
    )
    setting = DENSE if thresholds is None else Setting("uniform", target, thresholds)
    return TealLM(subject, setting, Silent())


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


PAIRS = [("Once upon", " a time"), ("", "No context"), ("A space ", "moves"), ("Choose", "x")]


@pytest.fixture(scope="module")
def hf_lm(tiny_model: Path) -> Any:
    """lm-eval's own model for transformers."""
    pytest.importorskip("accelerate")  # which that model needs, and ours does not
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(tiny_model), device="cpu", dtype="float32", batch_size=1, max_length=64)


def test_dense_likelihoods_are_those_of_lm_evals_transformers_model(
    checkpoint: Checkpoint, hf_lm: Any
) -> None:
    ours = teal_lm(checkpoint, None).loglikelihood(requests("loglikelihood", *PAIRS))
    theirs = hf_lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy


def test_rolling_windows_are_those_of_lm_evals_transformers_model(
    checkpoint: Checkpoint, hf_lm: Any
) -> None:
    texts = [("A text that is longer than the context of 64 tokens. " * 4,), ("Short.",)]
    lm = teal_lm(checkpoint, None, context=64)
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    theirs = hf_lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", *texts), disable_tqdm=True
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_dense_answers_are_those_of_lm_evals_transformers_model(
    checkpoint: Checkpoint, hf_lm: Any
) -> None:
    asked = [(f"Say {n}", {"until": ["e"], "max_gen_toks": 9}) for n in range(4)]
    ours = teal_lm(checkpoint, None).generate_until(requests("generate_until", *asked))
    theirs = hf_lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert ours == theirs


@pytest.mark.parametrize("protocol", ["standard", "teal"])
def test_sparse_likelihoods_are_the_decoders(checkpoint: Checkpoint, protocol: str) -> None:
    thresholds = torch.full((3, 7), 0.3)
    lm = teal_lm(checkpoint, thresholds, protocol=protocol)
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", ("Some context", " and more")))
    tokenizer, decoder = checkpoint.tokenizer(), checkpoint.load()
    before, whole = (tokenizer.encode(t) for t in ("Some context", "Some context and more"))
    dense = 4 if protocol == "standard" else len(whole[:-1]) - len(whole[:-1]) // 2
    hidden = decoder.forward(torch.tensor(whole[:-1]), thresholds=thresholds, sparse_from=dense)
    scores = decoder.logits(hidden).log_softmax(-1)
    expected = sum(float(scores[i - 1, whole[i]]) for i in range(len(before), len(whole)))
    assert value == pytest.approx(expected, rel=1e-5)
    assert 0.1 < lm.realised_sparsity() < 0.9


def test_choices_of_one_token_share_a_pass(checkpoint: Checkpoint, monkeypatch: Any) -> None:
    lm = teal_lm(checkpoint, None)
    passes = []
    forward = lm._decoder.forward
    monkeypatch.setattr(
        lm._decoder, "forward", lambda *a, **k: passes.append(len(a[0])) or forward(*a, **k)
    )
    asked = [("Answer:", choice) for choice in "ABCD"]
    shared = lm.loglikelihood(requests("loglikelihood", *asked))
    assert len(passes) == 1
    alone = [lm.loglikelihood(requests("loglikelihood", pair))[0] for pair in asked]
    assert shared == alone


def test_sparse_answers_are_a_sessions(checkpoint: Checkpoint) -> None:
    thresholds = torch.full((3, 7), 0.3)
    lm = teal_lm(checkpoint, thresholds)
    asked = [(text, {"until": [], "max_gen_toks": 8}) for text in ("Say it", "Say this", "Say it")]
    answers = lm.generate_until(requests("generate_until", *asked))
    assert answers[0] == answers[2]  # nothing that was decoded is left in the cache
    tokenizer = checkpoint.tokenizer()
    setting = Setting("uniform", 0.5, thresholds)
    session = Session(checkpoint.load(), max_length=64, setting=setting)
    logits, tokens = session.prefill(tokenizer.encode("Say it")), []
    while len(tokens) < 8 and (token := int(logits.argmax())) not in checkpoint.eos_token_ids:
        tokens.append(token)
        logits = session.step(token)
    assert answers[0] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert 0.1 < lm.realised_sparsity() < 0.9


def test_answers_are_decoded_under_the_whole_setting(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    use = Session.use
    monkeypatch.setattr(
        Session, "use", lambda self, setting: (used.append(setting), use(self, setting))
    )
    lm = teal_lm(checkpoint, torch.full((3, 7), 0.3), target=0.65)
    lm.generate_until(requests("generate_until", ("Say it", {"until": [], "max_gen_toks": 2})))
    assert [setting.target_sparsity for setting in used] == [0.65]


def test_what_an_answer_decoded_is_read_anew_in_a_later_prompt(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds = torch.full((3, 7), 0.5)
    setting = Setting("uniform", 0.5, thresholds)
    session = Session(checkpoint.load(), max_length=64, setting=setting)
    first = checkpoint.tokenizer().encode("Say it")
    steps = generate(session, first, Sampler(Sampling()), max_new_tokens=16)
    said = [step.id for step in steps if isinstance(step, Token)]
    prompts = {"first": first, "second": [*first, *said, *first]}

    def answers(*asked: str) -> list[str]:
        lm = teal_lm(checkpoint, thresholds)
        monkeypatch.setattr(lm, "tok_encode", prompts.get)
        options = {"until": [], "max_gen_toks": 16}
        entries = [(name, options) for name in asked]
        found: list[str] = lm.generate_until(requests("generate_until", *entries))
        return found

    assert len(said) == 16
    assert answers("first", "second")[1] == answers("second")[0]


def test_guesses_leave_a_tasks_answers_as_they_are(checkpoint: Checkpoint) -> None:
    """They are the dense model's alone: a sparse setting guesses nothing."""

    def guess(session: Session) -> None:
        setting = Setting("uniform", 0.3, torch.full((3, 7), 0.05))
        own = Session(
            session.decoder, max_length=session.max_length, cache=session.cache, setting=setting
        )
        vocab_size = session.decoder.config.vocab_size
        drafter = ModelDrafter("self", own, vocab_size, shares_cache=True)
        session.drafting = Drafting([drafter], length=4)

    asked = requests(
        "generate_until", *[(text, {"until": ["q"], "max_gen_toks": 40}) for text in ("Say", "it")]
    )
    plain, guessed = teal_lm(checkpoint, None), teal_lm(checkpoint, None, guess=guess)
    assert guessed.generate_until(asked) == plain.generate_until(asked)
    assert 0 < guessed.guesses.accepted < guessed.guesses.guessed
    sparse = teal_lm(checkpoint, torch.full((3, 7), 0.3), guess=guess)
    sparse.generate_until(asked)
    assert sparse.guesses.rounds == 0


def test_what_does_not_fit_the_context_is_one_error(checkpoint: Checkpoint) -> None:
    lm = teal_lm(checkpoint, None, context=8)
    with pytest.raises(TealError, match="beyond the context of 8"):
        lm.loglikelihood(requests("loglikelihood", ("a", "nine bytes and more")))
    with pytest.raises(TealError, match="no room in the context of 8"):
        lm.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 8})))


def test_a_likelihood_that_is_not_finite_names_its_setting(checkpoint: Checkpoint) -> None:
    lm = teal_lm(checkpoint, torch.zeros(3, 7))
    weights = lm._decoder.weights
    lm._decoder.weights = type(weights)(
        weights.embed_tokens, weights.layers, weights.norm * 1e39, weights.lm_head
    )
    with pytest.raises(TealError, match=r"sparse model \(uniform 0\.5\) is not finite"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b")))


def test_task_files_of_every_kind_dense_and_sparse(
    evaluate: Command, tiny_model: Path, tmp_path: Path
) -> None:
    files = [write_task(tmp_path, kind) for kind in ("choice", "rolling", "answer")]
    saved = tmp_path / "tasks.json"
    code, out, _ = evaluate(
        *(tiny_model, "-s", "0.5", "--method", "uniform,sensitivity", "--limit", 4, "-q"),
        *("--tasks", ",".join(map(str, files)), "--output", saved),
    )
    assert code == 0
    assert "tiny_choice: 4 documents" in out
    assert "bootstrapping" not in out
    document = json.loads(saved.read_text())
    assert document["kind"] == "tasks"
    assert document["lm_eval"]
    assert len(document["tasks"]["tiny_choice"]["fingerprint"]) == 64
    scores = {(s["task"], s["metric"], s["method"]): s for s in document["scores"]}
    for method in ("dense", "uniform", "sensitivity"):
        accuracy = scores["tiny_choice", "acc", method]
        assert accuracy["value"] == pytest.approx(sum(accuracy["by_document"]) / 4)
        assert scores["tiny_rolling", "word_perplexity", method]["value"] > 1
        assert 0 <= scores["tiny_answer", "exact_match", method]["value"] <= 1
    assert scores["tiny_choice", "acc", "dense"]["to_dense"] is None
    assert scores["tiny_choice", "acc", "uniform"]["to_dense_standard_error"] is not None
    assert scores["tiny_choice", "acc", "uniform"]["realised_sparsity"] > 0.2


def test_worked_examples_come_before_each_document(
    evaluate: Command, tiny_model: Path, tmp_path: Path
) -> None:
    task = write_task(tmp_path, "choice")
    found = {}
    for number in (None, 0, 2):
        given = () if number is None else ("--num-fewshot", number)
        _, out, _ = evaluate(tiny_model, "--tasks", task, "-s", "0.5", "--json", *given)
        found[number] = json.loads(out)
        assert found[number]["num_fewshot"] == number
    about = {number: found[number]["tasks"]["tiny_choice"] for number in found}
    assert about[0]["few_shot"] == about[None]["few_shot"] == 0
    assert about[2]["few_shot"] == 2
    assert about[0]["fingerprint"] == about[None]["fingerprint"] != about[2]["fingerprint"]


def test_a_group_is_shown_for_its_tasks(
    evaluate: Command, tiny_model: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "group.csv"
    group = write_group(tmp_path)
    code, out, _ = evaluate(tiny_model, "--tasks", group, "-s", "0.5", "--output", saved)
    assert code == 0
    assert "tiny_group: a group of 2 tasks" in out
    assert "tiny_one" not in out
    rows = list(csv.DictReader(saved.read_text().splitlines()))
    acc = {(r["task"], r["method"]): float(r["value"]) for r in rows if r["metric"] == "acc"}
    for method in ("dense", "sensitivity"):
        parts = [acc[f"tiny_group::tiny_{name}", method] for name in ("one", "two")]
        assert acc["tiny_group", method] == pytest.approx(sum(parts) / 2)


def test_a_task_that_shuffles_does_so_alike_for_every_setting(
    evaluate: Command, tiny_model: Path, tmp_path: Path
) -> None:
    task = write_task(tmp_path, "choice")
    task.write_text(task.read_text() + "process_docs: !function shuffled.shuffle\n")
    (tmp_path / "shuffled.py").write_text(
        "import random\n\n\ndef shuffle(documents):\n"
        "    return documents.select(random.sample(range(len(documents)), len(documents)))\n"
    )
    code, out, _ = evaluate(tiny_model, "--tasks", task, "-s", "0", "--json")
    assert code == 0
    dense, exact = (s for s in json.loads(out)["scores"] if s["metric"] == "acc")
    assert exact["by_document"] == dense["by_document"]
    assert len(set(dense["by_document"])) == 2  # so that another order would show
    assert exact["to_dense"] == exact["to_dense_standard_error"] == 0


def test_accuracy_is_the_share_of_likeliest_choices(
    evaluate: Command, tiny_model: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    task = write_task(tmp_path, "choice")
    _, out, _ = evaluate(
        *(tiny_model, "--tasks", task, "-s", "0.5", "--dtype", "float32", "--json")
    )
    scores = json.loads(out)["scores"]
    (dense,) = (s for s in scores if (s["method"], s["metric"]) == ("dense", "acc"))
    lm, right = teal_lm(checkpoint, None), []
    for document in DOCUMENTS:
        pairs = [(document["question"], " " + choice) for choice in document["choices"]]
        values = [value for value, _ in lm.loglikelihood(requests("loglikelihood", *pairs))]
        right.append(float(values.index(max(values)) == document["gold"]))
    assert dense["by_document"] == right


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tasks", "./missing.yaml"), 3, "there is no task file"),
        (("--tasks", "BROKEN"), 1, "cannot be loaded"),
        (("--tasks", ","), 2, "--tasks names nothing"),
        (("--tasks", "arc_easi"), 2, "lm-eval has no task 'arc_easi' Near it: arc_easy"),
        (("--tasks", "text_last_words"), 2, "Near it: text_last_word"),
        (("--tasks", "arc_easy", "--dataset", "pydoc"), 2, "--dataset is for perplexity"),
        (("--tasks", "x.yaml", "--dataset", "pydoc"), 2, "--dataset is for perplexity"),
        (("--tasks", "x.yaml", "--plot", "a.png"), 2, "--plot is for perplexity"),
        (("--tasks", "BROKEN", "--context", "513"), 2, "out of range"),
        (("--limit", "3"), 2, "it needs --tasks"),
        (("--num-fewshot", "3"), 2, "it needs --tasks"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_sentence(
    evaluate: Command,
    tiny_model: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\noutput_type: no_such_type\n")
    given = [str(broken) if argument == "BROKEN" else argument for argument in arguments]
    is_refused(evaluate(tiny_model, *given), code, message)


def test_an_unknown_name_is_refused_before_a_model_is_loaded(
    evaluate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is lm-eval's index read, which takes half a minute."""
    called: list[str] = []
    for place in ("pipeline.ensure_checkpoint", "evaluation.task_files.task_manager"):
        monkeypatch.setattr(f"teal_cli.{place}", lambda *a, _at=place, **k: called.append(_at))
    is_refused(evaluate("demo", "--tasks", "arc_easy,nope"), 2, "lm-eval has no task 'nope'")
    assert not called


def test_names_of_every_kind_are_found_without_the_index() -> None:
    """A task, a group, a tag by itself and in a list, and a task that has a class."""
    check_specs(("arc_easy", "mmlu", "ai2_arc", "lambada", "squadv2", "text_copying"))


def test_tasks_are_made_from_the_text(evaluate: Command, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    options = (tiny_model, "-s", "0.5", "--limit", 2, "--dataset", text, "--json")
    code, out, said = evaluate(*options, "--tasks", "text")
    assert code == 0, said
    document = json.loads(out)
    assert list(document["tasks"]) == list(text_tasks.TASKS)
    assert document["dataset"]["name"] == str(text)
    assert all(len(score["by_document"]) == 2 for score in document["scores"])
    about = document["tasks"]["text_next_sentence"]
    assert about["config"]["output_type"] == "multiple_choice"
    _, again, _ = evaluate(*options, "--tasks", "text_next_sentence")
    assert json.loads(again)["tasks"] == {"text_next_sentence": about}

    missing = evaluate(tiny_model, "--tasks", "text", "--dataset", tmp_path / "none.txt")
    is_refused(missing, 3, "none.txt")


def test_what_a_made_task_asks() -> None:
    corpus = Corpus("prose", (PROSE,), "f")
    (last, *_) = text_tasks.make("text_last_word", corpus)
    assert f"{last['text']} {last['target']}." in PROSE.replace("\n", " ")
    assert last["target"] in last["text"]
    for document in text_tasks.make("text_next_sentence", corpus):
        before, after = document["text"], document["choices"][document["gold"]]
        assert f"{before} {after}" in PROSE.replace("\n", " ")
        assert len(set(document["choices"])) == 4
    copied = text_tasks.make("text_copying", corpus)[0]
    said, again = copied["text"].split("\n")
    listed = said.removeprefix("First list: ").removesuffix(".")
    assert f"{again.removeprefix('The same list again: ')} {copied['target']}" == listed
    for document in text_tasks.make("text_arithmetic", corpus):
        lines = (document["text"] + " " + document["target"]).splitlines()
        for a, b, total in (map(int, re.findall(r"\d+", line)) for line in lines):
            assert a + b == total
    with pytest.raises(TealError, match="too little prose for the task text_last_word"):
        text_tasks.make("text_last_word", Corpus("short", ("Nothing.",), "f"))


def test_a_made_target_is_words_of_its_own() -> None:
    document = {"text": "First: a, b. Again: a,", "target": "b"}
    task = task_files._task("text_copying", [document])
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(rank=0, world_size=1)
    assert [request.args for request in task.instances] == [("First: a, b. Again: a,", " b")]


def test_without_lm_eval_the_hint_is_the_extra(
    evaluate: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal_cli.evaluation.tasks.find_spec", lambda name: None)
    code, out, said = evaluate(tiny_model, "--tasks", "arc_easy")
    assert (code, out) == (3, "")
    assert "pip install 'teal-cli[eval]'" in said


def test_perplexity_does_not_import_lm_eval(evaluate: Command, tiny_model: Path) -> None:
    before = {name for name in sys.modules if name.startswith("lm_eval")}
    evaluate(tiny_model, "--dataset", "pydoc", "--context", 64, "--samples", 1, "-s", "0.5")
    assert {name for name in sys.modules if name.startswith("lm_eval")} == before
