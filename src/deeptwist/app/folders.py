"""What runs leave in their folders, and whether a folder may be worked in.

A run leaves one summary, and one line per epoch and distortion.
The folder holds ``recipe.yaml``, ``plan.json`` and, while it trains, ``metrics.jsonl`` and the last
checkpoints; then the model under ``model/`` (``weights.safetensors`` for a dense one), and last of
all ``run.json``, so that a folder with ``run.json`` is a finished run. In ``run.json``, accuracies
are shares of the test split's images, and MACs are of one image:

- ``name``, ``mode``, ``model``, ``data``, ``recipe``: of the run, as configured; ``decomposition``
  and ``ratio`` are `None` for a dense run;
- ``accuracy_before``, ``top5_before``: of the dense network that the run started from, and
  ``accuracy_untrained``: of that network decomposed without any training;
- ``accuracy``, ``top5``, ``loss``: of the network that the run ended with, in its deployed form, in
  fp32; ``top5`` is `None` where there are no more classes than that;
- ``parameters_before``, ``macs_before``, ``parameters``, ``macs``: of the same two networks, and
  ``bytes``: of the weights' file;
- ``output_difference``: ‖y − y′‖ / ‖y‖ of the decomposed against the distorted network;
- ``latency``: a `Comparison` of dense and decomposed for ``latency_batch`` images;
- ``variants``: ``name``, ``accuracy``, ``loss`` and ``path`` (in the folder) of networks derived
  from this one by what the paper does not do: ``"not recalibrated"``, ``"moving average"``,
  ``"best on validation"``, ``"tail"``;
- ``steps``: optimizer steps, ``seconds``: of the whole run, evaluations included; ``processes``,
  ``machine``, ``version``.

A line of an epoch has ``epoch``, ``step``, ``train_loss`` (mean over its images, augmented, before
each step), ``test`` (on the weights as training left them, so under DeepTwist not low-rank ones),
``lr``, ``seconds`` (of training alone) and ``images_per_second``. A line of a distortion has the
fields of `Distortion`, ``lr``, ``seconds`` (of the distortion alone), and ``train`` and ``test``:
evaluations just before and just after it on fixed subsets, not augmented, if any.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeptwist.app.training.recipe import Recipe, read_recipe
from deeptwist.errors import DeepTwistError, explaining

if TYPE_CHECKING:  # the command line's help must not wait for torch
    from deeptwist.compress import Values
    from deeptwist.plan.plan import Plan

SUMMARY, METRICS, PLAN, RECIPE = "run.json", "metrics.jsonl", "plan.json", "recipe.yaml"
JOB = "compress.json"
SMALL = "model"
DENSE_WEIGHTS = "weights.safetensors"
_MAY_CHANGE = ("workers", "skip_unreadable")  # of the data, where a run is gone on with


@dataclass(frozen=True)
class Run:
    """A finished run as read from its folder.

    Attributes:
        summary: of ``run.json``.
        epochs: the lines of epochs.
        distortions: the lines of distortions.
        plan: `None` for a dense run.
    """

    summary: "Values"
    epochs: "list[Values]"
    distortions: "list[Values]"
    plan: "Plan | None"


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run; raise a `DeepTwistError` if not."""
    if not (folder / SUMMARY).is_file():
        raise DeepTwistError(f"no finished run in {folder}: it has no {SUMMARY}")


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        DeepTwistError: if the folder holds none, or a damaged one.
    """
    check_finished(folder)
    from deeptwist.plan.plan import read_plan

    errors = OSError, LookupError, TypeError, ValueError
    with explaining(f"{folder} holds a damaged run", errors=errors):
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        epochs, distortions = (
            [values for values in records if values["event"] == event]
            for event in ("epoch", "distortion")
        )
        missing = [key for key in ("mode", "accuracy", "recipe") if key not in summary]
        if missing:
            raise ValueError(f"{SUMMARY} lacks {missing[0]}")
    plan = read_plan(folder / PLAN) if (folder / PLAN).is_file() else None
    return Run(summary, epochs, distortions, plan)


def read_job(folder: Path) -> "Values | None":
    """Read what a job was asked for (``job``), and each step's ``results`` and ``seconds``.

    Returns:
        `None` if the folder holds no job.

    Raises:
        DeepTwistError: if it is damaged.
    """
    path = folder / JOB
    if not path.exists():
        return None
    with explaining(f"{path} is damaged", errors=(OSError, LookupError, TypeError, ValueError)):
        values = json.loads(path.read_text(encoding="utf-8"))
        return {key: dict(values[key]) for key in ("job", "results", "seconds")}


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a recipe's values by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        nested = isinstance(value, Mapping)
        values |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def check_folder(
    folder: Path,
    kind: str,
    known: Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    *,
    resume: bool,
) -> None:
    """Check that a folder is free, or holds work of this kind that is to be gone on with.

    What is to be gone on with, but had not begun, begins in an empty folder alone.

    Args:
        folder: where the work goes.
        kind: a job or a run.
        known: what was asked for in the work that the folder holds; `None` where it holds none.
        asked: what is asked for now, of which every value must be the same.
        resume: whether that work is to be gone on with.

    Raises:
        DeepTwistError: if it holds work and `resume` is not given, or none and other files where it
            is, or other work than this.
    """
    if known is None:
        if resume and folder.is_dir() and any(not x.name.startswith(".") for x in folder.iterdir()):
            raise DeepTwistError(
                f"{folder} is not empty and holds no {kind} to go on with: choose another folder"
            )
        return
    if not resume:
        raise DeepTwistError(
            f"{folder} holds a {kind}: go on with it (--resume), choose another folder or remove it"
        )
    changed = [key for key, value in asked.items() if known.get(key) != value]
    if changed:
        before = flatten(known)
        values = [key for key, v in flatten(asked).items() if before.get(key, v) != v]
        changed = values or changed  # sections that only one of them has
        raise DeepTwistError(
            f"{folder} holds another {kind} ({', '.join(changed)} differ): choose another folder"
        )


def check_same_recipe(path: Path, recipe: Recipe, *, resume: bool) -> None:
    """Check that a folder may be trained in, see `check_folder`."""
    known = _comparable(read_recipe(path / RECIPE)) if (path / RECIPE).exists() else None
    check_folder(path, "run", known, _comparable(recipe), resume=resume)


def _comparable(recipe: Recipe) -> "Values":
    """Return a recipe's values but for those that a run may go on with others of."""
    values = recipe.to_dict()
    data = {key: value for key, value in values["data"].items() if key not in _MAY_CHANGE}
    return {**values, "data": data}
