"""The commands, and what help shows of them.

Heavy imports wait inside the commands, so that help answers at once.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from deeptwist._version import __version__
from deeptwist.app.cli import console
from deeptwist.app.cli.options import (
    COMPRESS_DEFAULTS,
    NO_CALIBRATION,
    NO_SWEEP,
    AsJson,
    CalibrationOptions,
    CompressOptions,
    NetworkOptions,
    PlanOptions,
    SweepOptions,
    check_inputs,
    check_size,
    make_job,
    values_of_recipe,
)
from deeptwist.app.cli.saved import benchmark, evaluate, export, info, predict
from deeptwist.app.folders import check_finished, check_same_recipe
from deeptwist.app.training.recipe import CompressionRecipe, Recipe
from deeptwist.files import explaining_writes, write_text

_COMPRESS = CompressOptions()
app = App(
    name="deeptwist",
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,  # `main` tells how to go on
    config=values_of_recipe,
    default_parameter=Parameter(negative=(), show_env_var=False),
    help_flags=("--help", "-h", "--help-all"),
    help_formatter=console.CommonOptions(),
    help_epilogue="`--help-all` shows every option of a command.",
    help="""Make a trained CNN smaller and faster by learning its low-rank approximation.

`deeptwist demo` shows all of it in two minutes.""",
)


@app.command
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
    from deeptwist.app.cli.demo import NEXT_STEPS, run_demo

    result = run_demo(out, epochs=epochs, seed=seed)
    console.print_compressed("handwritten digits, five convolutions of up to 256 channels", result)
    print(NEXT_STEPS)


@app.command(
    help_formatter=console.CommonOptions(
        "--network --out --weights --data --image-size --ratio --macs --latency --goal --find "
        "--exclude --decomposition --mode --epochs --lr --batch-size --calibration-images "
        "--distill-steps --int8 --runtime --batch --threads --resume --json",
        COMPRESS_DEFAULTS,
    )
)
def compress(
    network: Annotated[str, Parameter(help="A network as elsewhere, or a recipe (.yaml).")],
    *,
    out: Path,
    recipe: Annotated[Recipe, Parameter(name="*", group="Training")],
    options: CompressOptions = _COMPRESS,
    resume: bool = False,
    as_json: AsJson = False,
) -> None:
    r"""Make a trained network smaller: the whole job in one command and one folder.

    Evaluates the dense network, calibrates, plans, decomposes, has the small network learn from
    the dense one, trains it, exports both to ONNX, times them in turn, writes a report. Unless a
    recipe or an option says otherwise: spatial SVD on all convolutions but the first, calibrated
    on 1,024 images, and 6 epochs of conventional fine-tuning from a learning rate of 0.02. What a
    recipe leaves out is as `deeptwist train --help` says.

    ```
    deeptwist compress resnet32 --weights r32.safetensors --data cifar10 \
        --ratio 4 --out runs/r32
    deeptwist compress torchvision/resnet18 --weights DEFAULT --data photos/ \
        --goal 'accuracy>=dense-0.01' --epochs 0 --int8 --out runs/r18
    deeptwist compress mine.models:network --data photos/ --macs 3 --out runs/a
    deeptwist compress mine.models:network --data photos/ --macs 3 --out runs/a \
        --resume
    ```

    Args:
        out: Folder of the job: plan, small network, ONNX files, report, every step's result.
        resume: Go on with the job in the folder: steps that are done are skipped.
    """
    goal = options.check(recipe)
    check_inputs(recipe.model, recipe.weights, recipe.data)
    from deeptwist.app.cli.compress import run_compress

    result = run_compress(recipe, options, out, goal=goal, resume=resume)
    console.print_result(
        result,
        as_json,
        partial(console.print_compressed, f"{recipe.model} on {recipe.data.source}"),
    )


@app.command(
    help_formatter=console.CommonOptions(
        "--model --weights --input --image-size --num-classes --ratio --weight-budget --macs "
        "--latency --rank --decomposition --include --exclude --override --calibrate --out --sweep "
        "--data --page --json"
    )
)
def plan(
    network: NetworkOptions,
    *,
    options: PlanOptions = None,
    calibration: CalibrationOptions = NO_CALIBRATION,
    out: Path | None = None,
    sweep: SweepOptions = NO_SWEEP,
    as_json: AsJson = False,
) -> None:
    r"""Show which layers would be compressed, how, at what cost; change nothing.

    ```
    deeptwist plan resnet32 --weights resnet32.safetensors --ratio 4
    deeptwist plan torchvision/resnet34 --ratio 4 --min-in-channels 128
    deeptwist plan resnet32 --weights r32.safetensors --calibrate cifar10 \
        --decomposition spatial-svd tucker --macs 3
    ```

    Args:
        out: Write the plan as JSON to this file.
    """
    if sweep.sweep:
        check_inputs(network.model, network.weights, sweep.data)
        from deeptwist.app.cli.sweep import sweep_network
        from deeptwist.app.report import write_sweep

        recipe = options or CompressionRecipe()
        result = sweep_network(network, recipe, calibration, sweep)
        title = f"{network.model}, {recipe.label}"
        if sweep.page is not None:
            write_sweep(result, sweep.page, title=f"deeptwist plan --sweep {title}")
        console.print_result(result, as_json, partial(console.print_sweep, title))
        return
    job = make_job(network, options, calibration)
    planned = job.make_plan(job.calibration, None)
    if out is not None:
        with explaining_writes(out):
            write_text(out, planned.to_json())
    print(planned.to_json() if as_json else planned)


@app.command(
    help_formatter=console.CommonOptions(
        "--network --out --weights --data --image-size --mode --interval --ratio --macs --rank "
        "--decomposition --exclude --calibration-images --epochs --lr --batch-size --seed "
        "--precision --optimizer.name --schedule.kind --resume --json"
    )
)
def train(
    network: Annotated[str, Parameter(help="A recipe (.yaml), or a network as elsewhere.")],
    *,
    out: Path,
    recipe: Annotated[Recipe, Parameter(name="*", group="Training")],
    resume: bool = False,
    as_json: AsJson = False,
) -> None:
    r"""Train a network: as it is, under DeepTwist, or decomposed (conventional fine-tuning).

    ```
    deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --out runs/a
    deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --out runs/a --resume
    deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --lr 0.01 --out runs/b
    deeptwist train resnet32 --data cifar10 --mode dense --epochs 20 --out runs/c
    deeptwist train resnet32 --data cifar10 --weights runs/c/weights.safetensors \
        --decomposition tucker --ratio 4 --out runs/d
    torchrun --nproc-per-node 2 -m \
        deeptwist train recipes/resnet32-cifar10-10-epochs.yaml --out runs/e
    ```

    Args:
        out: Folder of the run: recipe, metrics, checkpoints, plan, model and summary.
        resume: Go on from the last checkpoint in the folder, if there is one.
    """
    if recipe.compresses:
        check_size(recipe.compression)
    if console.is_main_process():  # the others would see what it has begun
        check_same_recipe(out, recipe, resume=resume)
    check_inputs(recipe.model, recipe.weights, recipe.data)
    from deeptwist.app.data import load_data
    from deeptwist.app.training.run import build_run, train

    data = load_data(recipe.data)
    run = build_run(recipe, data, name=out.name, progress=console.progress_bar)
    with console.telling(f"{recipe.mode} {recipe.model}", run) as shown:
        summary = train(run, out, resume=resume, **shown)
    console.print_result(
        summary, as_json, partial(console.print_summary, f"{recipe.model} on {data.name}")
    )


@app.command
def decompose(
    network: NetworkOptions,
    *,
    out: Path,
    options: PlanOptions = None,
    calibration: CalibrationOptions = NO_CALIBRATION,
    recalibrate: bool = False,
    as_json: AsJson = False,
) -> None:
    r"""Decompose a network as it is, without training, and save it.

    ```
    deeptwist decompose resnet32 --weights r32.safetensors --ratio 2 --out small
    deeptwist decompose resnet32 --weights r32.safetensors --macs 2 \
        --calibrate cifar10 --recalibrate --out small
    ```

    Args:
        out: Folder for config.json and model.safetensors.
        recalibrate: Take batch norm's statistics anew on the images of --calibrate.
    """
    job = make_job(network, options, calibration, recalibrate=recalibrate)
    from deeptwist.save import WEIGHTS, save

    job.choose_plan()
    planned = job.plan
    small = job.decompose()
    saved = save(small, out, base_model=network.model, metadata=job.metadata)
    size = (saved / WEIGHTS).stat().st_size
    values = {"out": str(out), **console.plan_counts(planned), "bytes": size}
    text = (
        f"{out}: {planned.dense_parameters:,} → {planned.parameters:,} parameters "
        f"({planned.compression_ratio:.2f}×), {planned.dense_macs:,} → {planned.macs:,} MACs, "
        f"{len(planned.compressed)} layers compressed, {len(planned.kept)} kept"
    )
    console.print_result(values, as_json, lambda _: print(text))


@app.command
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
    for run in runs:
        check_finished(run)
    from deeptwist.app.report import write_report

    print(write_report(runs, out, title=title))


for command in (evaluate, benchmark, export, info, predict):
    app.command(command)
