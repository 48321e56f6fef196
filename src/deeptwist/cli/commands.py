"""The commands: words to calls. Heavy imports wait inside, so that help answers at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from deeptwist._version import __version__
from deeptwist.cli.console import print_table, progress_bar
from deeptwist.cli.options import AsJson, Model, NetworkOptions, PlanOptions
from deeptwist.errors import DeepTwistError
from deeptwist.training.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from deeptwist.training.records import Summary

app = App(
    name="deeptwist",
    version=__version__,
    help_format="markdown",
    default_parameter=Parameter(negative=(), show_env_var=False),
    help="""Make a trained CNN smaller and faster by learning its low-rank approximation.

`deeptwist demo` shows all of it in two minutes.""",
)
_NETWORK, _PLAN, _SETTINGS = NetworkOptions(), PlanOptions(), Settings()


@app.command
def demo(*, out: Path = Path("runs/demo"), epochs: int = 25, seed: int = 0) -> None:
    """Train a small network on embedded data, compress it 4×, compare, write a report.

    ```
    deeptwist demo
    ```

    Args:
        out: Folder of the runs and the report; an earlier demo there is replaced.
        epochs: Of each training.
        seed: Of weights and data order.
    """
    from deeptwist.demo import demo_steps, run_demo

    with progress_bar("demo", demo_steps(epochs)) as advance:
        summaries, report = run_demo(out, epochs=epochs, seed=seed, on_step=advance)
    _print_summaries(
        "handwritten digits, ResNet-20, 4× on all convolutions but the first", summaries
    )
    print(f"\nmodels and records: {out}\nreport: {report}")


@app.command
def plan(
    model: Model,
    *,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = _PLAN,
    out: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers would be compressed, how, at what cost; change nothing.

    ```
    deeptwist plan resnet32 --weights resnet32.safetensors --ratio 4 --skip-first-conv
    deeptwist plan torchvision/resnet34 --decomposition spatial-svd --ratio 4 --min-in-channels 128
    ```

    Args:
        out: Write the plan as JSON to this file.
    """
    from deeptwist.files import write_text

    made = options.build(network.build(model), network.example_input(model))
    if out is not None:
        with _writing(out):
            write_text(out, made.to_json())
    print(made.to_json() if as_json else made)


@app.command
def decompose(
    model: Model,
    *,
    out: Path,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = _PLAN,
    as_json: AsJson = False,
) -> None:
    """Decompose a network as it is, without training, and save it.

    ```
    deeptwist decompose resnet32 --weights resnet32.safetensors --ratio 2 --out small/
    ```

    Args:
        out: Folder for config.json and model.safetensors.
    """
    from deeptwist.artefact import WEIGHTS, save
    from deeptwist.factorization import decompose as decompose_network

    dense = network.build(model)
    made = options.build(dense, network.example_input(model))
    if not made.compressed:
        raise DeepTwistError("the plan compresses no layer: 'deeptwist plan' shows the reasons")
    size = (save(decompose_network(dense, made), out, base_model=model) / WEIGHTS).stat().st_size
    result = {
        "out": str(out),
        "parameters_before": made.dense_parameters,
        "parameters": made.parameters,
        "macs_before": made.dense_macs,
        "macs": made.macs,
        "bytes": size,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{out}: {made.dense_parameters:,} → {made.parameters:,} parameters "
        f"({made.compression_ratio:.2f}×), {made.dense_macs:,} → {made.macs:,} MACs, "
        f"{len(made.compressed)} layers compressed, {len(made.kept)} kept"
    )


@app.command
def train(
    model: Model,
    *,
    data: str,
    out: Path,
    mode: Literal["dense", "deeptwist", "decomposed"] = "deeptwist",
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = _PLAN,
    settings: Annotated[Settings, Parameter(name="*")] = _SETTINGS,
    image_size: int | None = None,
    as_json: AsJson = False,
) -> None:
    """Train a network: as it is, under DeepTwist, or decomposed (conventional fine-tuning).

    ```
    deeptwist train resnet32 --data cifar10 --mode dense --out runs/dense --epochs 20
    deeptwist train resnet32 --data cifar10 --weights runs/dense/weights.safetensors
      --decomposition tucker --ratio 4 --skip-first-conv --no-linear --out runs/tucker
    ```

    Args:
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        out: Folder of the run: metrics, plan, model and summary.
        mode: See above.
        image_size: Resize a folder's images to this height and width.
    """
    import torch

    from deeptwist.data import load_data
    from deeptwist.decompositions import SVD
    from deeptwist.planning import plan as make_plan
    from deeptwist.training.job import run
    from deeptwist.training.loop import steps_per_epoch

    dataset = load_data(data, image_size=image_size)
    shape = tuple(dataset.train.images.shape[1:])
    torch.manual_seed(settings.seed)  # of the initial weights, where no checkpoint is given
    dense = network.build(model, num_classes=len(dataset.classes), in_channels=shape[0])
    example = torch.zeros(2, *shape)
    if mode == "dense":
        chosen = make_plan(dense, SVD(rank=1), exclude=("*",), example_input=example)
    else:
        chosen = options.build(dense, example)
    total = settings.epochs * steps_per_epoch(dataset, settings)
    with progress_bar(f"{mode} {model}", total) as advance:
        _, summary = run(
            dense,
            dataset,
            settings,
            out,
            mode=mode,
            plan=chosen,
            decomposition=str(options.method()) if options.plan is None else str(options.plan),
            ratio=options.ratio,
            name=out.name,
            model_name=model,
            on_step=advance,
        )
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        _print_summaries(f"{model} on {dataset.name}", [summary])


