"""The tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from teal_cli.errors import TealError
from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.ends import stop_token_ids
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.progress import Silent


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    tiny.write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def names(tokenizer: Any, *ids: int) -> set[str]:
    """The tokens that end an answer of a model whose configs name `ids`."""
    ends = stop_token_ids(ids, tokenizer, ChatTemplate.of(tokenizer))
    return set(tokenizer.convert_ids_to_tokens(sorted(ends)))


def after(text: str) -> str:
    """A template that puts `text` after an answer."""
    return "{% for m in messages %}{{ m.content }}" + text + "{% endfor %}"


def test_an_answer_ends_at_every_token_that_says_so(tokenizer: Any) -> None:
    assert names(tokenizer) == {"<|im_end|>", "<|endoftext|>"}
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it whose template is ChatML
    assert names(tokenizer) == {"<|im_end|>", "<|endoftext|>"}
    tokenizer.chat_template = after(" \n<|im_start|>")
    assert names(tokenizer) == {"<|im_end|>", "<|endoftext|>", "<|im_start|>"}
    a = tokenizer.convert_tokens_to_ids("a")
    assert names(tokenizer, a) == {"<|im_end|>", "<|endoftext|>", "<|im_start|>", "a"}


def test_a_base_model_ends_at_the_end_of_a_text_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|endoftext|>"
    assert names(tokenizer) == {"<|endoftext|>"}
    tokenizer.eos_token = None
    assert names(tokenizer) == set()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_the_end_of_a_turn_need_not_be_flagged(tokenizer: Any, special: bool, known: bool) -> None:
    name = "<|eot_id|>" if known else "<end-of-mine>"
    tokenizer.add_tokens([name], special_tokens=special)
    before = names(tokenizer)
    assert (name in before) == known
    tokenizer.chat_template = after(name + "\n<|im_start|>")
    assert name in names(tokenizer)


def test_the_end_is_what_follows_the_answer(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<end-of-mine>"])
    each = "{% for m in messages %}<|im_start|>{{ m.content | upper }}<end-of-mine>{% endfor %}"
    tokenizer.chat_template = each
    assert names(tokenizer) == {"<|im_end|>", "<|endoftext|>", "<end-of-mine>"}


def test_added_tokens_that_are_text_are_no_ends(tokenizer: Any) -> None:
    tokenizer.add_tokens(["   ", "\n\n"])
    tokenizer.chat_template = after("\n\n   <|im_end|>")
    assert names(tokenizer) == {"<|im_end|>", "<|endoftext|>"}


def test_a_known_name_counts_where_it_is_one_token_and_no_word(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def ends(in_vocabulary: list[str], added: list[str]) -> set[str]:
        vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "a", *in_vocabulary])}
        own = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        own.add_tokens([AddedToken(name, normalized=False) for name in added])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
        tokenizer.chat_template = after("")
        return names(tokenizer)

    # Words of HTML and of prose may be ordinary tokens of a large vocabulary.
    assert ends(["</s>", "<eos>", "[EOS]", "<EOT>"], []) == set()
    assert ends([], ["</s>", "<EOT>"]) == {"</s>", "<EOT>"}
    # A GGUF file may store the end of a turn as an ordinary token.
    assert ends(["<|im_end|>", "<|endoftext|>"], []) == {"<|im_end|>", "<|endoftext|>"}
    assert ends(["<|end|>"], []) == {"<|end|>"}
    assert ends(["<|end|>", "<|call|>", "<|return|>"], []) == {"<|call|>", "<|return|>"}


@pytest.mark.parametrize("source", ["{{ raise_exception('no') }}", "{{ 1 + 'a' }}", "<|im_start|>"])
def test_a_template_that_tells_nothing_adds_nothing(tokenizer: Any, source: str) -> None:
    tokenizer.chat_template = source
    assert names(tokenizer) == {"<|im_end|>", "<|endoftext|>"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    from model.sources import source_of

    folder = tiny.write_model(tmp_path_factory.mktemp("model") / "model", eos_token_id=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(tmp_path_factory.mktemp("home")))
        return Checkpoint(convert(source_of(folder), reporter=Silent()))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (1, (1,)),
        ([1, 0], (1, 0)),
        ([1, -1, 10**6], (1,)),
        (-1, (2,)),
        (None, (2,)),
        ([], (2,)),
    ],
    ids=str,
)
def test_the_ends_that_a_checkpoint_names(
    checkpoint: Checkpoint, stored: Any, expected: tuple[int, ...]
) -> None:
    path = checkpoint.folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": stored}))
    assert checkpoint.eos_token_ids == expected


@pytest.mark.parametrize("ids", ["x", [1, "x"], {}, 1.5, True, [None], [[1]]], ids=str)
def test_ends_that_are_no_tokens_are_refused(checkpoint: Checkpoint, ids: Any) -> None:
    path = checkpoint.folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(TealError, match="eos_token_id of test-model"):
        _ = checkpoint.eos_token_ids
