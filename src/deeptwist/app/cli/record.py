"""The record of a job: its steps announced, timed, kept in one file, and each done once."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deeptwist.app.folders import JOB, RECIPE, check_folder, read_job
from deeptwist.compress import Values
from deeptwist.errors import DeepTwistError
from deeptwist.files import explaining_writes, write_text


class Record:
    """The steps of a job in a folder: each is announced, timed, recorded, and done once.

    Attributes:
        results: of every step that is done, by its name.
        seconds: that each took.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], total: int, *, resume: bool):
        """Begin a job, or go on with one.

        Args:
            folder: of the job; the record is one JSON file in it.
            asked: what was asked for, in plain values: only the same job is gone on with.
            total: number of steps.
            resume: whether the folder may hold some of them already.

        Raises:
            DeepTwistError: if it holds a job and `resume` is not given, or another job or run.
        """
        self._path, self._asked, self._total = folder / JOB, json.loads(json.dumps(asked)), total
        self._number, self._started = 0, 0.0
        known = read_job(folder) or {}
        self.results: dict[str, Values] = known.get("results", {})
        self.seconds: dict[str, float] = known.get("seconds", {})
        check_folder(folder, "job", known.get("job"), self._asked, resume=resume)
        if not known and (folder / RECIPE).exists():
            raise DeepTwistError(
                f"{folder} holds a run of 'deeptwist train': choose another folder"
            )
        with explaining_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, what: str, work: Callable[[], Values], describe: Callable[..., str]
    ) -> None:
        """Do a step, unless its result is there already; see `Step`."""
        self.begin(name, what)
        is_done = name in self.results
        if not is_done:
            self.results[name] = work()
            self.seconds[name] = time.perf_counter() - self._started
            with explaining_writes(self._path):
                write_text(self._path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        self.end(describe(**self.results[name]), "done already" if is_done else None)

    def begin(self, name: str, what: str) -> None:
        """Announce a step: what it is called and does."""
        self._number += 1
        print(f"[{self._number}/{self._total}] {name}: {what}", file=sys.stderr, flush=True)
        self._started = time.perf_counter()

    def end(self, result: str, took: str | None = None) -> None:
        """Tell what the step came to, and its time unless that is told otherwise."""
        took = took or f"{time.perf_counter() - self._started:.1f} s"
        print(f"      {result} ({took})", file=sys.stderr, flush=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the job and its results as plain values."""
        return {"job": self._asked, "results": self.results, "seconds": self.seconds}
