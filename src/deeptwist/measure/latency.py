"""Milliseconds here: what they are of, what was measured before, what a plan promises."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.files import write_text
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import DType, Runtime, prepare


@dataclass(frozen=True)
class LatencySetting:
    """What a budget of milliseconds is measured with.

    Attributes:
        batch: examples.
        runtime: what runs the network: eager, compile or onnxruntime.
        threads: of the processor; those that PyTorch has without it.

    Raises:
        DeepTwistError: if there is no such runtime, or a number is not positive.
    """

    batch: int = 16
    runtime: Runtime = "eager"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_int("batch", self.batch)
        if self.threads is not None:
            check_int("threads", self.threads)
        if self.runtime not in get_args(Runtime):
            raise unknown_name_error("runtime", self.runtime, get_args(Runtime))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the number of threads, and put it back."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def prepare(self, module: nn.Module, x: Tensor) -> Callable[[], object]:
        """Return a function that runs a network or layer on an input, in the input's dtype."""
        dtype: DType = str(x.dtype).removeprefix("torch.")  # type: ignore[assignment]
        threads = torch.get_num_threads()
        return prepare(module, x, runtime=self.runtime, dtype=dtype, threads=threads)

    def __str__(self) -> str:
        return f"{self.runtime}, batch {self.batch}"


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
        _ = self.setting

    @property
    def setting(self) -> LatencySetting:
        """What it is measured with."""
        return LatencySetting(self.batch, self.runtime, self.threads)


@dataclass(frozen=True)
class NetworkTimes:
    """Milliseconds of a whole network, timed in turn when it was planned.

    Attributes:
        dense: of the network as it was.
        planned: of one with factored layers of random numbers, which take as long as any.
        where: runtime, batch and machine.
    """

    dense: float
    planned: float
    where: str

    def __str__(self) -> str:
        speedup = self.dense / self.planned
        return f"{self.dense:.2f} → {self.planned:.2f} ms, {speedup:.2f}× as fast ({self.where})"


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