@app.command
def evaluate(
    model: Model,
    *,
    data: str,
    artefact: Path | None = None,
    network: NetworkOptions = _NETWORK,
    image_size: int | None = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy and loss on the test images: of a dense network or of a saved small one.

    ```
    deeptwist evaluate resnet32 --data cifar10 --weights resnet32.safetensors
    deeptwist evaluate resnet32 --data cifar10 --artefact runs/tucker/model
    ```

    Args:
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        artefact: A folder that deeptwist saved, instead of --weights.
        image_size: Resize a folder's images to this height and width.
    """
    from deeptwist.artefact import load
    from deeptwist.data import load_data
    from deeptwist.training.evaluation import evaluate as evaluate_network

    if (artefact is None) == (network.weights is None):
        raise DeepTwistError(
            "give either --weights of the dense network or --artefact of a small one"
        )
    dataset = load_data(data, image_size=image_size)
    images, labels = dataset.test.images, dataset.test.labels
    found = network.build(model, num_classes=len(dataset.classes), in_channels=images.shape[1])
    if artefact is not None:
        found = load(artefact, model=found)
    with progress_bar("evaluate", -(-len(labels) // 500)) as advance:
        result = evaluate_network(found, images, labels, dataset, on_batch=advance)
    values = {"data": dataset.name, "images": len(labels), **asdict(result)}
    if as_json:
        print(json.dumps(values))
    else:
        print(
            f"accuracy {result.accuracy:.2%}, loss {result.loss:.4f} on {len(labels):,} images of "
            f"{dataset.name}"
        )


@app.command
def benchmark(
    model: Model,
    *,
    artefact: Path | None = None,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = _PLAN,
    batch: int = 16,
    threads: int | None = None,
    rounds: int = 15,
    as_json: AsJson = False,
) -> None:
    """Time a network dense and decomposed, in turn, in one process.

    ```
    deeptwist benchmark torchvision/resnet34 --decomposition spatial-svd --ratio 4
    deeptwist benchmark resnet32 --artefact runs/tucker/model --batch 64 --threads 2
    ```

    Args:
        artefact: A folder that deeptwist saved; without it the network is decomposed here.
        batch: Images in the batch.
        threads: Processor threads; torch's choice if not given.
        rounds: Samples of each network.
    """
    import torch

    from deeptwist.artefact import load
    from deeptwist.benchmark import compare
    from deeptwist.factorization import decompose as decompose_network
    from deeptwist.machine import describe_machine

    for name, count in (("batch", batch), ("rounds", rounds), ("threads", threads)):
        least = 2 if name == "rounds" else 1
        if count is not None and count < least:
            raise DeepTwistError(f"{name} {count} is not a number from {least} on")
    if threads is not None:
        torch.set_num_threads(threads)
    dense = network.build(model).to(memory_format=torch.channels_last)
    example = network.example_input(model)
    if artefact is not None:
        small, made = load(artefact, model=network.build(model)), None
    else:
        made = options.build(dense, example)
        small = decompose_network(dense, made)
    small = small.to(memory_format=torch.channels_last)
    x = network.example_input(model, batch).to(memory_format=torch.channels_last)
    with progress_bar("benchmark", rounds) as advance:
        result = compare(dense, small, x, rounds=rounds, on_round=advance)
    values: dict[str, Any] = {
        "batch": batch,
        "machine": describe_machine(),
        **asdict(result),
        "parameters_before": _parameters(dense),
        "parameters": _parameters(small),
    }
    if made is not None:
        values |= {"macs_before": made.dense_macs, "macs": made.macs}
    if as_json:
        print(json.dumps(values))
        return
    rows = [
        [side, f"{timing.median:.2f}", f"{timing.lower:.2f} – {timing.upper:.2f}"]
        for side, timing in (("dense", result.dense), ("decomposed", result.decomposed))
    ]
    print_table(f"{model}, batch {batch}, ms", ["network", "median", "quartiles"], rows)
    verdict = f"{result.speedup:.2f}× faster"
    if result.speedup < 1:
        verdict = f"not worth it: {1 / result.speedup:.2f}× slower"
    macs = "" if made is None else f" at {made.dense_macs / made.macs:.2f}× fewer MACs"
    print(f"\n{verdict}{macs}\n{values['machine']}")


@app.command
def report(*runs: Path, out: Path = Path("report.html"), title: str = "deeptwist") -> None:
    """Turn finished runs into one page that opens offline.

    ```
    deeptwist report runs/dense runs/tucker --out report.html
    ```

    Args:
        runs: Folders that 'deeptwist train' wrote.
        out: The page.
        title: Its title.
    """
    from deeptwist.report import write_report
    from deeptwist.training.records import read_run

    if not runs:
        raise DeepTwistError("name the folder of at least one run")
    found = [read_run(run) for run in runs]
    with _writing(out):
        write_report(found, out, title=title)
    print(out)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from None


def _parameters(network: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _print_summaries(title: str, summaries: "list[Summary]") -> None:
    header = ["run", "accuracy", "untrained", "parameters", "MACs", "file", "latency", "speed-up"]
    rows = [
        [
            summary.name,
            f"{summary.accuracy:.2%}",
            "" if summary.accuracy_untrained is None else f"{summary.accuracy_untrained:.2%}",
            f"{summary.parameters:,}",
            f"{summary.macs:,}",
            f"{summary.bytes / 1024:,.0f} kB",
            "" if summary.latency is None else f"{summary.latency.decomposed.median:.2f} ms",
            "" if summary.latency is None else f"{summary.latency.speedup:.2f}×",
        ]
        for summary in summaries
    ]
    print_table(title, header, rows)
