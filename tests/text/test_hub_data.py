"""Hub data sets: which split serves which role, and what each failure becomes.

`datasets` itself is real; only its two calls that need the Hub are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.progress import Silent
from teal_cli.text import hub_data
from teal_cli.text.corpora import load_corpus
from teal_cli.text.hub_data import UnreachableError, read_hub

datasets = pytest.importorskip("datasets")


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The content of the one data set that the Hub then has."""
    content: dict[str, list[dict[str, Any]]] = {}

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Any:
        return iter(content[split])

    monkeypatch.setattr(hub_data, "_reachable", lambda: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, name: list(content))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return content


@pytest.mark.parametrize(
    ("names", "calibration", "evaluation", "separate"),
    [
        (("train", "validation", "test"), "train", "test", True),
        (("train", "validation"), "train", "validation", True),
        (("train",), "train", "train", False),
        (("everything",), "everything", "everything", False),
    ],
)
def test_splits(
    splits: dict[str, list[dict[str, Any]]],
    names: tuple[str, ...],
    calibration: str,
    evaluation: str,
    separate: bool,
) -> None:
    splits.update({name: [{"text": name}] for name in names})
    for role, expected in (("calibration", calibration), ("evaluation", evaluation)):
        rows, apart = read_hub("some/data", role=role)
        assert (list(rows), apart) == ([expected], separate)


def test_single_split_is_shared_out(splits: dict[str, list[dict[str, Any]]]) -> None:
    splits["train"] = [{"text": f"{i} " * 3000} for i in range(12)]
    first = load_corpus("some/data", split_role="calibration", reporter=Silent())
    last = load_corpus(
        "some/data",
        split_role="evaluation",
        calibrated_on=[first.fingerprint],
        reporter=Silent(),
    )
    assert not set(first.pieces) & set(last.pieces)


def test_missing_column(splits: dict[str, list[dict[str, Any]]]) -> None:
    splits["train"] = [{"story": "Once.", "id": 3}]
    with pytest.raises(UsageError, match="it has: story, id"):
        load_corpus("some/data", split_role="calibration", reporter=Silent())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), MissingError),
        (ConnectionError("no route"), UnreachableError),
        (ValueError("Config name is missing.\nPlease pick one"), UsageError),
        (RuntimeError("Dataset scripts are no longer supported"), TealError),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "between rows"])
def test_failures_are_one_sentence(
    splits: dict[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[TealError],
    when: str,
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise raised

    def load_dataset(*_: Any, **__: Any) -> Any:
        if when == "at the start":
            raise raised
        return rows()

    splits["train"] = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match="data set a/b") as caught:
        load_corpus("a/b", split_role="calibration", reporter=Silent())
    assert "\n" not in caught.value.message
    assert type(caught.value) is expected
