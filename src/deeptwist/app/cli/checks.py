"""What commands check before the seconds that imports take: names, files, what goes together."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deeptwist.app.training.recipe import CompressionRecipe, DataRecipe, Recipe
from deeptwist.errors import DeepTwistError, check_ratio
from deeptwist.networks.names import check_name, check_weights

if TYPE_CHECKING:
    from deeptwist.app.cli.options import CompressOptions

_SIZES = "ratio", "weight_budget", "macs", "latency", "latency_ms", "rank", "fraction", "plan"
Goal = Callable[[float], float]  # the dense network's accuracy → the least of the small one


def check_inputs(
    model: str,
    weights: str | None = None,
    data: DataRecipe | str | None = None,
) -> None:
    """Check names and files at once, before the seconds that imports take.

    Args:
        model: a network's name.
        weights: a file or a name.
        data: images, or where they are.

    Raises:
        DeepTwistError: if one of them is not there.
    """
    check_name(model)
    if weights is not None:
        check_weights(model, weights)
    if data is not None:
        (DataRecipe(source=data) if isinstance(data, str) else data).check_source()


def check_small(small: Path | None) -> None:
    """Check, before anything is imported, that a folder of a saved network is there."""
    if small is not None and not small.is_dir():
        raise DeepTwistError(f"no config.json in {small}: not a folder that deeptwist saved")


def given_sizes(compression: CompressionRecipe) -> list[str]:
    """Return the options that say how small, of those that are given."""
    return [name for name in _SIZES if getattr(compression, name) is not None]


def check_size(compression: CompressionRecipe, *, or_goal: bool = False) -> None:
    """Check, before any work, that something says how small the network shall be.

    Args:
        compression: what was asked for.
        or_goal: whether a goal would say it too.

    Raises:
        DeepTwistError: if nothing does, a number that does compresses nothing, or a plan is not
            there.
    """
    if not given_sizes(compression) and not compression.overrides:
        others = "--weight-budget 4, --macs 3 or --latency 2"
        if or_goal:
            others = "--macs 3, --latency 2, or --goal 'accuracy>=dense-0.01'"
        raise DeepTwistError(f"say how small: --ratio 4, {others}")
    for factor in (compression.ratio, compression.weight_budget, compression.macs):
        if factor is not None:
            check_ratio(factor)
    if compression.plan is not None and not Path(compression.plan).exists():
        raise DeepTwistError(f"cannot read plan {compression.plan}: no such file")


def check_job(recipe: Recipe, options: "CompressOptions") -> Goal | None:
    """Check what `deeptwist compress` is asked for; return its goal, if it has one.

    Raises:
        DeepTwistError: if parts of it do not go together, or nothing says how small.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeepTwistError("compress is one process: train in several by 'deeptwist train'")
    if not recipe.compresses:
        raise DeepTwistError(f"mode {recipe.mode} compresses nothing: finetune and deeptwist do")
    if recipe.frozen_compression is not None:
        raise DeepTwistError("compress takes no frozen_compression: 'deeptwist train' does")
    if options.int8 and "onnxruntime" not in options.runtime:
        raise DeepTwistError("--int8 is onnxruntime's: add it to --runtime")
    if options.distill_steps and recipe.mode != "finetune":
        raise DeepTwistError(
            f"mode {recipe.mode} begins from the dense network: distill with --mode finetune"
        )
    if options.goal is None:
        check_size(recipe.compression, or_goal=True)
        return None
    given = given_sizes(recipe.compression)
    if given:
        raise DeepTwistError(f"a --goal finds the ratio: leave out {', '.join(given)}")
    match = re.fullmatch(r"accuracy>=(dense-)?(0?\.\d+)", options.goal.replace(" ", ""))
    if match is None:
        raise DeepTwistError(
            f"cannot read the goal {options.goal!r}: write 'accuracy>=0.90' or "
            "'accuracy>=dense-0.01'"
        )
    number = float(match[2])
    return (lambda dense: dense - number) if match[1] else (lambda _: number)
