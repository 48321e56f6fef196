"""A run's folder while it trains: claimed by one process, written so that it can be cut."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.serialization import fsync, write_text
from deeptwist.training import records
from deeptwist.training.checkpoints import read_checkpoint, remove_checkpoints, write_checkpoint
from deeptwist.training.loop import Hooks, Training
from deeptwist.training.recipe import Recipe
from deeptwist.training.records import Epoch, Record

_LOCK, _BOARD = ".lock", "tensorboard"


class Folder:
    """The records and checkpoints of one training; only the first process writes.

    Attributes:
        path: of the folder.
        seconds: that the training has taken, before it was cut included.
    """

    def __init__(self, path: Path, fabric: Fabric):
        self.path = path
        self._fabric = fabric
        self._started = time.perf_counter()
        self._metrics = path / records.METRICS
        self._board: TensorBoardLogger | None = None

    @property
    def seconds(self) -> float:  # noqa: D102
        return time.perf_counter() - self._started

    def train(
        self,
        training: Training,
        on_record: Callable[[Record], None],
        on_step: Callable[[], None],
    ) -> Hooks:
        """Trains from the last checkpoint, or from the start, to the end.

        Raises:
            DeepTwistError: if training fails, or a checkpoint cannot be read or written.
        """
        self.path.mkdir(exist_ok=True)
        self._restore(training)
        for _ in range(training.step):
            on_step()
        hooks = Hooks(
            on_record=lambda record: self._record(record, on_record),
            on_step=on_step,
            on_checkpoint=lambda: self._checkpoint(training),
        )
        training.fit(hooks)
        return hooks

    def close(self) -> None:
        """Ends the records, and removes the checkpoints: nothing is left to continue."""
        if self._board is not None:
            self._board.finalize("success")
        if self._fabric.is_global_zero:
            remove_checkpoints(self.path)

    def _restore(self, training: Training) -> None:
        state = read_checkpoint(self.path)
        if state is not None:
            try:
                training.load_state_dict(state["training"])
                self._started -= float(state["seconds"])
                size = int(state["metrics"])
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise DeepTwistError(
                    f"the checkpoints in {self.path} are of another run: {first_line(error)}"
                ) from None
        if self._fabric.is_global_zero:
            with self._metrics.open("ab") as file:
                known = 0 if state is None else size
                if file.tell() < known:
                    raise DeepTwistError(
                        f"'{self._metrics}' holds {file.tell()} bytes, and held {known} at the "
                        f"last checkpoint: records are lost, remove {self.path} to start anew"
                    )
                file.truncate(known)
            self._board = TensorBoardLogger(
                self.path, name="", version=_BOARD, purge_step=training.step
            )
        self._fabric.barrier()

    def _checkpoint(self, training: Training) -> None:
        if self._fabric.is_global_zero:
            fsync(self._metrics)  # a checkpoint must not outlive the records that it counts on
            state = {
                "training": training.state_dict(),
                "metrics": self._metrics.stat().st_size,
                "seconds": self.seconds,
            }
            write_checkpoint(self.path, training.step, state)

    def _record(self, record: Record, on_record: Callable[[Record], None]) -> None:
        if self._fabric.is_global_zero:
            records.append(self._metrics, record)
            if self._board is not None:
                self._board.log_metrics(_scalars(record), record.step)
            on_record(record)


@contextmanager
def claimed(path: Path, recipe: Recipe, fabric: Fabric, *, resume: bool) -> Iterator[None]:
    """The folder of a run, for this process (and those that train with it) alone.

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
    except Timeout:
        raise DeepTwistError(f"{path} is in use by another process: wait for it") from None
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from None
    try:
        check_recipe(path, recipe, resume=resume)
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(path / records.RECIPE, text)
        fabric.barrier()
        yield
    finally:
        lock.release()


def check_recipe(path: Path, recipe: Recipe, *, resume: bool) -> None:
    """Checks that a folder may be trained in.

    Raises:
        DeepTwistError: if it holds a run and `resume` is not given, or one of another recipe.
    """
    known = path / records.RECIPE
    if not known.exists():
        if (path / records.SUMMARY).exists():
            raise DeepTwistError(f"{path} holds a run of an older version: choose another folder")
        return
    if not resume:
        raise DeepTwistError(
            f"{path} holds a run: go on with it (--resume), choose another folder or remove it"
        )
    before = yaml.safe_load(known.read_text(encoding="utf-8"))
    changed = [key for key, value in recipe.to_dict().items() if before.get(key) != value]
    if changed:
        raise DeepTwistError(
            f"{path} holds a run of another recipe ({', '.join(changed)} differ): "
            "choose another folder"
        )


def _scalars(record: Record) -> dict[str, float]:
    """What TensorBoard draws of a record."""
    if isinstance(record, Epoch):
        return {
            "epoch/train_loss": record.train_loss,
            "epoch/test_loss": record.test.loss,
            "epoch/test_accuracy": record.test.accuracy,
            "epoch/lr": record.lr,
            "epoch/images_per_second": record.images_per_second,
        }
    values = {"distortion/weight_shift": record.distortion.weight_shift}
    if record.distortion.loss_increase is not None:
        values["distortion/loss_increase"] = record.distortion.loss_increase
    for split, found in (("train", record.train), ("test", record.test)):
        for moment, one in zip(("before", "after"), found, strict=False):
            values[f"distortion/{split}_loss_{moment}"] = one.loss
            values[f"distortion/{split}_accuracy_{moment}"] = one.accuracy
    return values
