"""What is answered where a request is not: OpenAI's error object."""

from __future__ import annotations

from typing import Any

from teal_cli.errors import TealError, UsageError
from teal_cli.printable import encodable

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(Exception):
    """A request that gets an error object. It is no `TealError`: it ends nothing here."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            message: a sentence.
            status: HTTP's.
            param: the request's field that it is about.
            code: OpenAI's word for it, where it has one.
            retry_after_s: when to ask again.
        """
        super().__init__(message)
        self.message = encodable(message)  # it may name what the client sent
        self.status = status
        self.param = None if param is None else encodable(param)
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP wants beside it."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers

    def document(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def refusal_of(error: TealError, *, param: str | None = None) -> Refusal:
    """The refusal of a request that an error of the core has ended."""
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    return Refusal(message, status=400 if isinstance(error, UsageError) else 500, param=param)
