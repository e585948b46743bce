"""What the Hub says that a model consists of, read as the answer of a stranger.

A proxy, a captive portal or a mirror may answer in the Hub's place, with anything. So the answer
is read up to a bound, and nothing in it is used before its type and its range are checked.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal
from urllib.parse import quote

# What the decoder and the tokenizer read; never pickles, other frameworks or other precisions.
NEEDED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "quantize_config.json",  # GPTQ and AWQ of 2023
    "quant_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tekken.json",
    "vocab.json",
    "merges.txt",
]
_TIMEOUT_S = 6  # the client itself would wait without end
_LARGEST_BYTES = 64_000_000  # of the answer; that of 10,000 files has 3 MB
_LARGEST_FILE_BYTES = 10**15
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256 = re.compile("[0-9a-f]{64}")
GIT_SHA1 = re.compile("[0-9a-f]{40}")
# Parts of a path that every file system takes, and that lead nowhere else.
_PART = re.compile(r"(?!\.{1,2}$)[^/\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,200}")


class NonsenseError(Exception):
    """An answer that the Hub does not give."""


@dataclass(frozen=True, slots=True)
class File:
    """A file at a commit; `sha256` is a large one's, `git_sha1` another's. None is not known."""

    name: str
    nbytes: int | None
    sha256: str | None
    git_sha1: str | None

    @property
    def digest(self) -> str:
        """The file's name among the cache's blobs."""
        return self.sha256 or str(self.git_sha1)


@dataclass(frozen=True, slots=True)
class Listing:
    """The commit that a revision names now, its files that are needed, and the others' names."""

    commit: str
    files: tuple[File, ...]
    others: tuple[str, ...]


def read_listing(name: str, revision: str | None, token: str | Literal[False]) -> Listing:
    """Ask the Hub for a model's files.

    Raises:
        NonsenseError: the answer is none of the Hub's.
        Exception: the client's own, of the connection or of an HTTP status.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{constants.ENDPOINT}/api/models/{name}"
    if revision is not None:
        url += f"/revision/{quote(revision, safe='')}"
    content = bytearray()
    headers = build_hf_headers(token=token)
    with get_session().stream(
        "GET", url, headers=headers, params={"blobs": True}, timeout=_TIMEOUT_S
    ) as response:
        hf_raise_for_status(response)
        for block in response.iter_bytes(1 << 16):
            content += block
            if len(content) > _LARGEST_BYTES:
                raise NonsenseError(f"it is longer than {_LARGEST_BYTES / 1e6:.0f} MB")
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        what = "a web page" if content.lstrip()[:1] == b"<" else "no JSON"
        raise NonsenseError(f"it is {what}" if content else "it is empty") from None
    return _listing(answer)


def _listing(answer: Any) -> Listing:
    if not isinstance(answer, dict):
        raise NonsenseError("it is no JSON object")
    commit, siblings = answer.get("sha"), answer.get("siblings")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise NonsenseError("it names no commit")
    if not isinstance(siblings, list):
        raise NonsenseError("it lists no files")
    files: dict[str, File] = {}
    others = []
    for entry in siblings:
        found = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(found, str):
            raise NonsenseError("it lists a file without a name")
        if not any(fnmatch(found, pattern) for pattern in NEEDED):
            others.append(found)
            continue
        if not all(_PART.fullmatch(part) for part in found.split("/")) or len(found) > 1000:
            raise NonsenseError(f"it lists a file by a name that none may have, {found[:100]!r}")
        if found in files:
            raise NonsenseError(f"it lists {found} twice")
        files[found] = _file(found, entry)
    return Listing(commit, tuple(files.values()), tuple(others))


def _file(name: str, entry: dict[str, Any]) -> File:
    nbytes, blob, lfs = entry.get("size"), entry.get("blobId"), entry.get("lfs")
    if nbytes is not None and (type(nbytes) is not int or not 0 <= nbytes <= _LARGEST_FILE_BYTES):
        raise NonsenseError(f"the size of {name} is none")
    if blob is not None and not (isinstance(blob, str) and GIT_SHA1.fullmatch(blob)):
        raise NonsenseError(f"{name} has no name among git's")
    if lfs is None:
        return File(name, nbytes, None, blob)
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise NonsenseError(f"{name} has no SHA-256")
    return File(name, nbytes, sha256, None)
