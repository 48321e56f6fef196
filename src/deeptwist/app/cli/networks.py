"""Commands on networks: plan, decompose, benchmark, export.

Heavy imports wait inside the commands, so that help answers at once.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from deeptwist.app.cli.console import progress_bar, writing
from deeptwist.app.cli.options import (
    NO_CALIBRATION,
    NO_SWEEP,
    AsJson,
    BenchmarkOptions,
    CalibrationOptions,
    Model,
    NetworkOptions,
    PlanOptions,
    SweepOptions,
    small_network,
)
from deeptwist.app.cli.tables import print_layers, print_networks
from deeptwist.app.training.recipe import CompressionRecipe
from deeptwist.errors import DeepTwistError

_NETWORK, _BENCHMARK = NetworkOptions(), BenchmarkOptions()


def plan(
    model: Model,
    *,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = None,
    calibration: CalibrationOptions = NO_CALIBRATION,
    out: Path | None = None,
    sweep: SweepOptions = NO_SWEEP,
    as_json: AsJson = False,
) -> None:
    """Show which layers would be compressed, how, at what cost; change nothing.

    ```
    deeptwist plan resnet32 --weights resnet32.safetensors --ratio 4
    deeptwist plan torchvision/resnet34 --decomposition spatial-svd --ratio 4 --min-in-channels 128
    deeptwist plan resnet32 --weights r32.safetensors --decomposition spatial-svd tucker --macs 3
      --calibrate cifar10
    ```

    Args:
        out: Write the plan as JSON to this file.
    """
    from deeptwist.files import write_text

    recipe = options or CompressionRecipe()
    if sweep.sweep:
        from deeptwist.app.cli.sweep import run_sweep

        run_sweep(model, network, recipe, calibration, sweep, as_json=as_json)
        return
    dense, example = network.build(model), network.example_input(model)
    moments = calibration.moments(dense, calibration.inputs(dense, example))
    planned = recipe.make_plan(dense, example, calibration=moments)
    if out is not None:
        with writing(out):
            write_text(out, planned.to_json())
    print(planned.to_json() if as_json else planned)


def decompose(
    model: Model,
    *,
    out: Path,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = None,
    calibration: CalibrationOptions = NO_CALIBRATION,
    recalibrate: bool = False,
    as_json: AsJson = False,
) -> None:
    """Decompose a network as it is, without training, and save it.

    ```
    deeptwist decompose resnet32 --weights resnet32.safetensors --ratio 2 --out small/
    deeptwist decompose resnet32 --weights r32.safetensors --decomposition spatial-svd --macs 2
      --calibrate cifar10 --recalibrate --out small/
    ```

    Args:
        out: Folder for config.json and model.safetensors.
        recalibrate: Take batch norm's statistics anew on the images of --calibrate.
    """
    from deeptwist.save import WEIGHTS, save

    _, small, planned = small_network(
        model, network, options, None, calibration, recalibrate=recalibrate
    )
    size = (save(small, out, base_model=model) / WEIGHTS).stat().st_size
    if as_json:
        result = {
            "out": str(out),
            "parameters_before": planned.dense_parameters,
            "parameters": planned.parameters,
            "macs_before": planned.dense_macs,
            "macs": planned.macs,
            "bytes": size,
        }
        print(json.dumps(result))
        return
    print(
        f"{out}: {planned.dense_parameters:,} → {planned.parameters:,} parameters "
        f"({planned.compression_ratio:.2f}×), {planned.dense_macs:,} → {planned.macs:,} MACs, "
        f"{len(planned.compressed)} layers compressed, {len(planned.kept)} kept"
    )


def benchmark(
    model: Model,
    *,
    artefact: Path | None = None,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = None,
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
    from deeptwist.app.benchmark.suite import benchmark as run_benchmark

    combinations = settings.settings()
    dense, small, planned = small_network(model, network, options, artefact)
    steps = len(planned.compressed) * settings.layers + settings.rounds * len(combinations)
    with progress_bar("benchmark", steps) as advance:
        result = run_benchmark(
            dense,
            small,
            planned,
            lambda batch: network.example_input(model, batch),
            combinations,
            rounds=settings.rounds,
            layers=settings.layers,
            on_step=advance,
        )
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    print_layers(result.layers)
    print_networks(model, result.networks, result.macs_before / max(1, result.macs))
    memory = result.peak_memory
    print(
        f"\npeak memory at batch {combinations[0].batch}, above weights and input: "
        f"dense {memory.dense / 2**20:.1f} MB, decomposed {memory.decomposed / 2**20:.1f} MB"
        f"\n{result.machine}"
    )


def export(
    model: Model,
    *,
    out: Path,
    artefact: Path | None = None,
    format: Literal["onnx", "program", "state-dict"] = "onnx",
    batch: int | None = None,
    dynamic_size: Annotated[bool, Parameter(negative=())] = False,
    opset: int | None = None,
    network: NetworkOptions = _NETWORK,
    options: PlanOptions = None,
    as_json: AsJson = False,
) -> None:
    """Write a decomposed network for use without deeptwist, and verify what was written.

    ```
    deeptwist export resnet32 --artefact runs/tucker/model --out small.onnx
    deeptwist export torchvision/resnet34 --ratio 4 --format program --out small.pt2
    deeptwist export my_nets:unet --artefact runs/unet/model --dynamic-size --out small.onnx
    deeptwist export my_nets:detector --artefact runs/det/model --batch 1 --out small.onnx
    ```

    Args:
        out: The file.
        artefact: A folder that deeptwist saved; without it the network is decomposed here.
        format: ONNX, a torch.export program (.pt2), or the tensors alone (.safetensors).
        batch: A fixed batch size, as detectors need; free if not given.
        dynamic_size: Leave height and width free too.
        opset: Version of ONNX's operators; torch's choice if not given.
    """
    from deeptwist.export import export_onnx, export_program, export_state_dict

    if opset is not None and format != "onnx":
        raise DeepTwistError(f"--opset applies to ONNX only: leave it out with --format {format}")
    if format == "state-dict" and (batch is not None or dynamic_size):
        raise DeepTwistError("a state dict has no inputs: leave out --batch and --dynamic-size")
    if artefact is not None and network.weights is not None:
        raise DeepTwistError("the network in --artefact has weights: leave out --weights")
    _, small, _ = small_network(model, network, options, artefact)
    example = network.example_input(model, batch or 2).to(next(small.parameters()).dtype)
    if format == "onnx":
        written = export_onnx(
            small, out, example, batch=batch, dynamic_size=dynamic_size, opset=opset
        )
    elif format == "program":
        written = export_program(small, out, example, batch=batch, dynamic_size=dynamic_size)
    else:
        written = export_state_dict(small, out)
    if as_json:
        print(json.dumps({**asdict(written), "path": str(out), "format": format}))
        return
    version = "" if written.opset is None else f" (opset {written.opset})"
    print(f"{out}: {format}{version}, {written.bytes:,} bytes")
    if written.worst_difference is not None:
        batches = ", ".join(map(str, written.batches))
        sizes = ", ".join("×".join(map(str, size)) for size in written.sizes)
        print(
            f"outputs differ from PyTorch's by {written.worst_difference:.1e} at most, "
            f"at batches {batches}" + (f" and sizes {sizes}" if sizes else "")
        )
