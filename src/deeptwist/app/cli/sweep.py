"""Which ratio can I afford: a network planned at several, and where the loss begins to run away."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deeptwist.app.cli.console import progress_bar
from deeptwist.app.cli.options import (
    CalibrationOptions,
    NetworkOptions,
    SweepOptions,
    given_sizes,
    make_job,
)
from deeptwist.app.training.evaluation import evaluate
from deeptwist.app.training.recipe import CompressionRecipe
from deeptwist.errors import DeepTwistError
from deeptwist.plan.plan import Plan

RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
Point = dict[str, Any]  # see `sweep`


def sweep(
    make_plan: Callable[[float], Plan], accuracy: Callable[[Plan], float] | None = None
) -> list[Point]:
    """Return what a network comes to at `RATIOS`.

    Args:
        make_plan: a ratio → the plan.
        accuracy: a plan → the accuracy of the network that it makes.

    Returns:
        A row a ratio: `ratio`, as asked for; `error`, the root mean square of the relative errors
        of all layers that some plan of the sweep compresses; `weights` and `macs`, dense ÷
        decomposed, of the whole network and of the layers; `accuracy` of the network decomposed
        so, without training, or `None`.
    """
    plans = {ratio: make_plan(ratio) for ratio in RATIOS}
    names = {layer.name for plan in plans.values() for layer in plan.compressed}
    points = []
    for ratio, plan in plans.items():
        squares = sum((layer.relative_error or 0.0) ** 2 for layer in plan.compressed)
        point = {
            "ratio": ratio,
            "error": math.sqrt(squares / max(1, len(names))),
            "weights": plan.compression_ratio,
            "macs": plan.dense_macs / max(1, plan.macs),
            "accuracy": None if accuracy is None else accuracy(plan),
        }
        points.append(point)
    return points


def find_knee(points: Sequence[Point], dense_accuracy: float | None = None) -> int | None:
    """Return the index of the last point before the loss runs away; `None` where it slows down.

    It lies farthest below the straight line from the first to the last point, over the logarithm
    of the ratio, each axis scaled to its range (Satopaa et al., 2011).

    Args:
        points: of rising ratios; their loss is that of accuracy, or else the predicted error.
        dense_accuracy: of the dense network, where the points have accuracies.
    """
    x = [math.log(point["ratio"]) for point in points]
    if dense_accuracy is None:
        losses = [point["error"] for point in points]
    else:
        losses = [dense_accuracy - (point["accuracy"] or 0.0) for point in points]
    width, height = x[-1] - x[0], losses[-1] - losses[0]
    if width <= 0 or height <= 0:
        return len(points) - 1
    below = [(a - x[0]) / width - (b - losses[0]) / height for a, b in zip(x, losses, strict=True)]
    knee = max(range(len(points)), key=below.__getitem__)
    return knee if below[knee] > 0 else None


def sweep_network(
    network: NetworkOptions,
    recipe: CompressionRecipe,
    calibration: CalibrationOptions,
    options: SweepOptions,
) -> dict[str, Any]:
    """Plan a network at many ratios.

    Returns:
        `points`, see `sweep`; `knee`, the ratio of the point that `find_knee` finds, if any; and
        `dense_accuracy` where there are images, or `None`.

    Raises:
        DeepTwistError: if the recipe says how small.
    """
    given = given_sizes(recipe)
    if given:
        raise DeepTwistError(f"a sweep chooses the ratios: leave out {', '.join(given)}")
    data = None if options.data is None else network.load_images(options.data)
    recipe = replace(recipe, ratio=RATIOS[0])
    job = make_job(network, recipe, calibration, data, recalibrate=data is not None)
    test = None if data is None else data.test.subsample(options.test_images)
    with progress_bar("sweep", len(RATIOS) if data is None else 2 * len(RATIOS) + 1) as advance:

        def make_plan(ratio: float) -> Plan:
            made = job.make_plan(job.calibration, ratio)
            advance()
            return made

        def accuracy(plan: Plan) -> float:
            assert data is not None
            assert test is not None
            small = job.make_small(plan) if plan.compressed else job.model
            value = evaluate(small, test, data).accuracy
            advance()
            return value

        dense_accuracy = None if data is None else accuracy(Plan(()))
        points = sweep(make_plan, None if data is None else accuracy)
    knee = find_knee(points, dense_accuracy)
    ratio = None if knee is None else points[knee]["ratio"]
    return {"dense_accuracy": dense_accuracy, "knee": ratio, "points": points}
