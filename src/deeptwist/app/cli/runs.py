"""Commands on runs: train, evaluate, report, and the demo of all of it.

Heavy imports wait inside the commands, so that help answers at once.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deeptwist.app.cli.console import progress_bar, speaks_for_all
from deeptwist.app.cli.options import AsJson, CompressOptions, Model, WeightOptions
from deeptwist.app.cli.tables import print_compressed, print_summaries
from deeptwist.app.training.recipe import DataRecipe, Recipe
from deeptwist.errors import DeepTwistError

_WEIGHTS, _COMPRESS = WeightOptions(), CompressOptions()


_NEXT = """
now with a network and images of your own (folders train/CLASS/, val/CLASS/):

  deeptwist plan torchvision/resnet18 --decomposition spatial-svd --ratio 4
  deeptwist train torchvision/resnet18 --data photos/ --image-size 128 \\
      --mode dense --epochs 30 --out runs/dense
  deeptwist compress torchvision/resnet18 --weights runs/dense/weights.safetensors \\
      --data photos/ --image-size 128 --ratio 4 --out runs/small"""


def demo(*, out: Path = Path("runs/demo"), epochs: int = 10, seed: int = 0) -> None:
    """Train a small network on embedded data, compress it, time both, write a report.

    ```
    deeptwist demo
    ```

    Args:
        out: Folder of the runs and the report; an earlier demo there is replaced.
        epochs: Of each training.
        seed: Of weights and data order.
    """
    from deeptwist.app.cli.demo import run_demo

    result = run_demo(out, epochs=epochs, seed=seed)
    print_compressed("handwritten digits, five convolutions of up to 256 channels", result)
    print(_NEXT)


def compress(
    network: Annotated[str, Parameter(help="A network as elsewhere, or a recipe (.yaml).")],
    *,
    out: Path,
    recipe: Annotated[Recipe, Parameter(name="*")],
    options: CompressOptions = _COMPRESS,
    resume: bool = False,
    as_json: AsJson = False,
) -> None:
    """Make a trained network smaller: the whole job in one command and one folder.

    Evaluates the dense network, calibrates, plans, decomposes, trains, takes batch norm's
    statistics anew, exports both networks to ONNX, times them in turn, writes a report. Unless a
    recipe or an option says otherwise, and whatever defaults stand below: spatial SVD on all
    convolutions but the first, calibrated on 1,024 images, and 6 epochs of conventional
    fine-tuning from a learning rate of 0.02.

    ```
    deeptwist compress resnet32 --weights r32.safetensors --data cifar10 --ratio 4 --out runs/r32
    deeptwist compress torchvision/resnet18 --weights r18.safetensors --data photos/
      --goal 'accuracy>=dense-0.01' --epochs 0 --int8 --out runs/r18
    deeptwist compress mine.models:network --data photos/ --macs 3 --batch 1 --out runs/mine
    deeptwist compress mine.models:network --data photos/ --macs 3 --batch 1 --out runs/mine
      --resume
    ```

    Args:
        out: Folder of the job: plan, small network, ONNX files, report, every stage's result.
        resume: Go on with the job in the folder: stages that are done are skipped.
    """
    from deeptwist.app.cli.compress import run_compress

    result = run_compress(recipe, options, out, resume=resume)
    if as_json:
        print(json.dumps(result))
        return
    print_compressed(f"{recipe.model} on {recipe.data.source}", result)


def train(
    network: Annotated[str, Parameter(help="A recipe (.yaml), or a network as elsewhere.")],
    *,
    out: Path,
    recipe: Annotated[Recipe, Parameter(name="*")],
    resume: bool = False,
    as_json: AsJson = False,
) -> None:
    """Train a network: as it is, under DeepTwist, or decomposed (conventional fine-tuning).

    ```
    deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --data cifar10 --out runs/svd
    deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --data cifar10 --out runs/svd --resume
    deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --optimizer.lr 0.05 --out runs/faster
    deeptwist train resnet32 --data cifar10 --mode dense --epochs 20 --out runs/dense
    deeptwist train resnet32 --data cifar10 --weights runs/dense/weights.safetensors
      --decomposition tucker --ratio 4 --out runs/tucker
    torchrun --nproc-per-node 2 -m deeptwist train recipes/resnet32-cifar10-10-epochs.yaml
      --out runs/two
    ```

    Args:
        out: Folder of the run: recipe, metrics, checkpoints, plan, model and summary.
        resume: Go on from the last checkpoint in the folder, if there is one.
    """
    from deeptwist.app.data import load_data
    from deeptwist.app.training.run import build_run
    from deeptwist.app.training.run import train as train_run

    data = load_data(recipe.data)
    run = build_run(recipe, data, name=out.name)
    with progress_bar(f"{recipe.mode} {recipe.model}", run.steps) as advance:
        summary = train_run(run, out, resume=resume, on_step=advance)
    if not speaks_for_all():
        return
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        print_summaries(f"{recipe.model} on {data.name}", [summary])


def evaluate(
    model: Model,
    *,
    data: Annotated[DataRecipe | None, Parameter(name="*")] = None,
    artefact: Path | None = None,
    network: WeightOptions = _WEIGHTS,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy and loss on the test images: of a dense network or of a saved small one.

    ```
    deeptwist evaluate resnet32 --data cifar10 --weights resnet32.safetensors
    deeptwist evaluate resnet32 --data cifar10 --artefact runs/tucker/model
    ```

    Args:
        artefact: A folder that deeptwist saved, instead of --weights.
    """
    from deeptwist.app.data import load_data
    from deeptwist.app.training.evaluation import batch_size_for
    from deeptwist.app.training.evaluation import evaluate as evaluate_network
    from deeptwist.save import load

    if data is None:
        raise DeepTwistError("name the images: --data digits, or a folder")
    if (artefact is None) == (network.weights is None):
        raise DeepTwistError(
            "give either --weights of the dense network or --artefact of a small one"
        )
    dataset = load_data(data)
    count = len(dataset.test.labels)
    built = network.build(model, num_classes=len(dataset.classes), in_channels=dataset.shape[0])
    if artefact is not None:
        built = load(artefact, model=built)
    with progress_bar("evaluate", -(-count // batch_size_for(dataset))) as advance:
        result = evaluate_network(built, dataset.test, dataset, on_batch=advance)
    if as_json:
        print(json.dumps({"data": dataset.name, "images": count, **asdict(result)}))
    else:
        print(
            f"accuracy {result.accuracy:.2%}, loss {result.loss:.4f} on {count:,} images of "
            f"{dataset.name}"
        )


def report(*runs: Path, out: Path = Path("report.html"), title: str = "deeptwist") -> None:
    """Turn finished runs into one page that opens offline.

    ```
    deeptwist report runs/dense runs/tucker --out report.html
    ```

    Args:
        runs: Folders that 'deeptwist train' or 'deeptwist compress' wrote.
        out: The page.
        title: Its title.
    """
    from deeptwist.app.report import write_report

    print(write_report(runs, out, title=title))
