"""The whole job on a trained network, stage by stage, in one folder."""

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from deeptwist._version import __version__
from deeptwist.app.cli.console import progress_bar
from deeptwist.app.cli.options import CompressOptions
from deeptwist.app.cli.stage_messages import (
    say_accuracy,
    say_export,
    say_int8,
    say_plan,
    say_search,
    say_times,
    say_training,
)
from deeptwist.app.cli.stages import Stages
from deeptwist.app.data import ImageData, Split, load_data
from deeptwist.app.report import write_report
from deeptwist.app.training.evaluation import (
    batch_size_for,
    evaluate,
    test_inputs,
    training_inputs,
)
from deeptwist.app.training.metrics import (
    ARTEFACT,
    PLAN,
    Evaluation,
    Run,
    Summary,
    Variant,
    read_run,
)
from deeptwist.app.training.post_training import recalibrate_batch_norm
from deeptwist.app.training.recipe import Recipe
from deeptwist.app.training.run import TrainingRun, build_run, train
from deeptwist.compress import BISECTIONS, RATIOS, largest_ratio
from deeptwist.decompose import decompose
from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.export import export_onnx
from deeptwist.export.int8 import quantize_onnx
from deeptwist.files import write_text
from deeptwist.measure.comparison import Comparison, compare_functions
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.networks import Setting
from deeptwist.measure.runtimes import OnnxNetwork, prepare
from deeptwist.plan.calibration import Calibration, calibrate
from deeptwist.plan.plan import Plan, read_plan
from deeptwist.save import WEIGHTS, load

logger = logging.getLogger("deeptwist")

RECORD = "compress.json"
_CALIBRATION, _REPORT = "calibration.safetensors", "report.html"
_RECALIBRATION = 8  # batches, where nothing is trained: training leaves statistics that fit
_COMPARED = 1000  # training images that tell whether the new statistics are the better ones
_GLANCE = 256  # test images that tell whether the dense network is what it should be
_INT8 = 512  # training images that activations' ranges are taken from
_SEARCHED = 1000  # images at most that a ratio is searched on


@dataclass(eq=False)
class Job:
    """A network, its images, and the folder that the stages write to.

    Attributes:
        recipe: the network, the data, what is compressed and how it is trained.
        options: what else was asked for.
        folder: of the job.
        dense: the dense network with its images, of which the test images tell results.
        search: the images that a goal's ratio is searched on; no result is told on them.
    """

    recipe: Recipe
    options: CompressOptions
    folder: Path
    dense: TrainingRun
    search: Split

    @property
    def model(self) -> nn.Module:
        """The dense network."""
        return self.dense.model

    @property
    def data(self) -> ImageData:
        """The images, without those held out or searched on."""
        return self.dense.data

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the calibration gave; `None` where the recipe asks for none."""
        path = self.folder / _CALIBRATION
        return Calibration.load(path) if self.recipe.calibration_images else None

    @cached_property
    def plan(self) -> Plan:
        """What is done to each layer."""
        return read_plan(self.folder / PLAN)

    @cached_property
    def small(self) -> nn.Module:
        """The small network as it is on the disk."""
        device = next(self.model.parameters()).device
        return load(self.folder / ARTEFACT, model=self.model).to(device)

    def inputs(self, count: int) -> Tensor:
        """Return so many test images as the network gets them."""
        return test_inputs(self.data, self.model, count)

    def training_inputs(self, count: int) -> Iterator[Tensor]:
        """Yield so many training images, the same ones every time."""
        return training_inputs(self.data, self.model, count)

    def make_plan(self, ratio: float | None = None) -> Plan:
        """Plan with the recipe's choices, at another ratio where one is given."""
        compression = self.recipe.compression
        if ratio is not None:
            compression = replace(compression, ratio=ratio)
        plan = compression.make_plan(self.model, self.inputs(2), calibration=self.calibration)
        if not plan.compressed:
            raise DeepTwistError("the plan compresses no layer: 'deeptwist plan' shows the reasons")
        return plan


