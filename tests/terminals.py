"""What a script writes to a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys


def terminal(script: str, *, term: str = "xterm", **environment: str) -> str:
    """What a script writes to a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": term, "COLUMNS": "80", **environment},
    )
    os.close(follower)
    out = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux says that the other end has closed
            break
        if not chunk:
            break
        out += chunk
    os.close(leader)
    assert process.wait(60) == 0
    return out.decode()
