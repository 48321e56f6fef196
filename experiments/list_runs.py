"""List runs as a Markdown table, finished or cut: what they were, and what they came to.

python -m experiments.list_runs results/ten-epochs/seeds/*
"""

import json
import sys
from pathlib import Path

from experiments.paper.runs import read_epochs

from deeptwist.app.training.metrics import RECIPE, SUMMARY
from deeptwist.app.training.recipe import Recipe, read_recipe
from deeptwist.errors import DeepTwistError

COLUMNS = ("run", "way", "lr", "S_D", "seed", "epochs", "last epoch, %", "deployed, %", "variants")


def main() -> None:
    """Print a row for each folder that is named."""
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}")
    for folder in map(Path, sys.argv[1:]):
        try:
            cells = _row(folder, read_recipe(folder / RECIPE))
        except (DeepTwistError, OSError) as error:
            sys.exit(f"{folder} holds no run: {error}")
        print(f"| {' | '.join(cells)} |")


def _row(folder: Path, recipe: Recipe) -> list[str]:
    accuracies = [epoch["test"]["accuracy"] for epoch in read_epochs(folder)]
    deployed, variants = "cut", ""
    if (folder / SUMMARY).exists():
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        deployed = f"{100 * summary['accuracy']:.2f}"
        variants = ", ".join(f"{v['name']} {100 * v['accuracy']:.2f}" for v in summary["variants"])
    return [
        folder.name,
        "dense" if recipe.mode == "dense" else f"{recipe.mode}, {recipe.compression.label}",
        f"{recipe.optimizer.lr:g}",
        str(recipe.interval) if recipe.mode == "deeptwist" else "",
        str(recipe.seed),
        f"{len(accuracies)} of {recipe.schedule.epochs}",
        f"{100 * accuracies[-1]:.2f}" if accuracies else "",
        deployed,
        variants,
    ]


if __name__ == "__main__":
    main()
