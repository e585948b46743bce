"""Corpora: named ones, data sets on the Hub, and a user's own files.

What calibrates a model must not also score it, so that a corpus has two roles. Where it has no
splits of its own, calibration reads the first three quarters, and evaluation of the same text
the last.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teal_cli.errors import MissingError, TealError
from teal_cli.progress import Reporter
from teal_cli.text.files import read_file
from teal_cli.text.hub_data import WIKITEXT_2, UnreachableError, read_hub

Role = Literal["calibration", "evaluation"]

# 32 million characters are some 8 million tokens: more than any measurement here needs.
_MAX_CHARACTERS = 32_000_000
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet", ".md", ".json", ".csv")

# About a thousand tokens, up to the end of a line where there is one.
_PIECE = re.compile(r"(?s).{4000,12000}?\n+|.{1,12000}(?=\s|\Z)|.{1,12000}")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text, cut into `pieces` of some 4000 characters; joined, they are the text."""

    name: str
    pieces: tuple[str, ...]
    fingerprint: str  # SHA-256 of the whole text, other parts included
    part: str = "all of it"


def load_corpus(
    spec: str | None,
    *,
    split_role: Role,
    column: str | None = None,
    offline: bool = False,
    calibrated_on: Collection[str] = (),
    reporter: Reporter,
) -> Corpus:
    """Load a corpus for one of its two roles.

    Args:
        spec: `wikitext-2`, `pydoc`, a data set on the Hub as org/name or org/name:config, or a
            file. None is wikitext-2, or pydoc where the Hub cannot be reached.
        split_role: whether it is to calibrate or to evaluate.
        column: the text column of a table, by default `text`.
        offline: ask no server.
        calibrated_on: fingerprints of the corpora that profiles or rounding learnt from;
            evaluating such a text takes the part that they left out.
        reporter: is told when another corpus than asked for, or less of it, is used.

    Raises:
        MissingError: no such file or data set, or no network.
        UsageError: no such column.
        TealError: the file is damaged, or holds no text.
    """
    if spec is None:
        try:
            return load_corpus(
                "wikitext-2",
                split_role=split_role,
                offline=offline,
                calibrated_on=calibrated_on,
                reporter=reporter,
            )
        except UnreachableError:
            reporter.note(
                "wikitext-2 cannot be had without a network: "
                "using the language reference that Python brings (pydoc) instead"
            )
            spec, column = "pydoc", None
    separate = False
    if spec == "pydoc":
        rows: Iterable[str] = _python_reference()
    elif is_file(spec):
        rows = read_file(Path(spec).expanduser(), column)
    else:
        name = WIKITEXT_2 if spec == "wikitext-2" else spec
        rows, separate = read_hub(name, role=split_role, column=column, offline=offline)
    # JSON can hold half a surrogate pair, which is no text and which no tokenizer takes.
    content = _join(rows, spec, reporter).encode("utf-8", "replace")
    pieces = tuple(_PIECE.findall(content.decode()))
    corpus = Corpus(spec, pieces, hashlib.sha256(content).hexdigest())
    if separate:
        return corpus
    if split_role == "calibration":
        return _part(corpus, "the first three quarters")
    if spec == "pydoc" or corpus.fingerprint in calibrated_on:
        return _part(corpus, "the last quarter")
    return corpus


def _part(corpus: Corpus, part: str) -> Corpus:
    """The part of a corpus that one role reads; a text of one piece serves calibration whole."""
    cut = -(-3 * len(corpus.pieces) // 4)
    pieces = corpus.pieces[:cut] if part.startswith("the first") else corpus.pieces[cut:]
    if not pieces:
        raise TealError(
            f"{corpus.name} is what the profile was calibrated on, and too short to share",
            hint="Evaluate on another text: --dataset FILE.",
        )
    return Corpus(corpus.name, pieces, corpus.fingerprint, part)


def is_file(spec: str) -> bool:
    """Whether a corpus is named as a file, there or not, rather than as a data set."""
    path = Path(spec).expanduser()
    named_like_one = spec.startswith((".", "/", "~")) or path.suffix.lower() in _SUFFIXES
    return named_like_one or path.exists()


def _join(rows: Iterable[str], name: str, reporter: Reporter) -> str:
    """The rows as one text, as wikitext-2's perplexity is usually taken: blank lines between."""
    texts: list[str] = []
    length = 0
    for row in rows:
        texts.append(row)
        length += len(row) + 2
        if length >= _MAX_CHARACTERS:
            reporter.note(f"{name} is long: using its first {_MAX_CHARACTERS:,} characters")
            break
    text = "\n\n".join(texts)[:_MAX_CHARACTERS]
    if not text.strip():
        raise TealError(f"{name} holds no text", hint="Name another with --dataset.")
    return text


def _python_reference() -> Iterator[str]:
    """The paragraphs of Python's own language reference, each once: topics repeat each other."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingError(
            "this Python comes without its reference (pydoc_data)",
            hint="Name a text with --dataset FILE.",
        ) from None
    texts = (re.split(r"\n{2,}", topics[name].strip()) for name in sorted(topics))
    seen: set[str] = set()
    for paragraph in itertools.chain.from_iterable(texts):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            yield paragraph
