"""Tasks that are made from a text, for where lm-eval's own documents cannot be had.

What a continuation of text asks for at its smallest: the last word of a passage (as LAMBADA,
arXiv 1606.06031), which sentence comes next, a list once more, and sums. The same text gives the
same documents.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from teal_cli.errors import TealError
from teal_cli.text.corpora import Corpus

ALL = "text"  # names them all
DOCUMENTS = 400  # of a task, at most

_CHOICES = 4
_LISTED = 12  # words of a list
_REPEATED = 6  # of them, before the question
_EXAMPLES = 4  # sums before the question
# A sentence of prose: what ends in a full stop and a space, and no abbreviation by its look.
_SENTENCE = re.compile(r"(?s)[A-Z].{20,300}?[a-z]{3}[.!?](?=\s|$)")
_WORD = re.compile(r"\b[a-z]{4,}\b")
_LAST_WORD = re.compile(r"(?s)(.+) ([A-Za-z]{4,})[.!?]")

Document = dict[str, Any]


def is_made(name: str) -> bool:
    """Whether a name of a task is one of these."""
    return name in TASKS


def make(name: str, corpus: Corpus) -> list[Document]:
    """The documents of a task: `text` and `target`, or `choices` and `gold`, the right one.

    Raises:
        TealError: the text has none.
    """
    generator = random.Random(0)
    passages = [found for piece in corpus.pieces for found in _passages(piece)]
    generator.shuffle(passages)
    documents: list[Document] = []
    for document in TASKS[name](passages, generator):
        documents.append(document)
        if len(documents) == DOCUMENTS:
            break
    if not documents:
        raise TealError(
            f"{corpus.name} ({corpus.part}) has too little prose for the task {name}",
            hint="Name another text with --dataset.",
        )
    return documents


def config(name: str) -> dict[str, Any]:
    """What lm-eval is told of a task."""
    found: dict[str, Any] = {
        "task": name,
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "output_type": "loglikelihood",
        "doc_to_target": "{{' ' + target}}",  # lm-eval's delimiter is for choices alone
        "metric_list": [_metric("acc")],
        "metadata": {"version": 1.0},
    }
    if name == "text_next_sentence":
        found |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        }
    return found


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _passages(piece: str) -> Iterator[list[str]]:
    """Runs of three sentences that follow one another in a paragraph."""
    for paragraph in re.split(r"\n\s*\n", piece):
        sentences = [" ".join(s.split()) for s in _SENTENCE.findall(paragraph)]
        for first in range(0, len(sentences) - 2, 3):
            yield sentences[first : first + 3]


def _last_word(passages: Sequence[list[str]], generator: random.Random) -> Iterator[Document]:
    """The last word of a passage, where the passage has had it before."""
    for sentences in passages:
        for count in (3, 2):
            whole = _LAST_WORD.fullmatch(" ".join(sentences[:count]))
            if whole and re.search(rf"\b{whole[2]}\b", whole[1]):
                yield {"text": whole[1], "target": whole[2]}
                break


def _next_sentence(passages: Sequence[list[str]], generator: random.Random) -> Iterator[Document]:
    """Which of four sentences goes on; the others are of other passages."""
    for number, sentences in enumerate(passages):
        others = [p[2] for p in (*passages[:number], *passages[number + 1 :])]
        if len(others) < _CHOICES - 1:
            return
        choices = [sentences[2], *generator.sample(others, _CHOICES - 1)]
        generator.shuffle(choices)
        gold = choices.index(sentences[2])
        yield {"text": " ".join(sentences[:2]), "choices": choices, "gold": gold}


def _copying(passages: Sequence[list[str]], generator: random.Random) -> Iterator[Document]:
    """A list of words in no order, and the second half of it when it is said again."""
    words = sorted({word for sentences in passages for word in _WORD.findall(" ".join(sentences))})
    while len(words) >= _LISTED:
        said = generator.sample(words, _LISTED)
        begun = ", ".join(said[:_REPEATED]) + ","
        yield {
            "text": f"First list: {', '.join(said)}.\nThe same list again: {begun}",
            "target": ", ".join(said[_REPEATED:]),
        }


def _arithmetic(passages: Sequence[list[str]], generator: random.Random) -> Iterator[Document]:
    """A sum of two numbers below 50, after sums that are worked out."""
    while True:
        pairs = [(generator.randrange(50), generator.randrange(50)) for _ in range(_EXAMPLES + 1)]
        *worked, (a, b) = pairs
        lines = [f"{x} + {y} = {x + y}\n" for x, y in worked]
        # The end of the line belongs to the answer: 1 is not the answer where 12 is.
        yield {"text": f"{''.join(lines)}{a} + {b} =", "target": f"{a + b}\n"}


TASKS: dict[str, Callable[[Sequence[list[str]], random.Random], Iterator[Document]]] = {
    "text_last_word": _last_word,
    "text_next_sentence": _next_sentence,
    "text_copying": _copying,
    "text_arithmetic": _arithmetic,
}
