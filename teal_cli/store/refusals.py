"""Why a model did not come: the sentences for what the Hub, the network and the disk answer."""

from __future__ import annotations

import errno
import re
from typing import Any, Literal

from teal_cli.errors import AccessError, MissingError, TealError
from teal_cli.store import artifacts, models
from teal_cli.store.listing import NonsenseError
from teal_cli.suggestions import did_you_mean

AGAIN = "Run the same command again: it continues where it stopped."
_BETWEEN = (
    "A proxy or a login page may answer in its place: open {url} in a browser, and check "
    "HF_ENDPOINT and HTTPS_PROXY."
)


class Unreachable(TealError):
    """The Hub does not answer, or not as the Hub does."""


class TransferError(TealError):
    """What the Hub lists does not come, or comes in damaged."""


def explained(
    error: Exception,
    name: str,
    revision: str | None,
    token: str | Literal[False],
    *,
    listing: bool,
) -> Exception:
    """What the user should read instead of the client's error; the system's pass unchanged."""
    from huggingface_hub import constants, errors

    # A mirror's address may hold a password.
    between = _BETWEEN.format(url=re.sub(r"//[^/]*@", "//", constants.ENDPOINT))

    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return _refusal(cause, name, revision, token, listing=listing)
    if any(isinstance(e, OSError) and e.errno in artifacts.DISK_FULL for e in causes):
        return TealError(
            f"the disk filled up while {name} came in", hint=f"Free some space. {AGAIN}"
        )
    if any(isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EROFS) for e in causes):
        return TealError(
            f"Hugging Face's cache cannot be written ({error})",
            hint="Choose another place for it with HF_HOME, or fix its rights.",
        )
    if any(is_transport(e) or isinstance(e, errors.LocalEntryNotFoundError) for e in causes):
        if listing:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
            if not reason or type(error).__name__ == "LocalProtocolError":  # it quotes headers
                reason = type(error).__name__
            return Unreachable(f"the Hub cannot be reached ({reason})")
        return TransferError(f"the connection broke off while {name} came in", hint=AGAIN)
    if any("consistency check" in str(e).lower() for e in causes):
        return TransferError(f"a file of {name} came in damaged", hint=AGAIN)
    if isinstance(error, OSError) and not isinstance(error, errors.FileMetadataError):
        return error
    why = str(error) if isinstance(error, NonsenseError) else type(error).__name__
    if listing:
        return Unreachable(f"what answers as the Hub makes no sense ({why})", hint=between)
    return TransferError(
        f"what answers as the Hub makes no sense ({why}) while {name} came in", hint=between
    )


def _refusal(
    error: Any, name: str, revision: str | None, token: str | Literal[False], *, listing: bool
) -> TealError:
    """The sentence for an HTTP status that the Hub answered with."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/{name}"
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return AccessError(
            f"access to {name} is restricted",
            hint=f"Accept its terms at {url}, then log in with `hf auth login` or pass --token.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingError(f"{name} has no revision {revision!r}", hint=f"See {url}/commits.")
    if status == 401 and (token or "Invalid" in str(error)):
        return AccessError("the Hub refused the access token", hint="Log in: `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingError(
            f"there is no model {name!r} on the Hub, or it is private",
            hint=did_you_mean(name, set(models.SHORT_NAMES.values()), cutoff=0.85)
            + "Check the spelling; for a private model log in with `hf auth login` or pass "
            "--token.",
        )
    if status == 429:
        waits_s = wait(error.response.headers)
        reason = "asks to wait" if waits_s is None else f"asks to wait {waits_s} s"
    else:
        reason = "is out of order" if listing and status >= 500 else "failed"
    if listing:
        return Unreachable(f"the Hub {reason} ({status})")
    return TransferError(f"the Hub {reason} ({status}) while {name} came in", hint=AGAIN)


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def is_transport(error: BaseException) -> bool:
    """A failed connection; by name, as the client's HTTP library has changed with its versions."""
    named = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return named or isinstance(error, (ConnectionError, TimeoutError))


def wait(headers: Any) -> int | None:
    """How many seconds the Hub wants no more requests, by either of its headers; None is unsaid."""
    found = re.fullmatch(r"\d{1,9}", headers.get("Retry-After", "")) or re.search(
        r"(?<=;t=)\d{1,9}", headers.get("RateLimit", "")
    )
    return int(found[0]) if found else None
