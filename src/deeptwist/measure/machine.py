"""The machine that a figure was measured on, and what was timed on it before."""

import hashlib
import json
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from deeptwist._version import __version__
from deeptwist.files import write_text


def describe_machine() -> str:
    """Processor or accelerator, thread count and torch version."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        name = _cpuinfo("model name") or platform.processor() or platform.machine()
        processor = f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{processor}, torch {torch.__version__}, Python {platform.python_version()}"


def describe_environment() -> str:
    """Return what a bug report needs: versions of everything, processor, vector instructions."""
    names = {"torch", "numpy", "safetensors"}
    with suppress(PackageNotFoundError):  # run from its sources
        names |= {re.split(r"[^\w-]", line)[0] for line in requires("deeptwist") or ()}
    lines = [f"deeptwist {__version__}", describe_machine(), platform.platform()]
    # Whether int8 products have instructions of their own, where that can be seen.
    vnni = ", VNNI" if "vnni" in _cpuinfo("flags") else ""
    lines.append(f"vector instructions: {torch.backends.cpu.get_cpu_capability()}{vnni}")
    for name in sorted(names - {"deeptwist"}):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines)


class LatencyCache:
    """Milliseconds that were measured on this machine, in a JSON file that names it.

    It lies in ``$XDG_CACHE_HOME/deeptwist``, by default ``~/.cache/deeptwist``; without it, all is
    timed anew.
    """

    def __init__(self, runtime: str) -> None:
        """Read what was measured with this runtime, at PyTorch's present number of threads."""
        self._machine = f"{describe_machine()}, {runtime}"
        if runtime == "onnxruntime":
            self._machine += f" {version('onnxruntime')}"
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        digest = hashlib.sha256(self._machine.encode()).hexdigest()[:12]
        self.path = Path(home) / "deeptwist" / f"latency-{digest}.json"

    def read(self) -> dict[str, list[float]]:
        """Return the milliseconds by what was timed; none where the file is not to be read."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            values: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return {key: [float(ms) for ms in times] for key, times in values["times"].items()}
        return {}

    def add(self, key: str, times: list[float]) -> None:
        """Keep a measurement beside what other processes have kept; a disk may refuse."""
        values = {"machine": self._machine, "times": {**self.read(), key: times}}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(values, indent=1))


def _cpuinfo(key: str) -> str:
    """Return what Linux tells of the processor under a key; nothing elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((x.partition(":")[2].strip() for x in lines if x.startswith(key)), "")
    return ""
