"""Whether followed distortions cost accuracy: ResNet-32 with exact ones throughout beside them.

Three seeds each, 64×64 tiles of the lowered kernel at 4×, from a trained network; a run that is
finished is not run again, and one that was cut goes on.

    python benchmarks/tolerance.py --data DIR --weights resnet32-cifar10.safetensors
"""

import argparse
import statistics
from pathlib import Path

from deeptwist.data import load_data
from deeptwist.training.recipe import make_recipe
from deeptwist.training.run import prepare, run

TOLERANCES = {"exact": 0.0, "followed": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder with train/ and test/")
    parser.add_argument("--weights", required=True, help="the trained ResNet-32")
    parser.add_argument("--out", default="runs/tolerance", type=Path)
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--interval", default=100, type=int)
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    parser.add_argument("--only", choices=TOLERANCES, help="one half of the table")
    options = parser.parse_args()
    data = load_data(options.data)
    print("| distortions | " + " | ".join(f"seed {seed}" for seed in options.seeds), end="")
    print(" | mean | spread (standard deviation) |\n" + "| --- " * (len(options.seeds) + 3) + "|")
    for name, tolerance in TOLERANCES.items():
        if options.only not in (None, name):
            continue
        accuracies = []
        for seed in options.seeds:
            recipe = make_recipe(
                {
                    "model": "resnet32",
                    "weights": options.weights,
                    "interval": options.interval,
                    "tolerance": tolerance,
                    "seed": seed,
                    "precision": "bf16-mixed",
                    "data": {"source": options.data},
                    "optimizer": {"lr": 0.025},
                    "schedule": {"epochs": options.epochs},
                    "compression": {
                        "decomposition": "tiled_svd",
                        "tile": [64, 64],
                        "ratio": 4,
                        "skip_first_conv": True,
                        "linear": False,
                    },
                    "records": {"images": 0},
                }
            )
            folder = options.out / f"{name}-{seed}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            summary = run(prepare(recipe, data, name=folder.name), folder, resume=True)
            accuracies.append(100 * summary.accuracy)
        shown = " | ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
        print(
            f"| {name} | {shown} | {statistics.mean(accuracies):.2f} | {spread:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
