"""Figure 4: how far distortions move the weights (Δw) and raise the loss (ΔL/L) on the way.

DeepTwist's training of Figure 3. Both fall as the network settles in a flat place near low-rank
weights, and with every fall of the learning rate.
"""

import math
import statistics
from itertools import groupby
from typing import Any

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig2 import deeptwist, pair
from experiments.paper.experiments.fig3 import distortions_of, epoch_of
from experiments.paper.findings import Findings, Finished, Table, above, count_note
from experiments.paper.profiles import Setting

_FEW = 5  # learning rates up to which each is a stretch of its own


def cells(setting: Setting) -> list[Cell]:
    """DeepTwist at one size."""
    return pair(setting, setting.middle)[:1]


def show(finished: Finished, setting: Setting) -> Findings:
    """Δw and ΔL/L over the epochs, and their means over stretches of the training."""
    run = finished.first(deeptwist(setting.middle))
    distortions = distortions_of(run)
    shifts, losses = (
        tuple(
            (epoch_of(run, one), float(one[key]))
            for one in distortions
            if run is not None and one[key] is not None and math.isfinite(one[key])
        )
        for key in ("weight_shift", "loss_increase")
    )
    figures = (
        chart(
            "shift",
            "Δw",
            [Curve("Δw", shifts, 0)],
            x="epoch",
            y="Δw = ‖W − W′‖ ÷ N",
            log_y=True,
        ),
        chart("increase", "ΔL/L", [Curve("ΔL/L", losses, 1)], x="epoch", y="ΔL/L"),
    )
    rows = tuple(
        (name, str(len(some)), _mean(some, "weight_shift"), _mean(some, "loss_increase"))
        for name, some in _stretches(distortions)
    )
    return Findings(
        (
            Table(
                f"Tucker {setting.middle}, DeepTwist: means over distortions",
                ("stretch", "distortions", "Δw", "ΔL/L"),
                rows or (("all", "not run", "not run", "not run"),),
            ),
        ),
        tuple(figure for figure in figures if figure is not None),
        (
            count_note("Δw falls from the first distortion to the last", [_falls(shifts)]),
            count_note("ΔL/L falls from the first distortion to the last", [_falls(losses)]),
            "The paper prints no numbers of this figure.",
        ),
    )


def _stretches(distortions: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Those of one learning rate; thirds of the training where the rate falls all the time."""
    by_rate = [
        (f"learning rate {rate:g}", list(some))
        for rate, some in groupby(distortions, key=lambda one: float(one["lr"]))
    ]
    if len(by_rate) <= _FEW:
        return by_rate
    ends = [round(len(distortions) * third / 3) for third in range(4)]
    names = "first third", "second third", "last third"
    return [
        (name, distortions[start:end])
        for name, start, end in zip(names, ends, ends[1:], strict=False)
    ]


def _mean(distortions: list[dict[str, Any]], key: str) -> str:
    found = [float(one[key]) for one in distortions if one[key] is not None]
    return f"{statistics.fmean(found):.3g}" if found else "–"


def _falls(points: tuple[tuple[float, float], ...]) -> bool | None:
    return above(points[0][1], points[-1][1]) if len(points) > 1 else None


EXPERIMENT = Experiment(
    name="fig4",
    place="Figure 4",
    claim="ΔL/L and Δw fall over distortion steps, sharply where the learning rate does.",
    network="resnet32",
    cells=cells,
    show=show,
)
