"""Where a server listens, and whether it may; nothing here needs a model, or imports much."""

from __future__ import annotations

import errno
import ipaddress
import socket
from importlib.util import find_spec
from typing import Any

from teal_cli.errors import MissingError, TealError, UsageError

_NEEDED = ("starlette", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Make sure that the packages of the extra are there.

    Raises:
        MissingError: one is not.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MissingError(
            f"serving needs {', '.join(missing)}, not installed here",
            hint="Install what serving needs with: pip install 'teal-cli[serve]'",
        )


def is_local(name: str) -> bool:
    """Whether a host's name or address is this machine's, and no other can reach it."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def check_host(host: str, api_key: str | None) -> None:
    """Refuse to be reached from elsewhere without a key.

    Raises:
        UsageError: there is none, or an empty one.
    """
    if api_key is not None and not api_key.strip():
        raise UsageError("the API key is empty")
    if api_key is None and not is_local(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, and there is no key",
            hint="Give one with --api-key, or in TEAL_API_KEY, which `ps` does not show.",
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the port, and does not listen yet.

    Raises:
        TealError: the port is taken, or the address is none of this machine's.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise TealError(
            f"there is no address {host}", hint="Name one of this machine's, such as 0.0.0.0."
        ) from None
    # asyncio sends small packets at once only where it sees that they are TCP's.
    sock = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot(error, host, port) from None
    return sock


def listen(sock: socket.socket) -> str:
    """Let clients come; return where they find the API, as their base_url.

    Raises:
        TealError: another program began to listen at the port meanwhile.
    """
    host, port = sock.getsockname()[:2]
    try:
        sock.listen()
    except OSError as error:
        raise _cannot(error, host, port) from None
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _cannot(error: OSError, host: Any, port: Any) -> TealError:
    if error.errno == errno.EADDRINUSE:
        return TealError(
            f"port {port} of {host} is taken by another program",
            hint="Choose another with --port; 0 takes any that is free.",
        )
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} is for the administrator", hint="Choose one above 1023.")
    return TealError(f"{host} is no address of this machine", hint="Choose another --host.")
