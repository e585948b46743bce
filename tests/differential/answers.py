"""What teal says, and what the model is asked, against transformers on the same folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from differential.comparisons import Chat, checkpoint_of, oracle, their_tokenizer
from differential.situations import Made
from inference.script import Script

from teal_cli.inference.conversation import Conversation, Text
from teal_cli.inference.defaults import chat_defaults, sampling_defaults
from teal_cli.inference.detokenizer import printable
from teal_cli.inference.generate import Finish
from teal_cli.inference.sampling import Sampler, Sampling, candidates
from teal_cli.inference.session import Session


@dataclass(frozen=True, slots=True)
class Stream:
    """The pieces that are shown one by one make the text that the whole answer decodes to."""

    texts: tuple[str, ...] = ()
    random: int = 0  # so many answers of random tokens

    def __call__(self, made: Made, chat: Chat) -> None:
        checkpoint, theirs = checkpoint_of(made), their_tokenizer(made)
        session = Script(checkpoint.load(), max_length=2000)
        conversation = Conversation(
            session, checkpoint.tokenizer(), Sampler(Sampling()), stop_token_ids=()
        )
        generator = torch.Generator().manual_seed(2)
        answers = [theirs.encode(text, add_special_tokens=False) for text in self.texts]
        answers += [
            torch.randint(0, len(theirs), (40,), generator=generator).tolist()
            for _ in range(self.random)
        ]
        for answer in answers:
            conversation.clear()
            session.lines = [answer]
            shown = _shown(conversation, "Hi", len(answer))
            # An answer begins with its first word, and ends with its last whole character.
            expected = printable(_text(theirs, answer)).lstrip().rstrip("\ufffd")
            assert shown.lstrip().rstrip("\ufffd") == expected


def _shown(conversation: Conversation, prompt: str, max_new_tokens: int) -> str:
    steps = conversation.answer(prompt, max_new_tokens=max_new_tokens)
    return "".join(step.text for step in steps if isinstance(step, Text))


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What transformers makes of an answer's tokens."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads is what apply_chat_template makes of the conversation.

    `parts` gives the template each content as a list with one text part.
    """

    turns: tuple[str, ...] = ("Hi there", "And you?")
    system: str | None = None
    parts: bool = False

    def __call__(self, made: Made, chat: Chat) -> None:
        checkpoint = checkpoint_of(made)
        session = Session(checkpoint.load(), max_length=500, backend="reference")
        tokenizer, theirs = checkpoint.tokenizer(), their_tokenizer(made)
        conversation = Conversation(
            session,
            tokenizer,
            Sampler(Sampling()),
            stop_token_ids=checkpoint.eos_token_ids,
            system=self.system,
        )
        for turn in self.turns:
            *_, finish = conversation.answer(turn, max_new_tokens=4)
            assert isinstance(finish, Finish)
            messages: list[dict[str, Any]] = conversation.messages[:-1]
            assert messages[-1]["content"] == turn
            if self.parts:
                messages = [
                    {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
                ]
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            read = session.tokens[: finish.stats.prompt_tokens]
            assert read == theirs.encode(text, add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """`teal chat -s 0` says what transformers.generate says, greedily, with the folder's settings.

    Attributes:
        prompt: the user's turn.
        ends: the tokens that end an answer, where the folder's files don't name them all.
        options: added to the command.
        settings: the options in the words of `generate`.
        template: the options in the words of `apply_chat_template`.
        stops: texts before which the answer is cut off.
        max_new_tokens: the longest answer.
    """

    prompt: str = "Hi"
    ends: tuple[str, ...] = ()
    options: tuple[str, ...] = ("-t", "0")
    settings: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 9

    def __call__(self, made: Made, chat: Chat) -> None:
        expected = self.expected(made)
        assert expected
        fixed = ("-s", "0", "--dtype", "float32", "-n", str(self.max_new_tokens))
        code, out, said = chat(made.given, *fixed, "-p", self.prompt, *self.options)
        assert (code, out.strip()) == (0, expected), said

    def expected(self, made: Made) -> str:
        """transformers' answer, from the folder."""
        tokenizer = their_tokenizer(made)
        turn = [{"role": "user", "content": self.prompt}]
        text = tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, **self.template
        )
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        ends = [tokenizer.convert_tokens_to_ids(end) for end in self.ends]
        settings = {"do_sample": False, "pad_token_id": 0, **self.settings}
        if ends:
            settings["eos_token_id"] = ends
        out = oracle(made).generate(ids, max_new_tokens=self.max_new_tokens, **settings)
        said = out[0, ids.shape[1] :].tolist()
        if said[-1] in ends:
            said.pop()  # perhaps not flagged special, and then decoding shows it
        text = printable(_text(tokenizer, said))
        for stop in self.stops:
            text = text.partition(stop)[0]
        return text.strip()


@dataclass(frozen=True, slots=True)
class Chances:
    """The next token's probabilities are those that generate would draw from.

    Both sides take their settings from the folder's generation_config.json; `meaning` puts what
    others write into transformers' own words.
    """

    meaning: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, made: Made, chat: Chat) -> None:
        ids = torch.arange(40, 60)
        out = oracle(made).generate(
            ids[None],
            max_new_tokens=1,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **self.meaning,
        )
        expected = out.scores[0][0].softmax(-1)
        checkpoint = checkpoint_of(made)
        logits = Session(checkpoint.load(), max_length=40, backend="reference").prefill(ids)
        settings = sampling_defaults(
            checkpoint.generation_defaults(), chat_defaults(checkpoint.config)
        )
        found, tokens = candidates(logits, Sampling(**settings))
        actual = torch.zeros_like(expected).index_add_(0, tokens, found)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3)
        assert ((actual > 0) == (expected > 0)).all()


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """`teal chat` gives a sentence instead of an answer to what the model can't be asked."""

    words: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __call__(self, made: Made, chat: Chat) -> None:
        code, out, said = chat(
            made.given, "-s", "0", "-t", "0", "-n", "4", "-p", "HELLO", *self.options
        )
        assert code in (1, 2, 3, 5), said
        assert out == ""
        assert "internal error" not in said
        assert any(word in said.lower() for word in self.words), said
