"""The main job on real images: a trained ResNet-32 in, networks of a quarter of its size out.

Fine-tunes the dense network on CIFAR-10 (here its JPEG copy), then makes the result four times
smaller: by DeepTwist and by conventional fine-tuning, with three decompositions each, at the same
size, steps, schedule and order of images. Every run goes to a folder of its own; a run that is
finished is not run again, so the script can be stopped and started.

    python examples/compress_resnet32.py --data DIR --weights resnet32-cifar10.safetensors
"""

import argparse
from pathlib import Path

import torch

import deeptwist as dt
from deeptwist.data import load_data
from deeptwist.models import build_model, load_weights
from deeptwist.training.job import run
from deeptwist.training.records import DENSE_WEIGHTS, SUMMARY, Summary, read_run
from deeptwist.training.settings import Mode, Settings

RATIO = 4
DECOMPOSITIONS = {
    "tucker": dt.Tucker(),
    "spatial-svd": dt.SpatialSVD(),
    "tiled-svd": dt.TiledSVD(tile=(64, 72)),
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
    example = torch.zeros(2, 3, 32, 32)

    def cell(weights: Path, mode: Mode, decomposition: dt.Decomposition, name: str) -> Summary:
        folder = options.out / name
        settings = Settings(
            epochs=options.dense_epochs if mode == "dense" else options.epochs,
            lr=0.05 if mode == "dense" else options.lr,
            weight_decay=5e-4,
            interval=200,
            seed=options.seed,
            precision="bf16-mixed",
        )
        if not (folder / SUMMARY).exists():
            model = build_model("resnet32")
            load_weights(model, weights)
            plan = dt.plan(
                model,
                decomposition,
                ratio=RATIO,
                example_input=example,
                skip_first_conv=True,
                linear=False,
            )
            run(
                model,
                data,
                settings,
                folder,
                mode=mode,
                plan=plan,
                decomposition=str(decomposition),
                ratio=RATIO,
                name=name,
                model_name="resnet32",
                on_record=lambda record: print(name, record, flush=True),
            )
        return read_run(folder).summary

    dense = cell(Path(options.weights), "dense", dt.SVD(), "dense")
    tuned = options.out / "dense" / DENSE_WEIGHTS
    print(f"{'run':24}  accuracy  parameters      MACs  untrained")
    print(f"{'dense':24}  {dense.accuracy:8.2%}  {dense.parameters:10,}  {dense.macs:10,}")
    for method, decomposition in DECOMPOSITIONS.items():
        for mode in ("deeptwist", "decomposed"):
            if options.only and f"{mode}-{method}" not in options.only:
                continue
            done = cell(tuned, mode, decomposition, f"{mode}-{method}")
            print(
                f"{done.name:24}  {done.accuracy:8.2%}  {done.parameters:10,}  {done.macs:10,}  "
                f"{done.accuracy_untrained:8.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
