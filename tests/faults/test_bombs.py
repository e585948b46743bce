"""Small files and texts that ask for endless work: refused in time, and their neighbours taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from teal_cli.bounded import Bounded, Exceeded, Refused
from teal_cli.errors import TealError, UsageError
from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.conversation import Conversation
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.random_weights import random_decoder
from teal_cli.model.tokenizer import MOST_CHARACTERS, complete_tokenizer, load_tokenizer

USER = [{"role": "user", "content": "Hello"}]
SAYS = "{{ messages[-1].content }}"
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing bounds a call on Windows")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_tokenizer(tmp_path)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rendered(folder: Path, source: str) -> str:
    tokenizer = load_tokenizer(folder, "tiny")
    tokenizer.chat_template = source
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    return template.render(USER)


@forks
@pytest.mark.parametrize(
    ("bomb", "harmless", "text"),
    [
        ("{{ '%1000000000d' % 3 }}", "{{ '%4d' % 3 }}", "   3"),
        ("{{ 'ab' * 10**9 }}", "{{ 'ab' * 3 }}", "ababab"),
        ("{{ 'a' | center(10**9) }}", "{{ 'a' | center(3) }}", " a "),
        ("{{ '{:>1000000000}'.format(1) }}", "{{ '{:>3}'.format(1) }}", "  1"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ n.x }}",
            "{% set n = namespace(x='ab') %}{% for i in range(1) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ n.x }}",
            "abab",
        ),
        ("{{ 'a' * 5000000 }}", "{{ 'a' * 10 }}", "a" * 10),
    ],
    ids=["format", "times", "filter", "method", "doubling", "long"],
)
def test_a_template_that_asks_for_too_much(
    bomb: str, harmless: str, text: str, folder: Path
) -> None:
    assert rendered(folder, harmless + SAYS) == f"{text}Hello"
    began_s = time.monotonic()
    with pytest.raises(TealError, match=r"MB of memory|text of 5,000,005 characters"):
        rendered(folder, bomb + SAYS)
    assert time.monotonic() - began_s < 30


def _work(what: str) -> Any:
    if what == "loop":
        while True:
            pass
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        return len(bytes(10**9))
    if what == "fail":
        raise KeyError(what)
    return what * 2, os.getpid()


@forks
def test_a_bounded_call_ends_whatever_it_does_and_the_next_one_works() -> None:
    work = Bounded(_work, what="the work", seconds=0.5)
    for bomb, why in [
        ("loop", "the work takes more than 0.5 s"),
        ("crash", "the work makes the process that reads it crash"),
        ("memory", "the work takes more than 256 MB of memory"),
    ]:
        with pytest.raises(Exceeded, match=why):
            work(bomb)
    with pytest.raises(Refused, match="'fail'"):
        work("fail")
    (first, process), (second, same) = work("ab"), work("c")
    assert (first, second, process) == ("abab", "cc", same)
    assert process != os.getpid()
    work.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@forks
def test_a_bounded_call_is_broken_off_by_ctrl_c_and_leaves_nothing_behind() -> None:
    script = (
        "import time; from teal_cli.bounded import Bounded\n"
        "def work():\n    print('begun', flush=True)\n    print(sum(range(10**12)))\n"
        "try:\n    Bounded(work, what='it', seconds=600)()\n"
        "except KeyboardInterrupt:\n    print('ended')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "ended\n"  # the pipe's end: no process holds it


def doubling(times: int, letter: str = "a") -> list[dict[str, Any]]:
    step = {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}
    return [step] * times


@forks
@pytest.mark.parametrize(
    ("bomb", "harmless"),
    [
        [
            {"normalizer": {"type": "Sequence", "normalizers": doubling(times, letter)}}
            for times in (many, 1)
        ]
        for many, letter in ((14, "a"), (14, "ß"), (40, "ß"))
    ],
    ids=["letter", "rare letter", "endless"],
)
def test_a_tokenizer_that_makes_much_of_little(
    bomb: dict[str, Any], harmless: dict[str, Any], folder: Path
) -> None:
    original = (folder / "tokenizer.json").read_text()
    change(folder, **harmless)
    complete_tokenizer(folder, "tiny")
    (folder / "tokenizer.json").write_text(original)
    change(folder, **bomb)
    with pytest.raises(TealError, match=r"the tokenizer of tiny (makes|takes)"):
        complete_tokenizer(folder, "tiny")


BACKTRACKING = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": "(a|aa)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
PANICS = "a" * 100 + "b"


def conversation(folder: Path, **options: Any) -> Conversation:
    tokenizer = load_tokenizer(folder, "tiny")
    config = ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
        }
    )
    decoder = random_decoder(config, device="cpu", dtype=torch.float32, seed=0)
    session = Session(decoder, max_length=512, backend="reference")
    sampler = Sampler(Sampling(temperature=0.0))
    return Conversation(session, tokenizer, sampler, stop_token_ids=(), **options)


def test_a_panic_of_the_tokenizer_is_a_sentence_and_the_conversation_goes_on(folder: Path) -> None:
    change(folder, pre_tokenizer=BACKTRACKING)
    talk = conversation(folder)
    list(talk.answer("Hi", max_new_tokens=2))
    before = talk.messages
    with pytest.raises(TealError, match="the model's tokenizer breaks down"):
        list(talk.answer(PANICS, max_new_tokens=2))
    assert talk.messages == before
    list(talk.answer("And now?", max_new_tokens=2))
    assert len(talk.messages) == len(before) + 2


def test_a_panic_while_a_tokenizer_is_loaded_is_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("no entry found")

    load_tokenizer(folder, "tiny")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__init__", panic)
    with pytest.raises(TealError, match=r"tiny has no usable tokenizer: .*no entry found"):
        load_tokenizer(folder, "tiny")


def test_a_text_longer_than_any_context_is_refused_and_a_long_one_taken(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, "tiny")
    assert len(tokenizer.encode(" " * 100_000)) >= 100_000
    with pytest.raises(UsageError, match=r"11,000,000 characters; at most 4,000,000"):
        tokenizer.encode(" " * 11_000_000)
    assert MOST_CHARACTERS < 10_000_000  # where the usual regex breaks down


@pytest.mark.parametrize("odd", ["\ud800", "a\udcffb", "\udc00\ud800", "🙂\ud83d"])
def test_halves_of_surrogate_pairs_are_replaced_wherever_they_come_from(
    odd: str, folder: Path
) -> None:
    tokenizer = load_tokenizer(folder, "tiny")
    as_text = odd.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) == as_text
    assert rendered(folder, odd + SAYS) == f"{as_text}Hello"
    talk = conversation(folder, system=odd, stop_texts=[odd])
    list(talk.answer(odd, max_new_tokens=2))
    assert [m["content"] for m in talk.messages[:2]] == [as_text, as_text]
