"""Figure 3: training loss and test accuracy on the way, just before and just after distortions.

The two trainings of Figure 2 at about 4×. A distortion costs accuracy at first; by the end of
training the network stands where it costs little.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.paper.fig2 import conventional, deeptwist, pair
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Preset
from experiments.paper.results import (
    Report,
    Results,
    Table,
    count_holds,
    difference,
    is_higher,
    number,
)

from deeptwist.training.metrics import Run
from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Figure 3", "resnet32"
CLAIM = (
    "The gap between accuracy before and after a distortion closes, and DeepTwist ends above "
    "conventional fine-tuning."
)
Points = tuple[tuple[float, float], ...]


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return DeepTwist and conventional fine-tuning at one size."""
    return pair(preset, preset.reference_level)


def report(results: Results, preset: Preset) -> Report:
    """Return loss and accuracy over epochs, and the gap that distortions leave."""
    names = deeptwist(preset.reference_level), conventional(preset.reference_level)
    learnt, tuned = (results.course(name) for name in names)
    before, after = (_around(learnt, moment) for moment in (0, 1))
    loss = draw(
        "loss",
        "Training loss",
        [
            Curve("DeepTwist", over_epochs(learnt, "train_loss"), 0),
            Curve("conventional fine-tuning", over_epochs(tuned, "train_loss"), 1, dashed=True),
        ],
        x="epoch",
        y="training loss, mean over the epoch",
    )
    accuracy = draw(
        "accuracy",
        "Test accuracy around distortions",
        [
            Curve("just before a distortion", before, 0, line=False),
            Curve("just after it", after, 0, dashed=True),
            Curve("conventional fine-tuning", over_epochs(tuned, "accuracy"), 1, dashed=True),
        ],
        x="epoch",
        y="test accuracy, %",
    )
    first, last = _halves([x[1] - y[1] for x, y in zip(before, after, strict=True)])
    losses = (number(run.epochs[-1]["train_loss"] if run else None, 3) for run in (learnt, tuned))
    rows = (
        ("training loss, last epoch", *losses),
        ("test accuracy at the end, %", *(results.shown(name) for name in names)),
        ("before − after a distortion, first half, points", number(first), ""),
        ("before − after a distortion, second half, points", number(last), ""),
    )
    end = difference(*(results.accuracy(name) for name in names))
    notes = [
        count_holds("The gap that a distortion leaves closes", [is_higher(first, last)]),
        f"At the end DeepTwist is {end} points from conventional.",
    ]
    if learnt is not None:
        images = learnt.summary.recipe["records"]["images"]
        notes.append(f"Around distortions: on {images} images spread over the test split.")
    notes.append("The paper prints no numbers of this figure.")
    table = Table(f"Tucker {preset.reference_level}", ("", "DeepTwist", "conventional"), rows)
    return Report((table,), loss + accuracy, tuple(notes))


def over_epochs(run: Run | None, key: str) -> Points:
    """Return (epoch, value) of a run: ``train_loss``, or ``accuracy`` or ``top5`` in percent."""
    if run is None:
        return ()
    if key == "train_loss":
        return tuple((epoch["epoch"], epoch[key]) for epoch in run.epochs)
    values = [(epoch["epoch"], epoch["test"].get(key)) for epoch in run.epochs]
    return tuple((epoch, 100 * value) for epoch, value in values if value is not None)


def distortions_of(run: Run | None) -> list[dict[str, Any]]:
    """Return a run's distortions, without one that follows another at once."""
    by_step: dict[int, dict[str, Any]] = {}
    for distortion in run.distortions if run else ():
        by_step.setdefault(distortion["step"], distortion)
    return list(by_step.values())


def epoch_of(run: Run, distortion: dict[str, Any]) -> float:
    """Return where in a run a distortion is, in epochs."""
    return float(distortion["step"] / run.summary.steps * len(run.epochs))


def _around(run: Run | None, moment: int) -> Points:
    """Return (epoch, test accuracy in percent) just before (0) or after (1) each distortion."""
    return tuple(
        (epoch_of(run, each), 100 * each["test"][moment]["accuracy"])
        for each in distortions_of(run)
        if run is not None and each["test"]
    )


def _halves(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the means of the first and of the second half; `None` if there are no two values."""
    if len(values) < 2:
        return None, None
    middle = len(values) // 2
    return statistics.fmean(values[:middle]), statistics.fmean(values[middle:])
