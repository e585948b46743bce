"""Any failure as one sentence and a next step: the system's, the device's memory, a bug of ours."""

from __future__ import annotations

import errno
import os
import re

from teal_cli.errors import TealError, on_one_line

_FREE = "Free some space, then run the same command again."
_PLACE = "Choose another place with TEAL_HOME."
_RIGHTS = "Choose another place with TEAL_HOME, or fix its rights."
_LOCAL = "Set TEAL_HOME (for the Hub's files HF_HOME) to a folder on a local disk."
_NETWORK = "Check the network, then run the same command again."
_SYSTEM_ERRORS = {
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EFBIG: ("the file is larger than the file system allows", _PLACE),
    errno.EACCES: ("permission denied", _RIGHTS),
    errno.EPERM: ("permission denied", _RIGHTS),
    errno.EROFS: ("the file system is read-only", _PLACE),
    errno.ENOENT: (
        "there is no such file or folder",
        "Check the path. If another process has removed it, run the same command again.",
    ),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Check the path."),
    errno.EISDIR: ("this is a folder, where a file should be", "Name a file."),
    errno.EEXIST: ("something of this name is there already", "Choose another name."),
    errno.ENOTEMPTY: (
        "the folder is not empty",
        "Another process may use it: run the same command again when that has ended.",
    ),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter name or path."),
    errno.ELOOP: ("the links lead in a circle", "Name the file or folder itself."),
    errno.EILSEQ: ("the file system allows no such name", "Choose a name of plain letters."),
    errno.EINVAL: ("the file system cannot do this", _PLACE),
    errno.EXDEV: ("the folders are on different devices", "Put them on one, with TEAL_HOME."),
    errno.EBUSY: ("this is in use", "Run the same command again when what uses it has ended."),
    errno.EMFILE: ("too many files are open", "Raise the limit: ulimit -n 4096"),
    errno.ENFILE: ("too many files are open on this machine", "Close some programs."),
    errno.ENOLCK: ("the file system has no locks to give", _LOCAL),
    errno.ENOSYS: ("the file system cannot do this", _LOCAL),
    errno.EOPNOTSUPP: ("the file system cannot do this", _LOCAL),
    errno.ESTALE: ("the network file system has lost this", "Mount it anew, or: " + _LOCAL),
    errno.EIO: ("the device does not read or write", "Check the disk, or the terminal."),
    errno.ENXIO: ("there is no such device", "Check the path."),
    errno.ENODEV: ("there is no such device", "Check the path."),
    errno.EBADF: ("a stream is closed, or not open for this", "Check the redirections."),
    errno.ETIMEDOUT: ("the connection, or the network's disk, does not answer", _NETWORK),
    errno.ECONNREFUSED: ("the connection was refused", _NETWORK),
    errno.ECONNRESET: ("the connection broke off", _NETWORK),
    errno.ENETUNREACH: ("the network cannot be reached", _NETWORK),
    errno.EHOSTUNREACH: ("the network cannot be reached", _NETWORK),
}
_ELSE = "Check the path and the disk, or choose another place with TEAL_HOME."
# Their numbers are not the system's: a failed certificate has the 1 of EPERM.
_OTHER_NUMBERS = ("gaierror", "herror", "SSLError", "SSLCertVerificationError")
_LESS_MEMORY = "a shorter context or text, quantized weights (--quantize int8 or int4)"
# What torch, CUDA, cuBLAS and Triton say, each in errors of its own class.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_AMOUNT = r"([\d.]+ (?:bytes|[KMGT]iB))"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the host's."""
    # torch's own class, by name: torch may never have been imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def explain(error: Exception) -> TealError:
    """The error itself if it is for the user, else one that says in a sentence what happened."""
    if isinstance(error, TealError):
        return error
    if is_out_of_memory(error):
        return _out_of_memory(str(error))
    if isinstance(error, OSError):
        name = _name(error)
        sentence, hint = reason(error)
        return TealError(f"{sentence}: {name}" if name else sentence, hint=hint)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's
        return explain(OSError(errno.ELOOP, "", str(error).partition("'")[2].rstrip("'")))
    if isinstance(error, UnicodeEncodeError) and _is_no_text(error):
        return TealError(
            f"a name is not UTF-8 text: {error.object!r}",
            hint="Rename the file or folder, or reach it by a link with a plain name.",
        )
    said = on_one_line(str(error))
    sentence = f"internal error ({type(error).__name__}{': ' + said if said else ''})"
    if os.environ.get("TEAL_DEBUG") == "1":
        return TealError(sentence, hint="Report it with this traceback and what `teal --env` says.")
    return TealError(f"{sentence}, run with TEAL_DEBUG=1 for the traceback")


def reason(error: OSError) -> tuple[str, str]:
    """Why the system refused, without the name of what it was about; and the next step."""
    if type(error).__name__ in _OTHER_NUMBERS:
        return f"the connection failed ({on_one_line(error.strerror or str(error))})", _NETWORK
    if error.errno in _SYSTEM_ERRORS:
        return _SYSTEM_ERRORS[error.errno]
    if error.errno is not None:
        said = error.strerror or os.strerror(error.errno)
        return f"the system refuses ({on_one_line(said)})", _ELSE
    # A library's own, such as transformers': its text says what it is about.
    return on_one_line(str(error)) or type(error).__name__, _ELSE


def _name(error: OSError) -> str | None:
    """What the error is about; None where the system does not say, or says it by a number."""
    if type(error).__name__ in _OTHER_NUMBERS:
        return None
    name = error.filename
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) and name else None


def _is_no_text(error: UnicodeEncodeError) -> bool:
    """Whether it is a file's name that failed: only there bytes become such halves of pairs."""
    failed = error.object[error.start : error.end]
    return all("\udc80" <= c <= "\udcff" for c in failed) and len(error.object) < 4096


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
