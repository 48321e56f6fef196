"""A run's folder while it trains: locked by one process, written so that it can be cut."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from torch import nn

from deeptwist.app.folders import METRICS, RECIPE, check_same_recipe
from deeptwist.app.training.devices import Fabric, TensorBoardLogger
from deeptwist.app.training.loop import OnRecord, Trainer
from deeptwist.app.training.recipe import Recipe
from deeptwist.compress import Values
from deeptwist.errors import DeepTwistError, explaining
from deeptwist.files import fsync, write_state, write_text

logger = logging.getLogger("deeptwist")

_LOCK, _TENSORBOARD, _CHECKPOINTS = ".lock", "tensorboard", "checkpoint-*.pt"
_FORMAT = 2
_KEPT = 2  # the one before the last is for when the last turns out to be damaged


class RunDir:
    """The records and checkpoints of one training; only the first process writes.

    Attributes:
        path: of the folder.
        fabric: of the processes.
    """

    def __init__(
        self, path: Path, fabric: Fabric, on_record: OnRecord, on_step: Callable[[], object]
    ):
        self.path, self.fabric, self._on_record, self._on_step = path, fabric, on_record, on_step
        self._started = time.perf_counter()
        self._metrics = path / METRICS
        self._tensorboard: TensorBoardLogger | None = None

    @property
    def seconds(self) -> float:
        """Return the time that the training has taken, before it was cut included."""
        return time.perf_counter() - self._started

    def record(self, values: Values) -> None:
        """Add the line of an epoch or a distortion, and tell it."""
        if self._tensorboard is not None:  # in the first process
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            scalars = dict(_scalars(values["event"], values))
            self._tensorboard.log_metrics(scalars, values["step"])
            self._on_record(values)

    def train(self, trainer: Trainer) -> nn.Module:
        """Train from the last checkpoint, or from the start; return the network to deploy.

        Ctrl-C ends the step that is being made and writes a checkpoint; again, and it ends at once.

        Raises:
            KeyboardInterrupt: if it was interrupted.
            DeepTwistError: if training fails, or a checkpoint cannot be read or written.
        """
        self.path.mkdir(exist_ok=True)
        self._restore(trainer)
        for _ in range(trainer.step):
            self._on_step()
        with _interrupts() as is_interrupted:
            for saves in trainer.fit():
                # Several processes would not all stop after the same step.
                stops = self.fabric.world_size == 1 and is_interrupted()
                if saves or stops:
                    self._write_checkpoint(trainer)
                self._on_step()
                if stops:
                    raise KeyboardInterrupt
        return trainer.finish()

    def write(self, name: str, text: str) -> None:
        """Write a file of the run."""
        if self.fabric.is_global_zero:
            write_text(self.path / name, text)

    def below(self, name: str) -> "RunDir":
        """Return the folder of a second training in this one."""
        return RunDir(self.path / name, self.fabric, self._on_record, self._on_step)

    def close(self) -> None:
        """End the records, and remove the checkpoints: nothing is left to continue."""
        if self._tensorboard is not None:
            self._tensorboard.finalize("success")
            for path in self.path.glob(_CHECKPOINTS):
                path.unlink()

    def _restore(self, trainer: Trainer) -> None:
        """Load the last checkpoint, if there is one, and drop the records after it."""
        state, known = read_checkpoint(self.path), 0
        if state is not None:
            what = f"the checkpoints in {self.path} are of another run"
            kinds = DeepTwistError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
            with explaining(what, errors=kinds):
                trainer.load_state_dict(state["training"])
                self._started -= float(state["seconds"])
                known = int(state["metrics"])
        if self.fabric.is_global_zero:
            with self._metrics.open("ab") as file:
                if file.tell() < known:
                    raise DeepTwistError(
                        f"'{self._metrics}' holds {file.tell()} bytes, and held {known} at the "
                        f"last checkpoint: records are lost, remove {self.path} to start anew"
                    )
                file.truncate(known)
            self._tensorboard = TensorBoardLogger(
                self.path, name="", version=_TENSORBOARD, purge_step=trainer.step
            )
        self.fabric.barrier()

    def _write_checkpoint(self, trainer: Trainer) -> None:
        if self.fabric.is_global_zero:
            fsync(self._metrics)  # a checkpoint must not outlive the records that it counts on
            state = {
                "training": trainer.state_dict(),
                "metrics": self._metrics.stat().st_size,
                "seconds": self.seconds,
            }
            write_checkpoint(self.path, trainer.step, state)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Give the call that tells whether Ctrl-C was pressed; pressed again, it interrupts."""
    is_pressed = False

    def press(*_: object) -> None:
        nonlocal is_pressed
        if is_pressed:
            raise KeyboardInterrupt
        is_pressed = True

    is_ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, press) if is_ours else None
    try:
        yield lambda: is_pressed
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)


def write_checkpoint(folder: Path, step: int, state: Values) -> None:
    """Write tensors in plain containers after so many steps; remove all but the last two.

    Raises:
        DeepTwistError: if it cannot be written, on a full disk say; the last good one stays.
    """
    path = folder / f"checkpoint-{step:09}.pt"
    try:
        write_state(path, {"format": _FORMAT, **state})
    except OSError as error:
        raise DeepTwistError(
            f"cannot write '{path}' ({error.strerror}): the checkpoint before it is whole, "
            "make room and go on with --resume"
        ) from error
    for old in sorted(folder.glob(_CHECKPOINTS))[:-_KEPT]:
        old.unlink()


def read_checkpoint(folder: Path) -> Values | None:
    """Return the last checkpoint that can be read, `None` if there is none at all.

    One that is damaged or foreign is named in a warning, and the one before it taken.

    Raises:
        DeepTwistError: if there are checkpoints, and none can be read.
    """
    paths = sorted(folder.glob(_CHECKPOINTS), reverse=True)
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes surface as a dozen types
            logger.warning("'%s' is damaged (%s): not used", path, type(error).__name__)
            continue
        if isinstance(state, dict) and state.get("format") == _FORMAT:
            return state
        logger.warning("'%s' is not a checkpoint of this version of deeptwist: not used", path)
    if paths:
        raise DeepTwistError(f"no checkpoint in {folder} can be read: remove them to start anew")
    return None


@contextmanager
def lock_run_dir(path: Path, recipe: Recipe, fabric: Fabric, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a run for this process, and those that train with it, alone.

    Raises:
        DeepTwistError: if it cannot be written, another live process is using it, it holds a run
            and `resume` is not given, or one of another recipe.
    """
    if not fabric.is_global_zero:
        fabric.barrier()
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise DeepTwistError(f"{path} is in use by another process: wait for it") from error
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from error
    try:
        if (path / RECIPE).exists():  # or it is a job's folder, or nothing's
            check_same_recipe(path, recipe, resume=resume)
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(path / RECIPE, text)
        fabric.barrier()
        yield
    finally:
        lock.release()


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record that TensorBoard draws, each by its path."""
    if isinstance(value, list):
        value = dict(zip(("before", "after"), value, strict=False))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(f"{name}/{key}", inner)
    elif isinstance(value, float):
        yield name, value
