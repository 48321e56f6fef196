"""`deeptwist plan --sweep`: a network planned at many ratios."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

from deeptwist.app.cli.console import print_table, progress_bar
from deeptwist.app.cli.options import CalibrationOptions, NetworkOptions, SweepOptions
from deeptwist.app.cli.ratio_sweep import RATIOS, SweepPoint, find_knee, sweep
from deeptwist.app.data import ImageData, load_data
from deeptwist.app.report.page import write_sweep
from deeptwist.app.training.evaluation import evaluate, test_inputs, training_inputs
from deeptwist.app.training.recipe import CompressionRecipe
from deeptwist.decompose import decompose, recalibrate_batch_norm
from deeptwist.errors import DeepTwistError
from deeptwist.plan.calibration import Calibration, calibrate
from deeptwist.plan.plan import Plan

_SIZES = "ratio", "weight_budget", "macs", "latency", "latency_ms", "rank", "fraction", "plan"


def run_sweep(
    model: str,
    network: NetworkOptions,
    recipe: CompressionRecipe,
    calibration: CalibrationOptions,
    options: SweepOptions,
    *,
    as_json: bool,
) -> None:
    """Plan at many ratios, print what is lost and saved, and draw it where asked."""
    given = [name for name in _SIZES if getattr(recipe, name) is not None]
    if given:
        raise DeepTwistError(f"a sweep chooses the ratios: leave out {', '.join(given)}")
    accuracy: Callable[[Plan], float] | None = None
    dense_accuracy = None
    if options.data is None:
        dense, example = network.build(model), network.example_input(model)
        moments = calibration.moments(dense, calibration.inputs(dense, example))
    else:
        size = None if options.data in ("digits", "cifar10") else network.size(model)[-1]
        data = load_data(options.data, image_size=size)
        classes, channels = len(data.classes), data.shape[0]
        dense = network.build(model, num_classes=classes, in_channels=channels)
        example = test_inputs(data, dense, 2)
        inputs = [*training_inputs(data, dense, calibration.calibration_images)]
        moments = calibrate(dense, inputs)
        accuracy = _accuracy(dense, data, inputs, moments, options.test_images)
        dense_accuracy = accuracy(Plan(()))
    with progress_bar("sweep", len(RATIOS)) as advance:

        def make_plan(ratio: float) -> Plan:
            advance()
            return replace(recipe, ratio=ratio).make_plan(dense, example, calibration=moments)

        points = sweep(make_plan, accuracy=accuracy)
    knee = find_knee(points, dense_accuracy)
    if options.page is not None:
        title = f"deeptwist plan --sweep {model}, {recipe.label}"
        write_sweep(points, knee, options.page, title=title, dense_accuracy=dense_accuracy)
    if as_json:
        values = {"dense_accuracy": dense_accuracy, "knee": points[knee].ratio}
        print(json.dumps({**values, "points": [asdict(point) for point in points]}))
        return
    _print_sweep(f"{model}, {recipe.label}", points, knee, dense_accuracy)


def _accuracy(
    dense: nn.Module,
    data: ImageData,
    inputs: list[Tensor],
    moments: Calibration,
    images: int,
) -> Callable[[Plan], float]:
    """Return what tells the accuracy of the network that a plan makes, without training."""
    test = data.test.evenly_spaced(min(images, len(data.test.labels)))

    def accuracy(plan: Plan) -> float:
        small = dense
        if plan.compressed:
            small = decompose(dense, plan, calibration=moments)
            small = recalibrate_batch_norm(small, inputs)
        return evaluate(small, test, data).accuracy

    return accuracy


def _print_sweep(
    title: str, points: Sequence[SweepPoint], knee: int, dense_accuracy: float | None
) -> None:
    """Print a row for each ratio, and which of them is the knee."""
    header = ["ratio", "relative error", "fewer weights", "fewer MACs", "accuracy, untrained", ""]
    rows = [
        [
            f"{point.ratio:g}×",
            f"{point.error:.3f}",
            f"{point.weights:.2f}×",
            f"{point.macs:.2f}×",
            "" if point.accuracy is None else f"{point.accuracy:.2%}",
            "knee" * (index == knee),
        ]
        for index, point in enumerate(points)
    ]
    if dense_accuracy is not None:
        rows.insert(0, ["dense", "", "", "", f"{dense_accuracy:.2%}", ""])
    print_table(title, header, rows)