def run_compress(
    recipe: Recipe, options: CompressOptions, folder: Path, *, resume: bool
) -> dict[str, Any]:
    """Compress a network as asked, and return what every stage came to.

    Raises:
        DeepTwistError: if the folder holds a job and `resume` is not given, or a stage fails.
    """
    goal = _check(recipe, options)
    wants_onnx = "onnxruntime" in options.runtime
    if wants_onnx:
        with require_extra("onnx"):
            import onnxruntime  # noqa: F401 (said before the work, not after it)
            import onnxscript  # noqa: F401
    job_values = {**recipe.to_dict(), "options": asdict(options)}
    optional = (recipe.calibration_images > 0, goal is not None, wants_onnx, options.int8)
    total = 7 + sum(optional)
    stages = Stages(folder / RECORD, job_values, total, resume=resume)
    stages.begin("load", f"{recipe.model}, and the images of {recipe.data.source}")
    job = _load(recipe, options, folder, has_goal=goal is not None)
    counts = (len(split.labels) for split in (job.data.train, job.data.test))
    stages.end("{:,} images to train on, {:,} to tell results on".format(*counts))
    _compress(job, stages, goal)
    if wants_onnx:
        stages.run("export", "both networks to ONNX, verified", lambda: _export(job), say_export)
    stages.run("time", "both networks, in turn", lambda: _time(job), say_times)
    if options.int8:
        what = "both networks by onnxruntime, calibrated on training images"
        stages.run("int8", what, lambda: _int8(job), say_int8)
    stages.run("report", _REPORT, lambda: _report(job, stages.results), lambda path: path)
    asked = {} if goal is None else {"goal": goal(stages.results["dense"]["accuracy"])}
    return stages.to_dict() | asked


def _compress(job: Job, stages: Stages, goal: Callable[[float], float] | None) -> None:
    recipe, data = job.recipe, job.data
    count = len(data.test.labels)
    what = f"the dense {recipe.model} on {count:,} images of {data.name}"
    dense = stages.run("dense", what, lambda: _evaluate_dense(job), say_accuracy)
    if recipe.calibration_images:
        what = f"{recipe.calibration_images:,} training images"
        stages.run("calibrate", what, lambda: _calibrate(job), lambda layers: f"{layers} layers")
    ratio = None
    if goal is not None:
        may_lose = dense["accuracy"] - goal(dense["accuracy"])
        what = (
            f"the largest ratio that costs at most {100 * may_lose:.2f} points on "
            f"{len(job.search.labels):,} other images"
        )
        ratio = stages.run("search", what, lambda: _search(job, may_lose), say_search)["ratio"]
    stages.run("plan", recipe.compression.label, lambda: _plan(job, ratio), say_plan)
    epochs = recipe.schedule.epochs
    what = f"decompose, {recipe.mode} for {epochs} epochs" if epochs else "decompose, no training"
    stages.run("train", what, lambda: _train(job, dense), say_training)
    what = f"what is in {job.folder / ARTEFACT}"
    stages.run("verify", what, lambda: _verify(job), say_accuracy)


