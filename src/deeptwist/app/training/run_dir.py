"""A run's folder while it trains: locked by one process, written so that it can be cut."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from deeptwist.app.folders import check_folder
from deeptwist.app.training.checkpoints import read_checkpoint, remove_checkpoints, write_checkpoint
from deeptwist.app.training.fabric import Fabric, TensorBoardLogger
from deeptwist.app.training.loop import Callbacks, Trainer
from deeptwist.app.training.metrics import METRICS, RECIPE, Epoch, Record, append_record
from deeptwist.app.training.recipe import Recipe, read_recipe
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.files import fsync, write_text

_LOCK, _TENSORBOARD = ".lock", "tensorboard"


class RunDir:
    """The records and checkpoints of one training; only the first process writes.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path, fabric: Fabric):
        self.path = path
        self._fabric = fabric
        self._started = time.perf_counter()
        self._metrics = path / METRICS
        self._tensorboard: TensorBoardLogger | None = None

    @property
    def seconds(self) -> float:
        """Return the time that the training has taken, before it was cut included."""
        return time.perf_counter() - self._started

    def train(
        self, trainer: Trainer, on_record: Callable[[Record], None], on_step: Callable[[], None]
    ) -> Callbacks:
        """Train from the last checkpoint, or from the start, to the end.

        Returns:
            The callbacks that the trainer was given.

        Raises:
            DeepTwistError: if training fails, or a checkpoint cannot be read or written.
        """
        self.path.mkdir(exist_ok=True)
        self._restore(trainer)
        for _ in range(trainer.step):
            on_step()

        def record(record: Record) -> None:
            if self._fabric.is_global_zero:
                append_record(self._metrics, record)
                if self._tensorboard is not None:
                    self._tensorboard.log_metrics(_scalars(record), record.step)
                on_record(record)

        callbacks = Callbacks(record, on_step, lambda: self._checkpoint(trainer))
        trainer.fit(callbacks)
        return callbacks

    def close(self) -> None:
        """End the records, and remove the checkpoints: nothing is left to continue."""
        if self._tensorboard is not None:
            self._tensorboard.finalize("success")
        if self._fabric.is_global_zero:
            remove_checkpoints(self.path)

    def _restore(self, trainer: Trainer) -> None:
        state, known = read_checkpoint(self.path), 0
        if state is not None:
            try:
                trainer.load_state_dict(state["training"])
                self._started -= float(state["seconds"])
                known = int(state["metrics"])
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise DeepTwistError(
                    f"the checkpoints in {self.path} are of another run: {first_line(error)}"
                ) from error
        if self._fabric.is_global_zero:
            self._drop_records_after(known)
            self._tensorboard = TensorBoardLogger(
                self.path, name="", version=_TENSORBOARD, purge_step=trainer.step
            )
        self._fabric.barrier()

    def _drop_records_after(self, known: int) -> None:
        with self._metrics.open("ab") as file:
            if file.tell() < known:
                raise DeepTwistError(
                    f"'{self._metrics}' holds {file.tell()} bytes, and held {known} at the "
                    f"last checkpoint: records are lost, remove {self.path} to start anew"
                )
            file.truncate(known)

    def _checkpoint(self, trainer: Trainer) -> None:
        if self._fabric.is_global_zero:
            fsync(self._metrics)  # a checkpoint must not outlive the records that it counts on
            state = {
                "training": trainer.state_dict(),
                "metrics": self._metrics.stat().st_size,
                "seconds": self.seconds,
            }
            write_checkpoint(self.path, trainer.step, state)


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
        check_same_recipe(path, recipe, resume=resume)
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(path / RECIPE, text)
        fabric.barrier()
        yield
    finally:
        lock.release()


def check_same_recipe(path: Path, recipe: Recipe, *, resume: bool) -> None:
    """Check that a folder may be trained in.

    Raises:
        DeepTwistError: if it holds a run and `resume` is not given, or one of another recipe.
    """
    record = path / RECIPE
    known = _comparable(read_recipe(record)) if record.exists() else None
    check_folder(path, "run", known, _comparable(recipe), resume=resume)


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values but for those that a run may go on with others of."""
    values = recipe.to_dict()
    for key in ("workers", "skip_unreadable"):
        del values["data"][key]
    return values


def _scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a record that TensorBoard draws."""
    if isinstance(record, Epoch):
        return {
            "epoch/train_loss": record.train_loss,
            "epoch/test_loss": record.test.loss,
            "epoch/test_accuracy": record.test.accuracy,
            "epoch/lr": record.lr,
            "epoch/images_per_second": record.images_per_second,
        }
    scalars = {"distortion/weight_shift": record.distortion.weight_shift}
    if record.distortion.loss_increase is not None:
        scalars["distortion/loss_increase"] = record.distortion.loss_increase
    for split, evaluations in (("train", record.train), ("test", record.test)):
        for moment, evaluation in zip(("before", "after"), evaluations, strict=False):
            scalars[f"distortion/{split}_loss_{moment}"] = evaluation.loss
            scalars[f"distortion/{split}_accuracy_{moment}"] = evaluation.accuracy
    return scalars
