"""Train several recipes at a time, each in a folder of its name; finished ones are skipped.

    python experiments/train_all.py RECIPE.yaml ... --out runs --workers 14

A run is what `deeptwist train RECIPE.yaml --out OUT/RECIPE` makes, but for its latency. Under
`nvidia-cuda-mps-control -d` many runs share one GPU. To choose recipes by some test images and
report on the others, `--test first:3000` takes the first of a fixed shuffle, `rest:3000` the rest.
"""

import argparse
import functools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from deeptwist.app.data import ImageData, load_data
from deeptwist.app.training.recipe import DataRecipe, read_recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.errors import DeepTwistError


def main() -> None:
    """Train all recipes, in the order that they are given in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--data", help="in place of the recipes' own")
    parser.add_argument("--weights", help="in place of the recipes' own")
    parser.add_argument("--test", default="rest:0", help="test images: first:N or rest:N")
    options = parser.parse_args()
    # An executor's processes, unlike a pool's, may have children: those that decode images.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as executor:
        jobs = [executor.submit(_train, (path, options)) for path in options.recipes]
        for job in as_completed(jobs):
            print(job.result(), flush=True)


def _train(job: tuple[Path, argparse.Namespace]) -> str:
    """Train a recipe; return a line about it."""
    path, options = job
    torch.set_num_threads(1)
    try:
        recipe = read_recipe(path)
        if options.data:
            recipe = replace(recipe, data=replace(recipe.data, source=options.data))
        if options.weights and recipe.weights:
            recipe = replace(recipe, weights=options.weights)
        data = _images(recipe.data, options.test)
        run = build_run(recipe, data, name=path.stem)
        options.out.mkdir(parents=True, exist_ok=True)
        summary = train(run, options.out / path.stem, resume=True, latency_batch=None)
    except DeepTwistError as error:
        return f"{path.stem}: {error}"
    return f"{path.stem}: {summary.accuracy:.4f} after {summary.seconds:.0f} s"


@functools.cache  # decoding takes a minute, and most recipes share their images
def _images(recipe: DataRecipe, test: str) -> ImageData:
    return _restrict_test(load_data(recipe), test)


def _restrict_test(data: ImageData, which: str) -> ImageData:
    """Return the data with the first N test images of a fixed shuffle, or with the rest."""
    part, _, count = which.partition(":")
    if int(count) == 0:
        return data
    order = torch.randperm(len(data.test.labels), generator=torch.Generator().manual_seed(0))
    rows = order[: int(count)] if part == "first" else order[int(count) :]
    return replace(
        data, test=data.test.subset(rows), name=f"{data.name}, {part} {len(rows)} test images"
    )


if __name__ == "__main__":
    sys.exit(main())
