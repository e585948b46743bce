"""What a figure or a fault depends on besides the model: machine, device, versions, folders.

torch is imported where it is needed: `describe` says so where it cannot be.
"""

from __future__ import annotations

import importlib
import locale
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_cli import threads
from teal_cli.errors import whole
from teal_cli.store import paths
from teal_cli.version import __version__

if TYPE_CHECKING:
    import torch

_LIBRARIES = ("torch", "transformers", "triton", "numba")
_OTHER_LIBRARIES = (
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "gguf",
    "datasets",
    "typer",
    "rich",
    "prompt_toolkit",
    "lm_eval",
    "matplotlib",
)
_BACKENDS = {"numba (CPU)": "teal_kernels.cpu", "triton (CUDA)": "teal_kernels.gpu"}
# Of other variables only the name is shown: a value can be a secret, or hold one.
_SHOWN = (
    "HF_HUB_OFFLINE",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "TEAL_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "CUDA_VISIBLE_DEVICES",
)
_WIDTH = 88
_PREFIXES = ("TEAL_", "HF_", "HUGGING", "NUMBA_", "TRITON_", "TORCH", "PYTORCH_")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and date, to stand beside every figure."""
    import torch

    versions = {"teal": __version__, "python": platform.python_version(), **_versions(_LIBRARIES)}
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "platform": platform.platform(),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe(variables: Mapping[str, str]) -> str:
    """A block for a bug report: what is installed, on what, and where; no secrets, no user name.

    Args:
        variables: the environment that the program was started in.
    """
    found = _versions(_LIBRARIES + _OTHER_LIBRARIES)
    missing = [name for name in _LIBRARIES + _OTHER_LIBRARIES if name not in found]
    rows = [
        ("teal", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in found.items())),
        ("not there", ", ".join(missing) or "none of those looked for"),
        *_machine(),
        *((name, _importable(module)) for name, module in _BACKENDS.items()),
        *_folders(),
        ("Hub token", _token()),
        ("variables", ", ".join(_variables(variables)) or "none"),
        ("terminal", _terminal()),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [
        textwrap.fill(
            value,
            _WIDTH,
            initial_indent=f"{name:<{width}}  ",
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
            break_on_hyphens=False,  # paths are to be copied
        )
        for name, value in rows
    ]
    return "\n".join(["```", *lines, "```"])


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> list[tuple[str, str]]:
    """The processor and the graphics cards, as torch sees them."""
    try:
        import torch

        cpu = torch.device("cpu")
        free = available_memory(cpu)
        memory = "" if free is None else f", {free / 1e9:.1f} GB of memory free"
        rows = [("CPU", f"{device_name(cpu)}, {_threads()}{memory}")]
        if torch.cuda.is_available():
            rows += [_graphics_card(index) for index in range(torch.cuda.device_count())]
        else:
            built = torch.version.cuda
            reason = (
                f"torch was built for CUDA {built}" if built else "torch was built without CUDA"
            )
            rows.append(("GPU", f"none ({reason})"))
    except Exception as error:  # a broken installation is what is to be reported
        return [("torch", _failure(error))]
    return rows


def _threads() -> str:
    """How many compute where nobody says otherwise, and why no more."""
    count, cores, all_cores = threads.default(), threads.usable(), os.cpu_count()
    limit = "" if cores == all_cores else f", for us {cores}"
    return f"{count} thread{'' if count == 1 else 's'} of {all_cores} cores{limit}"


def _graphics_card(index: int) -> tuple[str, str]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return f"GPU {index}", (
        f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, "
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, CUDA {torch.version.cuda}"
    )


def _importable(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken numba, Triton or LLVM fails in any way it likes
        return _failure(error)
    return "can be imported"


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {whole(error)}"


def _folders() -> list[tuple[str, str]]:
    try:
        folders = [
            ("data", paths.data_dir()),
            ("cache", paths.cache_dir()),
            ("state", paths.state_dir()),
        ]
        from huggingface_hub import constants

        folders.append(("Hub cache", Path(constants.HF_HUB_CACHE)))
    except Exception as error:  # a broken installation is what is to be reported
        return [("folders", _failure(error))]
    return [(name, _folder(path)) for name, path in folders]


def _folder(path: Path) -> str:
    """A folder below the user's home as ~, and the room on its disk."""
    home = str(Path.home())
    shown = f"~{str(path)[len(home) :]}" if path.is_relative_to(home) else str(path)
    there = path
    while not there.exists():
        there = there.parent
    free = f"{shutil.disk_usage(there).free / 1e9:.1f} GB free"
    rights = "" if os.access(there, os.W_OK) else ", cannot be written"
    return f"{shown} ({'' if there == path else 'not there yet, '}{free}{rights})"


def _token() -> str:
    try:
        from huggingface_hub import get_token

        return "present" if get_token() else "none"
    except Exception as error:  # a broken installation is what is to be reported
        return _failure(error)


def _variables(variables: Mapping[str, str]) -> list[str]:
    """Those that can change what teal does."""
    names = [name for name in sorted(variables) if name in _SHOWN or name.startswith(_PREFIXES)]
    return [f"{name}={variables[name]}" if name in _SHOWN else name for name in names]


def _terminal() -> str:
    size = shutil.get_terminal_size()
    encoding = getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding(False)
    return f"{os.environ.get('TERM', 'none')}, {size.columns} x {size.lines}, {encoding}"


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name as it gives it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    found = [amount for amount in (_memory_of_machine(), _memory_of_container()) if amount]
    return min(found) if found else None


def _memory_of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return None


def _memory_of_container() -> int | None:
    """What the container's limit (cgroup 2) leaves; page cache counts as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
        cached = int(statistics[statistics.index("file") + 1])
    except (OSError, ValueError):
        return None
    return limit - used + cached
