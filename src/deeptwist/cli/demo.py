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
from deeptwist.serialization import write_text
from deeptwist.training.loop import steps_per_epoch
from deeptwist.training.metrics import DENSE_WEIGHTS, Summary, read_run
from deeptwist.training.recipe import Mode, Recipe, make_recipe
from deeptwist.training.run import build_run, train

_BATCH = 128
_MARK = ".demo"  # what tells a demo's run from a run of the user's own
_RUNS: tuple[tuple[str, Mode, str], ...] = (
    ("dense", "dense", "tucker"),
    ("tucker-deeptwist", "deeptwist", "tucker"),
    ("tucker-conventional", "finetune", "tucker"),
    ("spatial-svd-deeptwist", "deeptwist", "spatial_svd"),
    ("spatial-svd-conventional", "finetune", "spatial_svd"),
)


def demo_steps(epochs: int) -> int:
    """Return the number of optimizer steps in the whole demo."""
    return len(_RUNS) * epochs * steps_per_epoch(load_digits(), _BATCH)


def run_demo(
    out: Path, *, epochs: int = 25, seed: int = 0, on_step: Callable[[], None] = lambda: None
) -> tuple[list[Summary], Path]:
    """Run the demo.

    Args:
        out: where the runs and the report go; an earlier demo there is replaced.
        epochs: of each training.
        seed: of the initial weights and of the order of the images.
        on_step: called after every optimizer step.

    Returns:
        The runs' summaries, the dense one first, and the report's path.

    Raises:
        DeepTwistError: if a number is not one of a training's, or the folder holds something else
            or cannot be written.
    """
    recipes = {name: _recipe(out, mode, method, epochs, seed) for name, mode, method in _RUNS}
    data = load_digits()
    _clear(out)
    for name, recipe in recipes.items():
        _mark(out / name)
        train(
            build_run(recipe, data, name=name),
            out / name,
            latency_batch=256,  # 8×8 images: fewer would measure the calls, not the work
            on_step=on_step,
        )
    runs = [read_run(out / name) for name, *_ in _RUNS]
    report = write_report(runs, out / "report.html", title="deeptwist demo: handwritten digits")
    return [run.summary for run in runs], report


def _recipe(out: Path, mode: Mode, method: str, epochs: int, seed: int) -> Recipe:
    return make_recipe(
        {
            "model": "resnet20",
            "weights": None if mode == "dense" else str(out / "dense" / DENSE_WEIGHTS),
            "mode": mode,
            "interval": max(1, epochs),  # some ten distortions, as in the paper's schedules
            "batch_size": _BATCH,
            "seed": seed,
            "schedule": {"epochs": epochs},
            "compression": {
                "decomposition": method,
                "ratio": 4,
                "skip_first_conv": True,
                "linear": False,
            },
        }
    )


def _clear(out: Path) -> None:
    """Remove an earlier demo's runs, or nothing at all where one of them is somebody's own."""
    folders = [out / name for name, *_ in _RUNS if (out / name).exists()]
    for folder in folders:
        if not (folder / _MARK).is_file():
            raise DeepTwistError(
                f"{folder} is not an earlier demo's: choose another --out or remove it"
            )
    for folder in folders:
        shutil.rmtree(folder)


def _mark(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
        write_text(folder / _MARK, "This folder is the demo's: the next one replaces it.\n")
    except OSError as error:
        raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from error
