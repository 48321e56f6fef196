"""Figure 3: training loss and test accuracy on the way, just before and just after distortions.

The two trainings of Figure 2 at about 4×. A distortion costs accuracy at first; by the end of
training the network stands where it costs little.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig2 import conventional, deeptwist, pair
from experiments.paper.findings import (
    Findings,
    Finished,
    Table,
    above,
    count_note,
    difference,
    number,
)
from experiments.paper.profiles import Setting

from deeptwist.training.metrics import Run


def cells(setting: Setting) -> list[Cell]:
    """DeepTwist and conventional fine-tuning at one size."""
    return pair(setting, setting.middle)


def show(finished: Finished, setting: Setting) -> Findings:
    """Loss and accuracy over epochs, and the gap that distortions leave."""
    names = deeptwist(setting.middle), conventional(setting.middle)
    learnt, tuned = (finished.first(name) for name in names)
    before, after = (_around(learnt, moment) for moment in (0, 1))
    figures = (
        chart(
            "loss",
            "Training loss",
            [
                Curve("DeepTwist", loss_over_epochs(learnt), 0),
                Curve("conventional fine-tuning", loss_over_epochs(tuned), 1, dashed=True),
            ],
            x="epoch",
            y="training loss, mean over the epoch",
        ),
        chart(
            "accuracy",
            "Test accuracy around distortions",
            [
                Curve("just before a distortion", before, 0, line=False),
                Curve("just after it", after, 0, dashed=True),
                Curve("conventional fine-tuning", accuracy_over_epochs(tuned), 1, dashed=True),
            ],
            x="epoch",
            y="test accuracy, %",
        ),
    )
    gaps = [x[1] - y[1] for x, y in zip(before, after, strict=True)]
    first, last = _halves(gaps)
    rows = (
        ("training loss, last epoch", *(number(_last(run), 3) for run in (learnt, tuned))),
        ("test accuracy at the end, %", *(finished.shown(name) for name in names)),
        ("before − after a distortion, first half, points", number(first), ""),
        ("before − after a distortion, second half, points", number(last), ""),
    )
    ends = [finished.accuracy(name) for name in names]
    seen = "" if learnt is None else str(learnt.summary.recipe["records"]["images"])
    return Findings(
        (Table(f"Tucker {setting.middle}", ("", "DeepTwist", "conventional"), rows),),
        tuple(figure for figure in figures if figure is not None),
        (
            count_note("The gap that a distortion leaves closes", [above(first, last)]),
            f"At the end DeepTwist is {difference(ends[0], ends[1])} points from conventional.",
            *(
                [f"Around distortions: on {seen} images spread over the test split."]
                if seen
                else []
            ),
            "The paper prints no numbers of this figure.",
        ),
    )


def loss_over_epochs(run: Run | None) -> tuple[tuple[float, float], ...]:
    """(epoch, training loss) of a run."""
    return tuple((one["epoch"], one["train_loss"]) for one in (run.epochs if run else ()))


def accuracy_over_epochs(run: Run | None) -> tuple[tuple[float, float], ...]:
    """(epoch, test accuracy in percent) of a run."""
    return tuple(
        (one["epoch"], 100 * one["test"]["accuracy"]) for one in (run.epochs if run else ())
    )


def distortions_of(run: Run | None) -> list[dict[str, Any]]:
    """A run's distortions, without one that follows another at once and so changes nothing."""
    found = [] if run is None else run.distortions
    return [
        one
        for one, before in zip(found, [None, *found], strict=False)
        if before is None or one["step"] > before["step"]
    ]


def epoch_of(run: Run, distortion: dict[str, Any]) -> float:
    """Where in a run a distortion is, in epochs."""
    return float(distortion["step"] / run.summary.steps * len(run.epochs))


def _around(run: Run | None, moment: int) -> tuple[tuple[float, float], ...]:
    """(epoch, test accuracy in percent) just before (0) or just after (1) each distortion."""
    return tuple(
        (epoch_of(run, one), 100 * one["test"][moment]["accuracy"])
        for one in distortions_of(run)
        if run is not None and one["test"]
    )


def _halves(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The means of the first and of the second half; none where there are no two values."""
    if len(values) < 2:
        return None, None
    middle = len(values) // 2
    return statistics.fmean(values[:middle]), statistics.fmean(values[middle:])


def _last(run: Run | None) -> float | None:
    return None if run is None else float(run.epochs[-1]["train_loss"])


EXPERIMENT = Experiment(
    name="fig3",
    place="Figure 3",
    claim="The gap between accuracy before and after a distortion closes, and DeepTwist ends "
    "above conventional fine-tuning.",
    network="resnet32",
    cells=cells,
    show=show,
)
