"""The whole of deeptwist on embedded data, in two minutes: a small network, compressed 4×.

A ResNet-20 learns scikit-learn's handwritten digits; then every decomposition below is learnt
twice for the same number of steps on the same images: by DeepTwist, and by conventional
fine-tuning of the network decomposed beforehand.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from deeptwist.data import load_digits
from deeptwist.decompositions import Decomposition, SpatialSVD, Tucker
from deeptwist.errors import DeepTwistError
from deeptwist.models import build_model, load_weights
from deeptwist.planning import plan
from deeptwist.report import write_report
from deeptwist.training.job import run
from deeptwist.training.loop import steps_per_epoch
from deeptwist.training.records import DENSE_WEIGHTS, SUMMARY, Summary, read_run
from deeptwist.training.settings import Mode, Settings

_RATIO = 4
_RUNS: tuple[tuple[str, Mode, Decomposition], ...] = (
    ("dense", "dense", Tucker()),
    ("tucker-deeptwist", "deeptwist", Tucker()),
    ("tucker-conventional", "decomposed", Tucker()),
    ("spatial-svd-deeptwist", "deeptwist", SpatialSVD()),
    ("spatial-svd-conventional", "decomposed", SpatialSVD()),
)


def demo_steps(epochs: int) -> int:
    """Optimizer steps in the whole demo."""
    return len(_RUNS) * epochs * steps_per_epoch(load_digits(), _settings(epochs, seed=0))


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
    torch.manual_seed(seed)
    model = build_model("resnet20", in_channels=1)
    example = torch.zeros(2, *data.train.images.shape[1:])
    for name, mode, decomposition in _RUNS:
        if mode != "dense":
            load_weights(model, out / "dense" / DENSE_WEIGHTS)
        run(
            model,
            data,
            _settings(epochs, seed),
            out / name,
            mode=mode,
            plan=plan(
                model,
                decomposition,
                ratio=_RATIO,
                example_input=example,
                skip_first_conv=True,
                linear=False,
            ),
            decomposition=str(decomposition),
            ratio=_RATIO,
            name=name,
            model_name="resnet20",
            latency_batch=256,  # 8×8 images: fewer would measure the calls, not the work
            on_step=on_step,
        )
    runs = [read_run(out / name) for name, *_ in _RUNS]
    report = write_report(runs, out / "report.html", title="deeptwist demo: handwritten digits")
    return [run.summary for run in runs], report


def _settings(epochs: int, seed: int) -> Settings:
    # Some ten distortions in each run, whatever its length, as in the paper's schedules.
    return Settings(epochs=epochs, batch_size=128, lr=0.05, interval=max(1, epochs), seed=seed)


def _clear(out: Path) -> None:
    for name, *_ in _RUNS:
        folder = out / name
        if (folder / SUMMARY).is_file() or (folder / "metrics.jsonl").is_file():
            shutil.rmtree(folder)
        elif folder.exists():
            raise DeepTwistError(f"{folder} is not an earlier demo: choose another --out")
