"""The whole job on embedded data, in two minutes: a small network that has work to save."""

import shutil
import sys
from pathlib import Path
from typing import Any

from deeptwist.app.cli.compress import run_compress
from deeptwist.app.cli.console import telling
from deeptwist.app.cli.options import CompressOptions
from deeptwist.app.data import load_data
from deeptwist.app.folders import DENSE_WEIGHTS
from deeptwist.app.training.recipe import make_recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.errors import DeepTwistError
from deeptwist.files import explaining_writes, write_text

_MARK = ".demo"  # what tells a demo's folder from a folder of the user's own
_DENSE, _SMALL = "dense", "small"
_BATCH = 256  # to time: the images are 8×8, and fewer would measure the calls, not the work

NEXT_STEPS = """
now with a network and images of your own (folders train/CLASS/, val/CLASS/):

  deeptwist plan torchvision/resnet18 --decomposition spatial-svd --ratio 4
  deeptwist train torchvision/resnet18 --data photos/ --image-size 128 \\
      --mode dense --epochs 30 --out runs/dense
  deeptwist compress torchvision/resnet18 --weights runs/dense/weights.safetensors \\
      --data photos/ --image-size 128 --ratio 4 --out runs/small"""


def run_demo(out: Path, *, epochs: int = 10, seed: int = 0) -> dict[str, Any]:
    """Train a dense network on scikit-learn's handwritten digits, and compress it five times.

    Returns:
        What every step of the job came to.

    Raises:
        DeepTwistError: if a number is not one of a training's, or the folder holds something else
            or cannot be written.
    """
    recipe = {
        "model": "deeptwist.networks.cifar:digits_net",
        "batch_size": 64,
        "seed": seed,
        "schedule": {"epochs": epochs},
    }
    dense = make_recipe(recipe | {"mode": "dense", "optimizer": {"lr": 0.05}})
    changes = {
        "weights": str(out / _DENSE / DENSE_WEIGHTS),
        "mode": "finetune",
        "optimizer": {"lr": 0.02},
        "calibration_images": 256,
        "compression": {"decomposition": "spatial_svd", "ratio": 5, "rank_multiple": 8},
    }
    small = make_recipe(recipe | changes)
    _clear(out)
    run = build_run(dense, load_data("digits"), name=_DENSE)
    print(f"[0] train a dense network for {epochs} epochs, then compress it", file=sys.stderr)
    with telling("train the dense network", run) as shown:
        train(run, out / _DENSE, **shown)
    options = CompressOptions(batch=(_BATCH,), int8=True)
    return run_compress(small, options, out / _SMALL)


def _clear(out: Path) -> None:
    """Remove an earlier demo's runs, or nothing at all where the folder is somebody's own."""
    folders = [out / name for name in (_DENSE, _SMALL) if (out / name).exists()]
    if folders and not (out / _MARK).is_file():
        raise DeepTwistError(f"{out} is not an earlier demo's: choose another --out or remove it")
    with explaining_writes(out):
        for folder in folders:
            shutil.rmtree(folder)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / _MARK, "dense/ and small/ are the demo's: the next one replaces them.\n")
