"""The machine that a figure was measured on, in one line."""

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from deeptwist._version import __version__


def describe_machine() -> str:
    """Processor or accelerator, thread count and torch version."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{processor}, torch {torch.__version__}, Python {platform.python_version()}"


def describe_environment() -> str:
    """Return what a bug report needs: versions of everything, processor, vector instructions."""
    names = {"torch", "numpy", "safetensors"}
    with suppress(PackageNotFoundError):  # run from its sources
        names |= {re.split(r"[^\w-]", line)[0] for line in requires("deeptwist") or ()}
    lines = [f"deeptwist {__version__}", describe_machine(), platform.platform()]
    lines.append(f"vector instructions: {torch.backends.cpu.get_cpu_capability()}{_vnni()}")
    for name in sorted(names - {"deeptwist"}):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines)


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _vnni() -> str:
    """Return whether int8 products have instructions of their own, where that can be seen."""
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return ", VNNI" if any("vnni" in flag for flag in flags) else ""


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
