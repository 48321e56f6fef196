"""The main job on real images: a trained ResNet-32 in, networks of a quarter of its size out.

Fine-tunes the dense network on CIFAR-10 (here its JPEG copy), then makes the result four times
smaller: by DeepTwist and by conventional fine-tuning, with three decompositions each, at the same
size, steps, schedule and order of images. Every run goes to a folder of its own; one that was cut
goes on from its last checkpoint, and one that is finished is read.

    python examples/compress_resnet32.py --data DIR --weights resnet32-cifar10.safetensors
"""

import argparse
from itertools import product
from pathlib import Path

from deeptwist.app.data import load_data
from deeptwist.app.folders import DENSE_WEIGHTS
from deeptwist.app.training.recipe import Mode, make_recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.compress import Values

COMPRESSION = {"ratio": 4}
DECOMPOSITIONS = {
    "tucker": {"decomposition": "tucker"},
    "spatial-svd": {"decomposition": "spatial_svd"},
    "tiled-svd": {"decomposition": "tiled_svd", "tile": [64, 72]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder with train/ and test/")
    parser.add_argument("--weights", required=True, help="the trained ResNet-32")
    parser.add_argument("--out", default="runs/resnet32", type=Path)
    parser.add_argument("--dense-epochs", default=6, type=int)
    parser.add_argument("--epochs", default=7, type=int, help="of every compressed network")
    parser.add_argument("--lr", default=0.025, type=float, help="of every compressed network")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--only", nargs="+", help="these runs only, deeptwist-tucker for one")
    options = parser.parse_args()

    data = load_data(options.data)

    def cell(weights: Path, mode: Mode, method: str) -> Values:
        dense = mode == "dense"
        recipe = make_recipe(
            {
                "model": "resnet32",
                "weights": str(weights),
                "mode": mode,
                "interval": 200,
                "seed": options.seed,
                "precision": "bf16-mixed",
                "data": {"source": options.data},
                "optimizer": {"lr": 0.05 if dense else options.lr, "weight_decay": 5e-4},
                "schedule": {"epochs": options.dense_epochs if dense else options.epochs},
                "compression": COMPRESSION | DECOMPOSITIONS[method],
            }
        )
        name = "dense" if dense else f"{mode}-{method}"
        return train(
            build_run(recipe, data, name=name),
            options.out / name,
            resume=True,
            on_record=lambda record: print(name, record, flush=True),
        )

    dense = cell(Path(options.weights), "dense", "tucker")
    tuned = options.out / "dense" / DENSE_WEIGHTS
    print(f"{'run':24}  accuracy  parameters      MACs  untrained")
    print(f"{'dense':24}  {columns(dense)}")
    modes: tuple[Mode, ...] = ("deeptwist", "finetune")
    for method, mode in product(DECOMPOSITIONS, modes):
        if not options.only or f"{mode}-{method}" in options.only:
            done = cell(tuned, mode, method)
            untrained = done["accuracy_untrained"]
            print(f"{done['name']:24}  {columns(done)}  {untrained:8.2%}", flush=True)


def columns(run: Values) -> str:
    return f"{run['accuracy']:8.2%}  {run['parameters']:10,}  {run['macs']:10,}"


if __name__ == "__main__":
    main()
