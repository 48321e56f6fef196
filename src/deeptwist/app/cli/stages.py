"""The stages of a long command: each says what it does, is timed, recorded, and done once."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.files import write_text


class Stages:
    """The stages of a job in a folder, with what each came to in one JSON file.

    Attributes:
        results: of every stage that is done, by its name.
        seconds: that each took.
    """

    def __init__(self, record: Path, job: Mapping[str, Any], total: int, *, resume: bool):
        """Begin a job, or go on with one.

        Args:
            record: the JSON file.
            job: what was asked for, in plain values: only the same job is gone on with.
            total: number of stages.
            resume: whether the file may hold some of them already.

        Raises:
            DeepTwistError: if it holds a job and `resume` is not given, or it holds another job.
        """
        self._record, self._job, self._total = record, json.loads(json.dumps(job)), total
        self._number, self._started = 0, 0.0
        self.results: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeepTwistError(f"cannot write {record.parent}: {error.strerror}") from error
        if record.exists():
            self._read(resume=resume)

    def run(
        self, name: str, what: str, work: Callable[[], dict[str, Any]], says: Callable[..., str]
    ) -> dict[str, Any]:
        """Do a stage, or read what it came to.

        Args:
            name: of the stage.
            what: it does, for the line that announces it.
            work: does it; its result is plain values.
            says: the result's values by name → the line that tells it.
        """
        self.begin(name, what)
        if name in self.results:
            self.end(says(**self.results[name]), "done already")
            return self.results[name]
        self.results[name] = work()
        self.seconds[name] = time.perf_counter() - self._started
        self._write()
        self.end(says(**self.results[name]))
        return self.results[name]

    def begin(self, name: str, what: str) -> None:
        """Announce a stage: what it is called and does."""
        self._number += 1
        print(f"[{self._number}/{self._total}] {name}: {what}", file=sys.stderr, flush=True)
        self._started = time.perf_counter()

    def end(self, result: str, took: str | None = None) -> None:
        """Tell what the stage came to, and its time unless that is told otherwise."""
        took = took or f"{time.perf_counter() - self._started:.1f} s"
        print(f"      {result} ({took})", file=sys.stderr, flush=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the job and its results as plain values."""
        return {"job": self._job, "results": self.results, "seconds": self.seconds}

    def _read(self, *, resume: bool) -> None:
        folder = self._record.parent
        if not resume:
            raise DeepTwistError(
                f"{folder} holds a job: go on with it (--resume), choose another folder or "
                "remove it"
            )
        try:
            values = json.loads(self._record.read_text(encoding="utf-8"))
            job, self.results, self.seconds = (values[k] for k in ("job", "results", "seconds"))
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise DeepTwistError(f"{self._record} is damaged: {first_line(error)}") from error
        changed = [key for key, value in self._job.items() if job.get(key) != value]
        if changed:
            raise DeepTwistError(
                f"{folder} holds another job ({', '.join(changed)} differ): choose another folder"
            )

    def _write(self) -> None:
        try:
            write_text(self._record, json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        except OSError as error:
            raise DeepTwistError(f"cannot write {self._record}: {error.strerror}") from error
