"""The access token for the Hub, checked before any library sees it.

A token that cannot stand in an HTTP header is quoted by the library that refuses it, and an error
is no place for a secret. So no message here, and no exception that causes one, holds any of it.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from teal_cli.errors import AccessError

_WELL_FORMED = re.compile(r"[!-~]{1,8192}")  # what a header takes, but for spaces
_HINT = "Copy it anew from https://huggingface.co/settings/tokens, or log in with `hf auth login`."


def access_token(given: str | None) -> str | Literal[False]:
    """The token to send: the one given, else the client's own; False sends none.

    Line ends, spaces and control characters around it, which come with pasting and with files
    that end in a line end, are left out.

    Raises:
        AccessError: it is no token, or the stored one cannot be read.
    """
    if given is not None:
        return _checked(given, "the access token of --token")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return False
    try:
        found = get_token()
    except Exception as error:
        kind = type(error).__name__
    else:
        return (
            _checked(found, "the stored access token (HF_TOKEN, or its file)") if found else False
        )
    raise AccessError(f"the stored access token cannot be read ({kind})", hint=_HINT)


def _checked(token: str, what: str) -> str:
    start, end = 0, len(token)
    while start < end and _is_blank(token[start]):
        start += 1
    while start < end and _is_blank(token[end - 1]):
        end -= 1
    token = token[start:end]
    if not token:
        raise AccessError(f"{what} is empty", hint=_HINT)
    if not _WELL_FORMED.fullmatch(token):
        raise AccessError(f"{what} holds characters that no token has, or is too long", hint=_HINT)
    return token


def _is_blank(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp")
