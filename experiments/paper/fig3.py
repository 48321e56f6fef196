"""Figure 3: training loss and test accuracy on the way, just before and just after distortions.

The two trainings of Figure 2 at about 4×. A distortion costs accuracy at first; by the end of
training the network stands where it costs little.
"""

import statistics
from typing import Any

from experiments.paper.fig2 import ACCURACY, conventional, deeptwist, pair
from experiments.paper.plotting import Curve, Points, draw
from experiments.paper.presets import Network, Preset
from experiments.paper.results import Report, Results, Table, count_holds, is_higher, number

from deeptwist.app.training.metrics import Run
from deeptwist.app.training.recipe import Recipe

PLACE = "Figure 3"
NETWORK: Network = "resnet32"
CLAIM = (
    "The gap between accuracy before and after a distortion closes, and DeepTwist ends above "
    "conventional fine-tuning."
)
TUNED = "conventional fine-tuning"


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return DeepTwist and conventional fine-tuning at one size."""
    return pair(preset, preset.reference_level)


def report(results: Results, preset: Preset) -> Report:
    """Return loss and accuracy over epochs, and the gap that distortions leave."""
    names = deeptwist(preset.reference_level), conventional(preset.reference_level)
    runs = learnt, tuned = [results.course(name) for name in names]
    before, after = _around(learnt, 0), _around(learnt, 1)
    losses = [
        Curve("DeepTwist", over_epochs(learnt, "train_loss"), 0),
        Curve(TUNED, over_epochs(tuned, "train_loss"), 1, dashed=True),
    ]
    accuracies = [
        Curve("just before a distortion", before, 0, line=False),
        Curve("just after it", after, 0, dashed=True),
        Curve(TUNED, over_epochs(tuned, "accuracy"), 1, dashed=True),
    ]
    y = "training loss, mean over the epoch"
    figures = draw("loss", "Training loss", losses, x="epoch", y=y)
    title = "Test accuracy around distortions"
    figures += draw("accuracy", title, accuracies, x="epoch", y=ACCURACY)
    gaps = [ours[1] - distorted[1] for ours, distorted in zip(before, after, strict=True)]
    middle = len(gaps) // 2
    first, last = (
        statistics.fmean(half) if middle else None for half in (gaps[:middle], gaps[middle:])
    )
    last_losses = [number(run.epochs[-1]["train_loss"] if run else None, 3) for run in runs]
    rows = [
        ["training loss, last epoch", *last_losses],
        ["test accuracy at the end, %", *map(results.shown, names)],
        ["before − after a distortion, first half, points", number(first), ""],
        ["before − after a distortion, second half, points", number(last), ""],
    ]
    images = learnt.summary.recipe["records"]["images"] if learnt else 0
    notes = [
        count_holds("The gap that a distortion leaves closes", [is_higher(first, last)]),
        f"At the end DeepTwist is {results.difference(*names)} points from conventional.",
        *(
            [f"Around distortions: on {images} images spread over the test split."]
            if images
            else []
        ),
        "The paper prints no numbers of this figure.",
    ]
    table = Table(f"Tucker {preset.reference_level}", ["", "DeepTwist", "conventional"], rows)
    return Report([table], figures, notes)


def over_epochs(run: Run | None, key: str) -> Points:
    """Return (epoch, value) of a run: ``train_loss``, or ``accuracy`` or ``top5`` in percent."""
    epochs = run.epochs if run else []
    if key == "train_loss":
        return [(epoch["epoch"], epoch[key]) for epoch in epochs]
    values = [(epoch["epoch"], epoch["test"].get(key)) for epoch in epochs]
    return [(epoch, 100 * value) for epoch, value in values if value is not None]


def distortions_of(run: Run | None) -> list[tuple[float, dict[str, Any]]]:
    """Return a run's distortions with their epochs, without one that follows another at once."""
    by_step: dict[int, dict[str, Any]] = {}
    for distortion in run.distortions if run else ():
        by_step.setdefault(distortion["step"], distortion)
    length = run.summary.steps / len(run.epochs) if run else 1
    return [(step / length, distortion) for step, distortion in by_step.items()]


def _around(run: Run | None, moment: int) -> Points:
    """Return (epoch, test accuracy in percent) just before (0) or after (1) each distortion."""
    distortions = [(epoch, each["test"]) for epoch, each in distortions_of(run) if each["test"]]
    return [(epoch, 100 * test[moment]["accuracy"]) for epoch, test in distortions]
