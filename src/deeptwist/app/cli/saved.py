"""The commands on a network that is there: told of, tried on images, timed, exported.

Heavy imports wait inside the commands, so that help answers at once.
"""

from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from deeptwist.app.cli import console
from deeptwist.app.cli.options import (
    AsJson,
    BenchmarkOptions,
    NetworkOptions,
    PlanOptions,
    WeightOptions,
    check_inputs,
    find_small,
    make_job,
)
from deeptwist.app.training.recipe import DataRecipe
from deeptwist.errors import DeepTwistError

if TYPE_CHECKING:
    from deeptwist.compress import Job

_BENCHMARK = BenchmarkOptions()


def evaluate(
    network: WeightOptions | None = None,
    *,
    data: Annotated[DataRecipe | None, Parameter(name="*")] = None,
    small: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy and loss on the test images: of a dense network or of a saved small one.

    ```
    deeptwist evaluate resnet32 --data cifar10 --weights resnet32.safetensors
    deeptwist evaluate --data cifar10 --small runs/tucker/model
    ```

    Args:
        small: A folder that deeptwist saved, instead of --weights; it says what its network is.
    """
    if data is None:
        raise DeepTwistError("name the images: --data digits, or a folder")
    data.check_source()
    network = network or _saved_network(small)
    check_inputs(network.model, network.weights)
    small = small and find_small(small)
    if (small is None) == (network.weights is None):
        raise DeepTwistError("give either --weights of the dense network or --small of a small one")
    from deeptwist.app.data import load_data
    from deeptwist.app.training.evaluation import evaluate
    from deeptwist.save import load

    dataset = load_data(data)
    built = network.build(dataset.sizes, bare=small is not None)
    if small is not None:
        built = load(small, model=built)
    result = evaluate(built, dataset.test, dataset, progress=console.progress_bar)
    values = {"data": dataset.name, "images": len(dataset.test.labels), **asdict(result)}
    text = "accuracy {accuracy:.2%}, loss {loss:.4f} on {images:,} images of {data}"
    console.print_result(values, as_json, lambda values: print(text.format(**values)))


def benchmark(
    network: NetworkOptions | None = None,
    *,
    small: Path | None = None,
    options: PlanOptions = None,
    settings: BenchmarkOptions = _BENCHMARK,
    as_json: AsJson = False,
) -> None:
    """Time a network dense and decomposed, in turn, in one process: each layer, then the whole.

    ```
    deeptwist benchmark torchvision/resnet34 --decomposition tucker --ratio 4
    deeptwist benchmark --small runs/tucker/model --batch 1 64 --threads 1 2
    deeptwist benchmark torchvision/resnet34 --ratio 4 --runtime eager onnxruntime
    ```

    Args:
        small: A folder that deeptwist saved; without it the network is decomposed here.
    """
    network = network or _saved_network(small)
    job = _make_small_job(network, options, small)
    from deeptwist.plan.latency import time_plan

    combinations, rounds, layers = settings.settings(), settings.rounds, []
    if settings.layers:
        reference, eager = next(job.model.parameters()), replace(combinations[0], runtime="eager")
        with console.progress_bar("layers", len(job.plan.compressed)) as advance:
            times = time_plan(job.plan, reference, eager, rounds=rounds, on_layer=advance)
        layers = console.layer_rows(job.plan, times)
    timed = job.time(network.example_input, combinations, rounds)
    names = [field.name for field in fields(combinations[0])]
    networks = [
        {"setting": {name: row.pop(name) for name in names}, "reason": None, **row}
        for row in timed["settings"]
    ]
    values = {**console.plan_counts(job.plan), "networks": networks, "layers": layers}
    result = {"machine": timed["machine"], **values}
    console.print_result(result, as_json, partial(console.print_benchmark, network.model))


def export(
    network: NetworkOptions | None = None,
    *,
    out: Path,
    small: Path | None = None,
    format: Literal["onnx", "program", "state-dict"] = "onnx",
    batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    options: PlanOptions = None,
    as_json: AsJson = False,
) -> None:
    """Write a decomposed network for use without deeptwist, and verify what was written.

    ```
    deeptwist export --small runs/tucker/model --out small.onnx
    deeptwist export torchvision/resnet34 --ratio 4 --format program --out r34.pt2
    deeptwist export --small runs/unet/model --dynamic-size --out unet.onnx
    deeptwist export --small runs/detector/model --batch 1 --out detector.onnx
    ```

    Args:
        out: The file.
        small: A folder that deeptwist saved; without it the network is decomposed here.
        format: ONNX, a torch.export program (.pt2), or the tensors alone (.safetensors).
        batch: A fixed batch size, as detectors need; free if not given.
        dynamic_size: Leave height and width free too.
        opset: Version of ONNX's operators; torch's choice if not given.
    """
    network = network or _saved_network(small)
    if opset is not None and format != "onnx":
        raise DeepTwistError(f"--opset applies to ONNX only: leave it out with --format {format}")
    if format == "state-dict" and (batch is not None or dynamic_size):
        raise DeepTwistError("a state dict has no inputs: leave out --batch and --dynamic-size")
    if small is not None and network.weights is not None:
        raise DeepTwistError("the network in --small has weights: leave out --weights")
    job = _make_small_job(network, options, small)
    from deeptwist.export import export_onnx, export_program, export_state_dict

    decomposed = job.small
    example = network.example_input(batch or 2).to(next(decomposed.parameters()).dtype)
    if format == "state-dict":
        written = export_state_dict(decomposed, out)
    else:
        onnx = partial(export_onnx, opset=opset, metadata=job.metadata)
        write = export_program if format == "program" else onnx
        written = write(decomposed, out, example, batch=batch, dynamic_size=dynamic_size)
    result = {**asdict(written), "path": str(out), "format": format}
    console.print_result(result, as_json, console.print_exported)


def info(folder: Path, *, as_json: AsJson = False) -> None:
    """Tell what a saved network is: what it was made from, its layers, classes and images.

    ```
    deeptwist info runs/tucker/model
    ```

    Args:
        folder: What 'deeptwist decompose', 'train' or 'compress' saved, or a folder of theirs.
    """
    from deeptwist.app.serving import describe

    console.print_result(describe(find_small(folder)), as_json, console.print_info)


def predict(
    network: Path, images: tuple[Path, ...], /, *, top: int = 3, as_json: AsJson = False
) -> None:
    """Classify images as the network was trained to: by PyTorch, or by onnxruntime.

    ```
    deeptwist predict runs/tucker/model photo.jpg other.png
    deeptwist predict runs/r18/small-int8.onnx photo.jpg --top 1
    ```

    Args:
        network: A saved folder, which PyTorch runs, or an ONNX file.
        images: Files.
        top: How many classes of each are told.
    """
    if network.suffix != ".onnx":
        network = find_small(network)
    elif not network.is_file():
        raise DeepTwistError(f"no file '{network}'")
    for image in images:
        if not image.is_file():
            raise DeepTwistError(f"no image file '{image}'")
    from deeptwist.app.serving import predict

    values = predict(network, images, top=top)
    console.print_result({"images": values}, as_json, console.print_predictions)


def _saved_network(small: Path | None) -> NetworkOptions:
    """Return the network that a saved folder names, with the input that it was planned on.

    Raises:
        DeepTwistError: if there is no folder, or none that can be read.
    """
    if small is None:
        raise DeepTwistError("name a network, or the folder of a small one: --small FOLDER")
    small = find_small(small)
    from deeptwist.save import read_saved

    saved = read_saved(small)
    shape = next((each[0][1:] for each in saved.inputs if isinstance(each, tuple)), ())
    classes = saved.metadata.get("num_classes")
    return NetworkOptions(model=saved.base_model, num_classes=classes, input=shape or None)


def _make_small_job(network: NetworkOptions, options: PlanOptions, small: Path | None) -> "Job":
    """Return the job on a network whose small one is there: as saved, or as planned here.

    Raises:
        DeepTwistError: if both a folder and options of a plan are given, or the plan
            compresses no layer.
    """
    check_inputs(network.model, network.weights)
    if small is not None and options is not None:
        raise DeepTwistError(
            "the network in --small is decomposed already: leave out the options of a plan"
        )
    if small is None:
        job = make_job(network, options)
        job.choose_plan()
        job.decompose()
        return job
    small = find_small(small)
    from deeptwist.compress import Job
    from deeptwist.plan.planner import plan_from_model
    from deeptwist.save import load, read_saved

    metadata = read_saved(small).metadata
    if network.num_classes is None:
        network = replace(network, num_classes=metadata.get("num_classes"))
    dense = network.build(network.sizes, bare=True)
    decomposed = load(small, model=dense)
    plan = plan_from_model(decomposed, dense, network.example_input())
    job = Job(dense, lambda calibration, ratio: plan, list, progress=console.progress_bar)
    job.plan, job.small, job.metadata = plan, decomposed, metadata
    return job
