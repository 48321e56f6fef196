"""The commands: words to calls. Heavy imports wait inside, so that help answers at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from deeptwist._version import __version__
from deeptwist.cli.console import print_table, progress_bar, speaks_for_all
from deeptwist.cli.options import (
    AsJson,
    BenchmarkOptions,
    Model,
    NetworkOptions,
    PlanOptions,
    Several,
    TrainOptions,
)
from deeptwist.cli.tables import print_layers, print_networks
from deeptwist.errors import DeepTwistError

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
_NETWORK, _PLAN = NetworkOptions(), PlanOptions()
_BENCHMARK, _TRAIN = BenchmarkOptions(), TrainOptions()


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
    from deeptwist.cli.demo import demo_steps, run_demo

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
    from deeptwist.serialization import write_text

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
    from deeptwist.decompose import decompose as decompose_network
    from deeptwist.serialization import WEIGHTS, save

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
    network: Annotated[str, Parameter(help="A recipe (.yaml), or a network as elsewhere.")],
    *,
    out: Path,
    options: TrainOptions = _TRAIN,
    compression: PlanOptions = _PLAN,
    resume: bool = False,
    as_json: AsJson = False,
) -> None:
    """Train a network: as it is, under DeepTwist, or decomposed (conventional fine-tuning).

    ```
    deeptwist train recipes/resnet32-cifar10-short.yaml --data cifar10 --out runs/svd
    deeptwist train recipes/resnet32-cifar10-short.yaml --data cifar10 --out runs/svd --resume
    deeptwist train recipes/resnet32-cifar10-short.yaml --set optimizer.lr=0.05 --out runs/faster
    deeptwist train resnet32 --data cifar10 --mode dense --epochs 20 --out runs/dense
    deeptwist train resnet32 --data cifar10 --weights runs/dense/weights.safetensors
      --decomposition tucker --ratio 4 --skip-first-conv --no-linear --out runs/tucker
    torchrun --nproc-per-node 2 -m deeptwist train recipes/resnet32-cifar10-short.yaml
      --out runs/two
    ```

    Args:
        out: Folder of the run: recipe, metrics, checkpoints, plan, model and summary.
        resume: Go on from the last checkpoint in the folder, if there is one.
    """
    from deeptwist.data import load_data
    from deeptwist.training.run import prepare, run

    recipe = options.recipe(network, compression.changes())
    data = load_data(recipe.data.source, image_size=recipe.data.image_size)
    job = prepare(recipe, data, name=out.name)
    with progress_bar(f"{recipe.mode} {recipe.model}", job.steps) as advance:
        summary = run(job, out, resume=resume, on_step=advance)
    if not speaks_for_all():
        return
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        _print_summaries(f"{recipe.model} on {data.name}", [summary])


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
    from deeptwist.data import load_data
    from deeptwist.serialization import load
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
    settings: BenchmarkOptions = _BENCHMARK,
    as_json: AsJson = False,
) -> None:
    """Time a network dense and decomposed, in turn, in one process: each layer, then the whole.

    ```
    deeptwist benchmark torchvision/resnet34 --decomposition spatial-svd --ratio 4
    deeptwist benchmark resnet32 --artefact runs/tucker/model --batch 1 64 --threads 1 2
    deeptwist benchmark torchvision/resnet34 --ratio 4 --runtime eager onnxruntime
    ```

    Args:
        artefact: A folder that deeptwist saved; without it the network is decomposed here.
    """
    import torch

    from deeptwist.benchmark.environment import describe_machine
    from deeptwist.benchmark.layers import compare_layers
    from deeptwist.benchmark.networks import measure, measure_memory
    from deeptwist.decompose import decompose as decompose_network
    from deeptwist.decompose import plan_from_model
    from deeptwist.serialization import load

    asked = settings.build()
    if artefact is not None:
        _check_not_planned(options)
    dense, example = network.build(model), network.example_input(model)
    if artefact is not None:
        small = load(artefact, model=network.build(model))
        made = plan_from_model(small, dense, example)
    else:
        made = options.build(dense, example)
        small = decompose_network(dense, made)
    timed_layers = made.compressed if settings.layers else ()
    steps = len(timed_layers) + settings.rounds * len(asked)
    torch.set_num_threads(asked[0].threads)
    with progress_bar("benchmark", steps) as advance:
        layers = []
        if timed_layers:
            like = next(dense.parameters()).to(getattr(torch, asked[0].dtype))
            layers = compare_layers(
                made, like, batch=asked[0].batch, rounds=settings.rounds, on_layer=advance
            )
        networks = list(
            measure(
                dense,
                small,
                lambda batch: network.example_input(model, batch),
                asked,
                rounds=settings.rounds,
                on_round=advance,
            )
        )
    memory = measure_memory(dense, small, network.example_input(model, asked[0].batch))
    macs_ratio = made.dense_macs / max(1, made.macs)
    if as_json:
        values = {
            "machine": describe_machine(),
            "parameters_before": _parameters(dense),
            "parameters": _parameters(small),
            "macs_before": made.dense_macs,
            "macs": made.macs,
            "networks": [asdict(one) for one in networks],
            "layers": [{**asdict(one), "efficiency": one.efficiency} for one in layers],
            "peak_memory": asdict(memory),
        }
        print(json.dumps(values))
        return
    print_layers(layers)
    print_networks(model, networks, macs_ratio)
    print(
        f"\npeak memory at batch {asked[0].batch}, above weights and input: "
        f"dense {memory.dense / 2**20:.1f} MB, decomposed {memory.decomposed / 2**20:.1f} MB"
        f"\n{describe_machine()}"
    )


@app.command
def export(
    model: Model,
    *,
    out: Path,
    artefact: Path | None = None,
    format: Literal["onnx", "program", "state-dict"] = "onnx",
    opset: int | None = None,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = _PLAN,
    as_json: AsJson = False,
) -> None:
    """Write a decomposed network for use without deeptwist, and verify what was written.

    ```
    deeptwist export resnet32 --artefact runs/tucker/model --out small.onnx
    deeptwist export torchvision/resnet34 --ratio 4 --format program --out small.pt2
    ```

    Args:
        out: The file.
        artefact: A folder that deeptwist saved; without it the network is decomposed here.
        format: ONNX, a torch.export program (.pt2), or the tensors alone (.safetensors).
        opset: Version of ONNX's operators; torch's choice if not given.
    """
    from deeptwist.decompose import decompose as decompose_network
    from deeptwist.export import export_onnx, export_program, export_state_dict
    from deeptwist.serialization import load

    if opset is not None and format != "onnx":
        raise DeepTwistError(f"--opset is of ONNX: leave it out with --format {format}")
    if artefact is not None:
        _check_not_planned(options)
        if network.weights is not None:
            raise DeepTwistError("the network in --artefact has weights: leave out --weights")
    dense, example = network.build(model), network.example_input(model)
    if artefact is not None:
        small = load(artefact, model=dense)
    else:
        made = options.build(dense, example)
        if not made.compressed:
            raise DeepTwistError("the plan compresses no layer: 'deeptwist plan' shows the reasons")
        small = decompose_network(dense, made)
    example = example.to(next(small.parameters()).dtype)
    if format == "onnx":
        written = export_onnx(small, out, example, opset=opset)
    elif format == "program":
        written = export_program(small, out, example)
    else:
        written = export_state_dict(small, out)
    values = {**asdict(written), "path": str(out), "format": format}
    if as_json:
        print(json.dumps(values))
        return
    version = "" if written.opset is None else f" (opset {written.opset})"
    print(f"{out}: {format}{version}, {written.bytes:,} bytes")
    if written.worst_difference is not None:
        batches = ", ".join(map(str, written.batches))
        print(
            f"outputs differ from PyTorch's by {written.worst_difference:.1e} at most, "
            f"at batches {batches}"
        )


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


@app.command
def reproduce(
    experiment: str | None = None,
    *,
    list_: Annotated[bool, Parameter("--list")] = False,
    profile: Literal["paper", "short", "smoke"] = "short",
    data: str | None = None,
    weights: Path | None = None,
    out: Path = Path("results"),
    runs: Path = Path("runs/reproduce"),
    seeds: Several[int] = (0,),
    only: Several[str] = (),
    draw_only: bool = False,
) -> None:
    """Run an experiment of the paper; write its table and figures beside the paper's numbers.

    ```
    deeptwist reproduce --list
    deeptwist reproduce fig5
    deeptwist reproduce fig2 --data cifar10-jpeg --weights resnet32-cifar10.safetensors
    deeptwist reproduce fig2 … --only '* 4×*' --seeds 0 1 2
    ```

    Args:
        experiment: One that --list names.
        list_: Show all experiments.
        profile: The paper's schedule, a short one, or a smoke test.
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        weights: A checkpoint of the network to start from.
        out: Folder of the results.
        runs: Folder of the runs, which experiments share; finished ones are read.
        seeds: Train each cell once with each.
        only: Train only cells of these names or globs.
        draw_only: Train nothing; draw what is finished.
    """
    from experiments.paper.experiments import EXPERIMENTS, experiment_of
    from experiments.paper.job import Request
    from experiments.paper.job import reproduce as run_experiment

    if list_:
        for one in EXPERIMENTS.values():
            cells = len(one.cells_of("short"))
            size = f"{cells} run{'s' * (cells > 1)}" if cells else "exact"
            print(f"{one.name:8}  {one.place:18}  {size:7}  {one.claim}")
        return
    if experiment is None:
        raise DeepTwistError("name an experiment: 'deeptwist reproduce --list' shows them")
    request = Request(
        profile=profile,
        data=data,
        weights=weights,
        out=out,
        runs=runs,
        seeds=seeds,
        only=only,
        draw_only=draw_only,
    )
    print(run_experiment(experiment_of(experiment), request, progress=progress_bar))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from None


def _check_not_planned(options: PlanOptions) -> None:
    if options != _PLAN:
        raise DeepTwistError(
            "the network in --artefact is decomposed already: leave out the options of a plan"
        )


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
    rows += [
        [f"{summary.name}, {refined.name}", f"{refined.accuracy:.2%}", *[""] * 6]
        for summary in summaries
        for refined in summary.refined
    ]
    print_table(title, header, rows)
