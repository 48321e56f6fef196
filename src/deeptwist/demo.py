"""The whole of deeptwist on embedded data, in two minutes: a small network, compressed 4×.

A ResNet-20 learns scikit-learn's handwritten digits; then every decomposition below is learnt
twice for the same number of steps on the same images: by DeepTwist, and by conventional
fine-tuning of the network decomposed beforehand.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from deeptwist.data import load_digits
from deeptwist.errors import DeepTwistError
from deeptwist.report import write_report
from deeptwist.training.job import prepare, run
from deeptwist.training.loop import steps_per_epoch
from deeptwist.training.recipe import CompressionRecipe, Method, Mode, Recipe, ScheduleRecipe
from deeptwist.training.records import DENSE_WEIGHTS, RECIPE, Summary, read_run

_BATCH = 128
_RUNS: tuple[tuple[str, Mode, Method], ...] = (
    ("dense", "dense", "tucker"),
    ("tucker-deeptwist", "deeptwist", "tucker"),
    ("tucker-conventional", "decomposed", "tucker"),
    ("spatial-svd-deeptwist", "deeptwist", "spatial_svd"),
    ("spatial-svd-conventional", "decomposed", "spatial_svd"),
)


def demo_steps(epochs: int) -> int:
    """Optimizer steps in the whole demo."""
    return len(_RUNS) * epochs * steps_per_epoch(load_digits(), _BATCH)


def run_demo(
    out: Path, *, epochs: int = 25, seed: int = 0, on_step: Callable[[], None] = lambda: None
) -> tuple[list[Summary], Path]:
    """Runs the demo.

    Args:
        out: where the runs and the report go; an earlier demo there is replaced.
        epochs: of each training.
        seed: of the initial weights and of the order of the images.
        on_step: called after every optimizer step.

    Returns:
        The runs' summaries, the dense one first, and the report's path.

    Raises:
        DeepTwistError: if the folder holds something else, or cannot be written.
    """
    _clear(out)
    data = load_digits()
    for name, mode, method in _RUNS:
        recipe = Recipe(
            model="resnet20",
            weights=None if mode == "dense" else str(out / "dense" / DENSE_WEIGHTS),
            mode=mode,
            interval=max(1, epochs),  # some ten distortions, as in the paper's schedules
            batch_size=_BATCH,
            seed=seed,
            schedule=ScheduleRecipe(epochs=epochs),
            compression=CompressionRecipe(
                decomposition=method, ratio=4, skip_first_conv=True, linear=False
            ),
        )
        run(
            prepare(recipe, data, name=name),
            out / name,
            latency_batch=256,  # 8×8 images: fewer would measure the calls, not the work
            on_step=on_step,
        )
    runs = [read_run(out / name) for name, *_ in _RUNS]
    report = write_report(runs, out / "report.html", title="deeptwist demo: handwritten digits")
    return [run.summary for run in runs], report


def _clear(out: Path) -> None:
    for name, *_ in _RUNS:
        folder = out / name
        if (folder / RECIPE).is_file():
            shutil.rmtree(folder)
        elif folder.exists():
            raise DeepTwistError(f"{folder} is not an earlier demo: choose another --out")
