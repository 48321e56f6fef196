"""What to use when: structured pruning, low rank and both, each in int8 too, beside each other.

At about equal MACs of the whole network, channels and ranks in sixteens. Pruning is
Torch-Pruning's: one share of all groups, by norm. Low rank: a calibrated budget of MACs, spatial
SVD. Accuracy is of ResNet-18 on imagenette at 64 pixels: batch norm anew; distilled without labels
(a pruned network's blocks are narrower than the dense one's: it learns the outputs alone), or
fine-tuned at the better of two rates, by the loss on training images held out: 120 steps each.
Speed is at 224 pixels, as many times as fast as the dense network as it is left: in PyTorch,
contiguous; as each is handed out; with batch norm folded and in channels_last, all of them; in
onnxruntime; there in int8. ResNet-50 has random weights. What is in the tables is not computed
again.

deeptwist train recipes/resnet18-imagenette-short.yaml --data imagenette224 --mode dense \
    --epochs 8 --lr 0.05 --out runs/r18
python benchmarks/peers.py accuracy --data imagenette224 --weights runs/r18/weights.safetensors
python benchmarks/peers.py speed --data imagenette224 --weights runs/r18/weights.safetensors
python benchmarks/peers.py table
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch_pruning
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import deeptwist as dt
from deeptwist.app.data import ImageData, Split, batches, load_data, train_batches
from deeptwist.app.training.evaluation import AugmentedInputs, evaluate, preprocess, training_inputs
from deeptwist.export import export_onnx, quantize_onnx
from deeptwist.measure.runtimes import OnnxNetwork
from deeptwist.measure.timing import median_ratio, time_interleaved
from deeptwist.networks.build import build_model
from deeptwist.networks.weights import build_trained

DENSE, PRUNING, LOW_RANK, BOTH = "dense", "pruning", "deeptwist", "both"  # by its root each
STEPS, BATCH, RATES = 120, 64, (0.02, 0.005)
CALIBRATION, HELD_OUT, JUDGES = 1024, 512, 2  # images; batches that distillation holds out
LEARNED = "untrained", "distilled", "fine_tuned"

Task = tuple[nn.Module, ImageData, list[Tensor]]  # trained, and what calibrates it, (B, 3, 64, 64)
SIDE, ROUNDS = 224, 9  # pixels of what is timed, and how often
MULTIPLE = 16  # that channels left, and ranks, are of: what kernels compute with AVX-512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["accuracy", "speed", "table"])
    parser.add_argument("--data", help="folder of imagenette")
    parser.add_argument("--weights", help="of ResNet-18")
    parser.add_argument("--networks", default=["resnet18", "resnet50"], nargs="+", help="timed")
    parser.add_argument("--ratios", default=[2.0, 4.0, 6.0], type=float, nargs="+")
    parser.add_argument("--ways", default=[PRUNING, LOW_RANK, BOTH], nargs="+")
    parser.add_argument("--seed", default=0, type=int, help="of the images' order")
    parser.add_argument("--batch", default=16, type=int, help="that is timed")
    parser.add_argument("--out", default=Path("results/peers"), type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    options.wanted = [(1.0, DENSE), *product(options.ratios, options.ways)]
    if options.part == "accuracy":
        measure_accuracy(options.out / "accuracy.csv", load_task(options), options)
    for name in options.networks if options.part == "speed" else ():
        torch.manual_seed(0)
        model, images = build_model(f"torchvision/{name}").eval(), list[Tensor]()
        if name == "resnet18":
            model, _, images = load_task(options)
        measure_speed(options.out / "speed.csv", name, model, images, options)
    if options.part == "table":
        accuracies, speeds = (pd.read_csv(options.out / f"{x}.csv") for x in ("accuracy", "speed"))
        means = accuracies.groupby(["network", "ratio", "way"], as_index=False).mean()
        print(speeds.merge(means, "outer", sort=False).round(2).to_string(index=False, na_rep=""))


def load_task(options: argparse.Namespace) -> Task:
    data = load_data(options.data, preset="imagenet", image_size=64, scale=0.35, workers=0)
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(1))
    held_out, learned = (data.train.subset(x) for x in (order[:HELD_OUT], order[HELD_OUT:]))
    data = replace(data, train=learned, validation=read_once(held_out), test=read_once(data.test))
    dense = build_trained("torchvision/resnet18", options.weights, num_classes=len(data.classes))
    return dense.eval(), data, [*training_inputs(data, dense, CALIBRATION)]


def read_once(split: Split) -> Split:
    images, labels = zip(*batches(split, 256), strict=True)
    return Split(torch.cat(images), torch.cat(labels))


def make_smaller(model: nn.Module, way: str, ratio: float, images: list[Tensor]) -> nn.Module:
    """Return a network of as many times fewer MACs; batch norm anew where there are images."""
    x = images[0][:1] if images else torch.zeros(1, 3, SIDE, SIDE)
    dense = macs(model, x)
    if way in (PRUNING, BOTH):
        model = anew(prune(model, ratio if way == PRUNING else ratio**0.5, x), images)
    if way in (LOW_RANK, BOTH):
        model = anew(low_rank(model, ratio * macs(model, x) / dense, x, images), images)
    return model


def macs(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


def anew(model: nn.Module, images: list[Tensor]) -> nn.Module:
    return dt.recalibrate_batch_norm(model, images) if images else model


def prune(model: nn.Module, ratio: float, x: Tensor) -> nn.Module:
    """Return a network pruned to about so many times fewer MACs: channels are left in sixteens."""
    low, high, dense = 0.0, 0.95, macs(model, x)
    while high - low > 0.004:  # of a group's channels
        share = (low + high) / 2
        is_large = dense / macs(pruned_by(share, model, x), x) < ratio
        low, high = (share, high) if is_large else (low, share)
    both = [pruned_by(share, model, x) for share in (low, high)]
    return min(both, key=lambda pruned: abs(dense / macs(pruned, x) / ratio - 1))


def pruned_by(share: float, model: nn.Module, x: Tensor) -> nn.Module:
    pruned = copy.deepcopy(model)
    logits = [m for m in pruned.modules() if isinstance(m, nn.Linear)]
    norm = torch_pruning.importance.GroupMagnitudeImportance()
    options: dict[str, Any] = {"ignored_layers": logits, "round_to": MULTIPLE}
    torch_pruning.pruner.BasePruner(pruned, x, norm, pruning_ratio=share, **options).step()
    return pruned


def low_rank(model: nn.Module, ratio: float, x: Tensor, images: list[Tensor]) -> nn.Module:
    moments = dt.calibrate(model, images) if images else None
    whole = dt.Layers(skip_first_conv=False, linear=True)  # whose MACs are the network's
    options: dict[str, Any] = {"example_input": x, "layers": whole, "calibration": moments}
    plan = dt.plan(model, dt.SpatialSVD(), macs=ratio, rank_multiple=MULTIPLE, **options)
    return dt.decompose(model, plan, calibration=moments)


def measure_accuracy(path: Path, task: Task, options: argparse.Namespace) -> None:
    dense, data, images = task
    for ratio, way in options.wanted:
        row = {"network": "resnet18", "ratio": ratio, "way": way, "seed": options.seed}
        row |= read(path).get(tuple(row.values()), {})
        learned = LEARNED[:1] if way == DENSE else LEARNED
        missing = [name for name in learned if not {name, *_int8(name, way)} <= row.keys()]
        if not missing:
            continue
        small = make_smaller(dense, way, ratio, images)
        row["macs"] = macs(dense, images[0][:1]) / macs(small, images[0][:1])
        sizes = [sum(map(Tensor.numel, m.parameters())) for m in (dense, small)]
        row["weights"] = sizes[0] / sizes[1]
        for name in missing:
            network = learn(name, small, task, options.seed)
            row[name] = accuracy(network, data)
            for column in _int8(name, way):
                with tempfile.TemporaryDirectory() as folder:
                    some = torch.cat(images[:2]).split(32)
                    _, file = write_onnx(network, Path(folder) / "small.onnx", some)
                    row[column] = accuracy(OnnxNetwork(file, 1), data)
            write(path, row)


def _int8(name: str, way: str) -> list[str]:
    """Return the column of a network in int8, where it has one: what is left untrained has none."""
    return [f"{name}_int8"] if name != LEARNED[0] or way == DENSE else []


def learn(name: str, small: nn.Module, task: Task, seed: int) -> nn.Module:
    dense, data, _ = task
    if name == "fine_tuned":
        tuned = [fine_tune(small, data, rate, seed) for rate in RATES]
        return min(tuned, key=lambda each: evaluate(each, data.validation, data).loss)
    if name == "distilled":
        count = len(data.train.labels)
        inputs = AugmentedInputs(data, small, count, seed=seed, held_out=JUDGES)
        return dt.distill(small, dense, inputs, steps=STEPS, held_out=JUDGES)
    return small


def accuracy(model: nn.Module, data: ImageData) -> float:
    return 100 * evaluate(model, data.test, data).accuracy


def fine_tune(small: nn.Module, data: ImageData, rate: float, seed: int) -> nn.Module:
    network = copy.deepcopy(small).train()
    optimizer = torch.optim.SGD(network.parameters(), rate, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for images, labels in train_batches(data, BATCH, seed=seed, steps=range(STEPS)):
        logits = network(preprocess(images, network, data))
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def write_onnx(model: nn.Module, path: Path, images: Sequence[Tensor]) -> tuple[Path, Path]:
    """Return the files of a network, and of it in int8."""
    export_onnx(model, path, images[0][:2])
    return path, quantize_onnx(path, path.with_suffix(".int8.onnx"), images)


def measure_speed(
    path: Path, name: str, model: nn.Module, images: list[Tensor], options: argparse.Namespace
) -> None:
    """Time those whose rows are missing in turn with the dense network, every runtime by itself."""
    x, batch = torch.randn(options.batch, 3, SIDE, SIDE), options.batch
    dense, *keys = [(name, *pair, batch) for pair in options.wanted]
    keys = [key for key in keys if key not in read(path)]
    if not keys:
        return
    keys.insert(0, dense)
    networks = [make_smaller(model, way, ratio, images) for _, ratio, way, _ in keys]
    rows = [dict(zip(("network", "ratio", "way", "batch"), key, strict=True)) for key in keys]
    plain = [copy.deepcopy(m).to(memory_format=torch.contiguous_format) for m in networks]
    folded = [fuse(m).to(memory_format=torch.channels_last) for m in networks]
    kinds = {"contiguous": plain, "eager": networks, "folded": folded}
    runs = {column: [partial(run, m, x) for m in modules] for column, modules in kinds.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = [write_onnx(m, Path(folder) / f"{i}.onnx", [x]) for i, m in enumerate(networks)]
        for i, column in enumerate(["onnxruntime", "int8"]):
            runs[column] = [OnnxNetwork(each[i], 1).make_runner(x) for each in files]
    for column, functions in runs.items():
        first = "onnxruntime" if column in ("onnxruntime", "int8") else "contiguous"
        reference, *times = time_interleaved([runs[first][0], *functions], rounds=ROUNDS)
        for row, own in zip(rows, times, strict=True):
            row[column] = median_ratio(reference, own)
    for row in rows:
        write(path, row)


@torch.inference_mode()
def run(model: nn.Module, x: Tensor) -> object:
    return model(x)


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows that are there by their first four columns, which tell what they are of."""
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    present = [{name: value for name, value in row.items() if value == value} for row in rows]
    return {tuple(row.values())[:4]: row for row in present}


def write(path: Path, row: dict[str, Any]) -> None:
    """Add a row, in place of what is there of it."""
    rows = read(path) | {tuple(row.values())[:4]: row}
    pd.DataFrame(rows.values()).to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