def _check(recipe: Recipe, options: CompressOptions) -> Callable[[float], float] | None:
    """Check what was asked for; return dense accuracy → least accuracy, if there is a goal."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeepTwistError("compress is one process: train in several by 'deeptwist train'")
    if not recipe.training_mode.compresses:
        raise DeepTwistError(f"mode {recipe.mode} compresses nothing: finetune and deeptwist do")
    if recipe.fixed is not None:
        raise DeepTwistError("compress takes no 'fixed' layers: 'deeptwist train' does")
    if options.int8 and "onnxruntime" not in options.runtime:
        raise DeepTwistError("--int8 is onnxruntime's: add it to --runtime")
    compression = recipe.compression
    sizes = ("ratio", "macs", "latency", "latency_ms", "rank", "fraction", "plan")
    given = [name for name in sizes if getattr(compression, name) is not None]
    if options.goal is None:
        if not given and not compression.override:
            raise DeepTwistError(
                "say how small: --ratio 4, --macs 3, --latency 2, or --goal 'accuracy>=dense-0.01'"
            )
        return None
    if given:
        raise DeepTwistError(f"a --goal finds the ratio: leave out {', '.join(given)}")
    match = re.fullmatch(r"accuracy>=(dense-)?(0?\.\d+)", options.goal.replace(" ", ""))
    if match is None:
        raise DeepTwistError(
            f"cannot read the goal {options.goal!r}: write 'accuracy>=0.90' or "
            "'accuracy>=dense-0.01'"
        )
    number = float(match[2])
    return (lambda dense: dense - number) if match[1] else (lambda _: number)


def _load(recipe: Recipe, options: CompressOptions, folder: Path, *, has_goal: bool) -> Job:
    """Load the images; with a goal, every second test image is there to search on."""
    data = load_data(recipe.data)
    search = data.test
    if has_goal:
        rows = torch.arange(len(data.test.labels))
        search = data.test.subset(rows[::2]).evenly_spaced(_SEARCHED)
        data = replace(data, test=data.test.subset(rows[1::2]))
    dense = build_run(replace(recipe, mode="dense"), data, name="dense")
    dense.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Job(recipe, options, folder, dense, search)


# --- what the stages do


def _evaluate(job: Job, network: nn.Module) -> dict[str, Any]:
    total = -(-len(job.data.test.labels) // batch_size_for(job.data))
    with progress_bar("evaluate", total) as advance:
        return asdict(evaluate(network, job.data.test, job.data, on_batch=advance))


def _evaluate_dense(job: Job) -> dict[str, Any]:
    bytes_ = sum(x.numel() * x.element_size() for x in job.model.state_dict().values())
    # On a few images first: those of a large set take minutes.
    glance = evaluate(job.model, job.data.test.evenly_spaced(_GLANCE), job.data)
    if glance.accuracy < 1.5 / len(job.data.classes):
        logger.warning("the dense network guesses: are --weights and --image-size those it needs?")
    return {**_evaluate(job, job.model), "bytes": bytes_}


def _calibrate(job: Job) -> dict[str, Any]:
    moments = calibrate(job.model, job.training_inputs(job.recipe.calibration_images))
    moments.save(job.folder / _CALIBRATION)
    return {"layers": len(moments.moments)}


def _search(job: Job, may_lose: float) -> dict[str, Any]:
    # Against the dense network on the same images: the others may be easier or harder.
    least = evaluate(job.model, job.search, job.data).accuracy - may_lose
    tried: list[tuple[float, float]] = []

    def accuracy(ratio: float) -> float:
        small, _ = _decompose(job, job.make_plan(ratio))
        tried.append((ratio, evaluate(small, job.search, job.data).accuracy))
        advance()
        return tried[-1][1]

    with progress_bar("search", 2 + BISECTIONS) as advance:
        ratio = largest_ratio(accuracy, least)
    kept = ratio is not None
    return {"least": least, "kept": kept, "ratio": ratio or RATIOS[0], "tried": tried}


def _decompose(job: Job, plan: Plan) -> tuple[nn.Module, int]:
    """Decompose without training; return the network and the batches of its batch norms.

    Statistics are taken anew, unless the recipe leaves it open and the old ones recognise as many
    training images, as they do where little was cut. (The loss would prefer new ones too soon.)
    """
    small = decompose(job.model, plan, calibration=job.calibration)
    count = job.recipe.recalibration or _RECALIBRATION
    anew = recalibrate_batch_norm(small, job.data, count, job.recipe.batch_size)
    if job.recipe.recalibration:
        return anew, count
    seen = job.data.train.evenly_spaced(_COMPARED)
    before, after = (evaluate(network, seen, job.data).accuracy for network in (small, anew))
    return (anew, count) if after > before else (small, 0)


def _plan(job: Job, ratio: float | None) -> dict[str, Any]:
    plan = job.make_plan(ratio)
    write_text(job.folder / PLAN, plan.to_json())
    counts = ("dense_parameters", "parameters", "dense_macs", "macs")
    values = {name: getattr(plan, name) for name in counts}
    promise = None if plan.latency is None else str(plan.latency)
    return {"layers": len(plan.compressed), **values, "promise": promise}


def _train(job: Job, dense: dict[str, Any]) -> dict[str, Any]:
    is_trained = job.recipe.schedule.epochs > 0
    recipe = job.recipe
    if not is_trained and not recipe.recalibration:
        recipe = replace(recipe, recalibration=_decompose(job, job.plan)[1])
    run = replace(
        job.dense,
        recipe=recipe,
        model=copy.deepcopy(job.model),
        plan=job.plan,
        name=recipe.mode if is_trained else "no training",
        calibration=job.calibration,
        before=Evaluation(dense["loss"], dense["accuracy"], dense["top5"]),
    )
    with progress_bar("train", run.steps) as advance:
        summary = train(run, job.folder, resume=True, latency_batch=None, on_step=advance)
    return {"accuracy": summary.accuracy, "untrained": summary.accuracy_untrained}


def _verify(job: Job) -> dict[str, Any]:
    path = job.folder / ARTEFACT
    return {
        **_evaluate(job, job.small),
        "path": str(path),
        "bytes": (path / WEIGHTS).stat().st_size,
    }


def _export(job: Job) -> dict[str, Any]:
    written = {
        name: export_onnx(network, job.folder / f"{name}.onnx", job.inputs(2))
        for name, network in (("dense", job.model), ("small", job.small))
    }
    worst = max(file.worst_difference or 0.0 for file in written.values())
    return {"difference": worst, **{name: file.bytes for name, file in written.items()}}


def _time(job: Job) -> dict[str, Any]:
    settings = job.options.settings()
    rows = []
    with progress_bar("time", len(settings) * job.options.rounds) as advance:
        for setting in settings:
            try:
                runs = [
                    _runner(job, setting, name, network)
                    for name, network in (("dense", job.model), ("small", job.small))
                ]
            except DeepTwistError as error:
                rows.append({**asdict(setting), "times": None, "reason": str(error)})
                continue
            times = compare_functions(*runs, rounds=job.options.rounds, on_round=advance)
            rows.append({**asdict(setting), "times": asdict(times)})
    return {"machine": describe_machine(), "settings": rows}


def _runner(job: Job, setting: Setting, name: str, network: nn.Module) -> Callable[[], object]:
    x = job.inputs(setting.batch)
    if setting.runtime == "onnxruntime":
        return OnnxNetwork(job.folder / f"{name}.onnx", setting.threads).prepare(x)
    return prepare(
        network, x, runtime=setting.runtime, dtype=setting.dtype, threads=setting.threads
    )


def _int8(job: Job) -> dict[str, Any]:
    (setting, *_) = [s for s in job.options.settings() if s.runtime == "onnxruntime"]
    x, values, runs = job.inputs(setting.batch), {}, []
    for name in ("dense", "small"):
        path = job.folder / f"{name}-int8.onnx"
        quantize_onnx(job.folder / f"{name}.onnx", path, job.training_inputs(_INT8))
        network = OnnxNetwork(path, setting.threads)
        values[name] = {**_evaluate(job, network), "bytes": path.stat().st_size}
        runs.append(network.prepare(x))
    times = compare_functions(*runs, rounds=job.options.rounds)
    return {**values, "batch": setting.batch, "times": asdict(times)}


def _report(job: Job, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    run = read_run(job.folder)
    timed = next((row for row in results["time"]["settings"] if row["times"]), None)
    latency = None if timed is None else TypeAdapter(Comparison).validate_python(timed["times"])
    dense = results["dense"]
    summary = replace(run.summary, latency=latency, latency_batch=timed and timed["batch"])
    if "int8" in results:
        int8 = results["int8"]["small"]
        variant = Variant("int8", int8["accuracy"], int8["loss"], "small-int8.onnx")
        summary = replace(summary, variants=(*summary.variants, variant))
    runs = [Run(_dense_summary(job, summary, dense), [], [], None), replace(run, summary=summary)]
    path = write_report(runs, job.folder / _REPORT, title=f"deeptwist compress {_name(job)}")
    return {"path": str(path)}


def _name(job: Job) -> str:
    """Return the network's name without the module that it comes from."""
    return job.recipe.model.rpartition(":")[2]


def _dense_summary(job: Job, small: Summary, dense: dict[str, Any]) -> Summary:
    return replace(
        small,
        name="dense",
        mode="dense",
        decomposition=None,
        ratio=None,
        accuracy_untrained=None,
        accuracy=dense["accuracy"],
        loss=dense["loss"],
        parameters=small.parameters_before,
        macs=small.macs_before,
        bytes=dense["bytes"],
        steps=0,
        seconds=0.0,
        output_difference=None,
        latency=None,
        latency_batch=None,
        variants=(),
        version=__version__,
        top5=dense["top5"],
    )
