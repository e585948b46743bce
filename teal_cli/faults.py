"""Any failure as one sentence and a next step: the system's, the device's memory, a bug of ours."""

from __future__ import annotations

import errno
import os
import re

from teal_cli.errors import TealError

_SYSTEM_ERRORS = {
    errno.ENOSPC: ("the disk is full", "Free some space, then run the same command again."),
    errno.EDQUOT: (
        "the disk quota is used up",
        "Free some space, then run the same command again.",
    ),
    errno.EACCES: ("permission denied", "Choose another place with TEAL_HOME, or fix its rights."),
    errno.EPERM: ("permission denied", "Choose another place with TEAL_HOME, or fix its rights."),
    errno.EROFS: ("the file system is read-only", "Choose another place with TEAL_HOME."),
}
_LESS_MEMORY = "a shorter context or text, quantized weights (--quantize int8 or int4)"
# What torch, CUDA, cuBLAS and Triton say, each in errors of its own class.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_AMOUNT = r"([\d.]+ (?:bytes|[KMGT]iB))"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the host's."""
    # torch's own class, by name: torch may never have been imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def explain(error: Exception) -> TealError:
    """The error itself if it is for the user, else one that says in a sentence what happened."""
    if isinstance(error, TealError):
        return error
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        reason, hint = _SYSTEM_ERRORS[error.errno]
        return TealError(f"{reason}: {error.filename}" if error.filename else reason, hint=hint)
    if is_out_of_memory(error):
        return _out_of_memory(str(error))
    detail = str(error).strip().splitlines()
    sentence = f"internal error ({type(error).__name__}{': ' + detail[0] if detail else ''})"
    if os.environ.get("TEAL_DEBUG") == "1":
        return TealError(sentence)
    return TealError(f"{sentence}, run with TEAL_DEBUG=1 for the traceback")


def _out_of_memory(said: str) -> TealError:
    """What was needed and what is free, as far as the library tells."""
    needed = re.search(rf"ried to allocate {_AMOUNT}", said)
    free = re.search(rf"(?:total capacity of {_AMOUNT} )?of which {_AMOUNT} is free", said)
    on_device = bool(re.search("CUDA|CUBLAS", said))
    sentence = "there is not enough memory" + (" on the GPU" if on_device else "")
    if needed:
        sentence += f": {needed[1]} more were needed"
    if free:
        sentence += f", {free[2]} {f'of {free[1]} ' if free[1] else ''}are free"
    if not on_device:
        return TealError(sentence, hint=f"Use {_LESS_MEMORY}, or a smaller model.")
    return TealError(
        sentence,
        hint=f"Use {_LESS_MEMORY}, a smaller model, or --device cpu; "
        "`nvidia-smi` shows what other programs hold.",
    )
