"""The records of a run: one summary, and one line per epoch and distortion.

A run's folder holds ``recipe.yaml``, ``plan.json`` and, while it trains, ``metrics.jsonl`` and the
last checkpoints; then the model under ``model/`` (``weights.safetensors`` for a dense one), and
last of all ``run.json``, so that a folder with ``run.json`` is a finished run.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deeptwist.app.training.modes import mode_name
from deeptwist.errors import DeepTwistError
from deeptwist.files import write_text
from deeptwist.measure.compare import Comparison
from deeptwist.plan.plan import Plan
from deeptwist.twist.distortion import Distortion

SUMMARY, METRICS, PLAN, RECIPE = "run.json", "metrics.jsonl", "plan.json", "recipe.yaml"
ARTEFACT = "model"
DENSE_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy on a split.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share of the images whose first guess is right (0 to 1).
        top5: share of those with the right one among the first five; `None` where there are no
            more classes than that.
    """

    loss: float
    accuracy: float
    top5: float | None = None


@dataclass(frozen=True)
class Epoch:
    """One pass over the training split.

    Attributes:
        epoch: from 1.
        step: optimizer steps so far.
        train_loss: mean over the epoch's images, augmented, before each step.
        test: on the test split with the weights as training left them, so in DeepTwist mode
            not on low-rank ones.
        lr: the learning rate at the end.
        seconds: of training alone, distortions not counted.
        images_per_second: trained on in that time.
    """

    epoch: int
    step: int
    train_loss: float
    test: Evaluation
    lr: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class DistortionRecord:
    """A distortion during training, with the network just before and just after it.

    Attributes:
        distortion: what it changed.
        lr: the learning rate.
        seconds: of the distortion alone.
        train: before and after, on a fixed subset of the training split, not augmented; empty
            where none is recorded.
        test: the same on the test split.
    """

    distortion: Distortion
    lr: float
    seconds: float
    train: tuple[Evaluation, ...] = ()
    test: tuple[Evaluation, ...] = ()

    @property
    def step(self) -> int:
        """Return the number of optimizer steps before it."""
        return self.distortion.step


Record = Epoch | DistortionRecord


@dataclass(frozen=True)
class Variant:
    """A network that is derived from a run's by something that the paper does not do.

    Attributes:
        name: ``"not recalibrated"``, ``"moving average"``, ``"best on validation"`` or ``"tail"``;
            ``"recalibrated"`` in runs of earlier versions.
        accuracy: as `Summary.accuracy`.
        loss: as `Summary.loss`.
        path: of its weights, in the run's folder.
    """

    name: str
    accuracy: float
    loss: float
    path: str


@dataclass(frozen=True)
class Summary:
    """The result of a finished run. Accuracies are shares of the test split's images.

    Attributes:
        name: of the run, as tables call it.
        mode: see `training.modes`.
        model: the network's name.
        data: the data set's name.
        decomposition: as configured; `None` for a dense run.
        ratio: as configured, of each compressed layer.
        accuracy_before: of the dense network that the run started from.
        accuracy_untrained: of that network decomposed without any training.
        accuracy: of the network that the run ended with, in fp32, in its deployed form.
        loss: of the same.
        parameters_before: of the dense network.
        parameters: of the network that the run ended with.
        macs_before: for one image, of the dense network.
        macs: for one image.
        bytes: of the weights' file.
        steps: optimizer steps of the run.
        seconds: of the whole run, evaluations included.
        output_difference: ‖y − y′‖ / ‖y‖ of the decomposed against the distorted network.
        latency: for one batch, dense and decomposed in turn.
        latency_batch: images in that batch.
        variants: networks derived from this one as the recipe asks.
        recipe: of the run, see `training.recipe.Recipe.to_dict`.
        processes: number of processes that trained together.
        machine: in one line.
        version: of deeptwist.
        top5: as `Evaluation.top5`, of the network that the run ended with.
        top5_before: the same of the dense network that it started from.
    """

    name: str
    mode: str
    model: str
    data: str
    decomposition: str | None
    ratio: float | None
    accuracy_before: float
    accuracy_untrained: float | None
    accuracy: float
    loss: float
    parameters_before: int
    parameters: int
    macs_before: int
    macs: int
    bytes: int
    steps: int
    seconds: float
    output_difference: float | None
    latency: Comparison | None
    latency_batch: int | None
    variants: tuple[Variant, ...]
    recipe: dict[str, Any]
    processes: int
    machine: str
    version: str
    top5: float | None = None
    top5_before: float | None = None

    def write(self, folder: Path) -> None:
        """Write ``run.json``, which marks the run as finished."""
        write_text(folder / SUMMARY, json.dumps(asdict(self), indent=1, ensure_ascii=False))


@dataclass(frozen=True)
class Run:
    """A finished run as read from its folder.

    Attributes:
        summary: see `Summary`.
        epochs: one dictionary per epoch, see `Epoch`.
        distortions: one per distortion, see `DistortionRecord`; the fields of `Distortion`
            are at the top.
        plan: `None` for a dense run.
    """

    summary: Summary
    epochs: list[dict[str, Any]]
    distortions: list[dict[str, Any]]
    plan: Plan | None


def append_record(path: Path, record: Record) -> None:
    """Append one line to ``metrics.jsonl``."""
    values = asdict(record)
    if isinstance(record, DistortionRecord):
        values |= values.pop("distortion")
    event = "epoch" if isinstance(record, Epoch) else "distortion"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **values}) + "\n")


def read_run(folder: Path) -> Run:
    """Read a finished run, one of an earlier version too.

    Raises:
        DeepTwistError: if the folder holds none, or a damaged one.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise DeepTwistError(f"no finished run in {folder}: it has no {SUMMARY}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["mode"] = mode_name(values["mode"])
        values.setdefault("variants", values.pop("refined", ()))  # as earlier versions called them
        summary = TypeAdapter(Summary).validate_python(values)
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        epochs, distortions = (
            [line for line in metrics if line["event"] == event]
            for event in ("epoch", "distortion")
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DeepTwistError(f"{folder} holds a damaged run: {reason}") from error
    plan = folder / PLAN
    return Run(
        summary=summary,
        epochs=epochs,
        distortions=distortions,
        plan=Plan.from_json(plan.read_text(encoding="utf-8")) if plan.is_file() else None,
    )
