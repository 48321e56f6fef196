"""A budget of time, and what was timed on this machine before."""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deeptwist.errors import DeepTwistError
from deeptwist.files import write_text
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import Runtime, Setting, dtype_name


@dataclass(frozen=True)
class Latency:
    """A budget of time: what the whole network is to take, measured here.

    Attributes:
        speedup: dense ÷ planned milliseconds, at least.
        ms: milliseconds, at most; in place of `speedup`.
        batch: examples.
        runtime: what runs the network: eager, compile or onnxruntime.
        threads: of the processor; those that PyTorch has without it.

    Raises:
        DeepTwistError: unless one of speedup and ms is given, or if a value makes no sense.
    """

    speedup: float | None = None
    ms: float | None = None
    batch: int = 16
    runtime: Runtime = "eager"
    threads: int | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.ms is None):
            raise DeepTwistError("speedup and ms are one budget of latency: give one of them")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise DeepTwistError(f"a latency speedup of {self.speedup} is not a number above 1")
        if self.ms is not None and not 0 < self.ms < math.inf:
            raise DeepTwistError(f"a latency of {self.ms} ms is not a number above 0")
        self.setting(torch.float32)

    def setting(self, dtype: torch.dtype) -> Setting:
        """Return what a network of this type is measured with."""
        threads = torch.get_num_threads() if self.threads is None else self.threads
        return Setting(self.batch, threads, dtype_name(dtype), self.runtime)

    def __str__(self) -> str:
        return f"{self.ms:g} ms" if self.speedup is None else f"{self.speedup:g}×"


class LatencyCache:
    """Milliseconds that were measured on this machine, in a JSON file that names it.

    It lies in ``$XDG_CACHE_HOME/deeptwist``, by default ``~/.cache/deeptwist``; without it, all is
    timed anew.
    """

    def __init__(self, runtime: Runtime) -> None:
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
