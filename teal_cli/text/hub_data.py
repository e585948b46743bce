"""Text out of data sets on the Hugging Face Hub, through the `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from teal_cli.errors import MissingError, TealError, UsageError, whole
from teal_cli.store.access import access_token
from teal_cli.text.files import text_of

WIKITEXT_2 = "Salesforce/wikitext:wikitext-2-raw-v1"

_PROBE_S = 5.0  # `datasets` itself retries for 23 s before it reports that there is no network
_SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation", "train")}


class UnreachableError(MissingError):
    """A data set is neither in the local cache nor can it be fetched."""


def read_hub(
    spec: str, *, role: str, column: str | None = None, offline: bool = False
) -> tuple[Iterator[str], bool]:
    """The texts of a data set on the Hub, a row at a time.

    Args:
        spec: org/name, or org/name:config.
        role: "calibration" takes the train split, "evaluation" the test or validation split.
        column: the text column, by default `text`.
        offline: use only the local cache.

    Returns:
        The rows, and whether the other role reads another split than this one.

    Raises:
        UnreachableError: no answer, and no cached copy.
        MissingError: there is no such data set, or it may not be read.
        UsageError: the configuration or the column does not exist.
    """
    path, _, config = spec.partition(":")
    try:
        import datasets
    except ImportError:
        raise UnreachableError(
            f"the data set {path} needs the library `datasets`, which is not installed",
            hint="Install it (pip install datasets), or name a local file with --dataset.",
        ) from None
    online = not offline and _reachable()
    with _translated(path), network(online):
        name = config or None
        names = datasets.get_dataset_split_names(path, name)
        splits = {role: _choose(role, names) for role in _SPLITS}
        # A data set can be larger than the disk: only wikitext-2 is fetched and kept whole.
        rows = datasets.load_dataset(path, name, split=splits[role], streaming=spec != WIKITEXT_2)
    return _texts(rows, path, column, online), len(set(splits.values())) > 1


def _choose(role: str, names: list[str]) -> str:
    return next((split for split in _SPLITS[role] if split in names), names[0])


def _texts(rows: Any, path: str, column: str | None, online: bool) -> Iterator[str]:
    with _translated(path), network(online):
        for row in rows:
            yield text_of(row, column, list(row), f"the data set {path}")


def _reachable() -> bool:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    token = access_token(None)
    try:
        HfApi(token=token).dataset_info(WIKITEXT_2.partition(":")[0], timeout=_PROBE_S)
    except Exception as error:
        # The client raises its HTTP library's errors, which has changed between versions; an
        # answer of any kind means that the server is there.
        return getattr(error, "response", None) is not None
    return True


@contextmanager
def network(online: bool) -> Iterator[None]:
    """Without a network, let the libraries go to their cache at once instead of retrying.

    With one, they find the token that has been checked.
    """
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    token_before = os.environ.get("HF_TOKEN")
    if not online:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    elif token := access_token(None):
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        if token_before is not None:
            os.environ["HF_TOKEN"] = token_before
        else:
            os.environ.pop("HF_TOKEN", None)


@contextmanager
def _translated(path: str) -> Iterator[None]:
    """Turn what `datasets` raises into errors of ours."""
    import datasets.exceptions

    try:
        yield
    except TealError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise MissingError(
            f"the Hub has no data set {path} that you may read: {whole(error)}",
            hint="Check the name; for a gated one accept its terms and run: hf auth login",
        ) from None
    except ConnectionError:
        raise UnreachableError(
            f"the data set {path} is not on this machine, and the Hub cannot be reached",
            hint="Name a local file, or --dataset pydoc (text that Python brings).",
        ) from None
    except ValueError as error:  # also a configuration that is missing or unknown
        raise UsageError(
            f"the data set {path} cannot be loaded: {whole(error)}",
            hint="Name a configuration with --dataset org/name:config.",
        ) from None
    except Exception as error:  # the client's and its HTTP library's, where answers make no sense
        raise TealError(
            f"the data set {path} cannot be loaded: {whole(error)}",
            hint="Try again, or name a local file, or --dataset pydoc (text that Python brings).",
        ) from None
