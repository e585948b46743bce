"""Corpora: pieces, the parts of the two roles, named ones, the fallback without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from reporters import Notes

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.progress import Silent
from teal_cli.text import corpora
from teal_cli.text.corpora import load_corpus

QUIET = Silent()


def long_text(lines: int = 2000) -> str:
    return "".join(f"Line {i} says something of its own.\n" for i in range(lines))


@pytest.mark.parametrize(
    "text",
    [
        long_text(),
        "word " * 20_000,
        "x" * 30_000,
        long_text(300) + "\n\n\n" + "ü " * 7000,
        "short",
        " \n leading",
    ],
    ids=["lines", "no line ends", "no spaces", "mixed", "short", "leading space"],
)
def test_pieces_join_to_the_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text, encoding="utf-8")
    corpus = load_corpus(str(path), split_role="evaluation", reporter=QUIET)
    assert "".join(corpus.pieces) == text
    assert max(map(len, corpus.pieces)) <= 12_000 + 3
    assert corpus.part == "all of it"


def test_roles_never_share_text_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(long_text())
    calibration = load_corpus(str(path), split_role="calibration", reporter=QUIET)
    held_out = load_corpus(
        str(path),
        split_role="evaluation",
        calibrated_on=[calibration.fingerprint],
        reporter=QUIET,
    )
    assert "".join(calibration.pieces + held_out.pieces) == long_text()
    assert len(calibration.pieces) == pytest.approx(3 * len(held_out.pieces), abs=3)
    assert held_out.part == "the last quarter"


def test_file_too_short_to_share(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("A few words.")
    corpus = load_corpus(str(path), split_role="calibration", reporter=QUIET)
    assert corpus.pieces == ("A few words.",)
    with pytest.raises(TealError, match="too short to share"):
        load_corpus(
            str(path), split_role="evaluation", calibrated_on=[corpus.fingerprint], reporter=QUIET
        )


def test_python_reference_has_disjoint_parts() -> None:
    parts = [
        load_corpus("pydoc", split_role=role, reporter=QUIET)
        for role in ("calibration", "evaluation")
    ]
    paragraphs = [
        {" ".join(p.split()) for p in "".join(part.pieces).split("\n\n") if len(p) > 200}
        for part in parts
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert sum(map(len, parts[0].pieces)) > 100_000
    assert parts[0].fingerprint == parts[1].fingerprint


def test_without_a_network_python_steps_in_and_says_so() -> None:
    pytest.importorskip("datasets")
    reporter = Notes()
    corpus = load_corpus(None, split_role="calibration", reporter=reporter)
    assert corpus.name == "pydoc"
    assert any("without a network" in note for note in reporter.notes)


@pytest.mark.parametrize("spec", ["wikitext-2", "someone/some-data:some-config"])
def test_named_data_without_a_network_is_one_error(spec: str) -> None:
    with pytest.raises(MissingError, match=r"cannot be reached|not installed"):
        load_corpus(spec, split_role="evaluation", offline=True, reporter=QUIET)


@pytest.mark.parametrize("text", ["", " \n\n\t"])
def test_file_without_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(text)
    with pytest.raises(TealError, match="holds no text"):
        load_corpus(str(path), split_role="evaluation", reporter=QUIET)


def test_misspelt_file_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(MissingError, match="no file"):
        load_corpus("nowhere/wiki.txt", split_role="evaluation", reporter=QUIET)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n')
    corpus = load_corpus(str(path), split_role="evaluation", reporter=QUIET)
    assert corpus.pieces == ("a?b\n\nc",)


def test_long_text_is_cut_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_MAX_CHARACTERS", 1000)
    path = tmp_path / "some.txt"
    path.write_text(long_text())
    reporter = Notes()
    corpus = load_corpus(str(path), split_role="evaluation", reporter=reporter)
    assert sum(map(len, corpus.pieces)) == 1000
    assert "first 1,000 characters" in reporter.notes[0]


def test_column_errors_are_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"story": "Once."}\n')
    with pytest.raises(UsageError, match="it has: story"):
        load_corpus(str(path), split_role="calibration", reporter=QUIET)
    corpus = load_corpus(str(path), split_role="calibration", column="story", reporter=QUIET)
    assert corpus.pieces == ("Once.",)
