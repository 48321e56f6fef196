"""The whole job on a trained network: its steps shown, kept in one folder, skipped when done."""

import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deeptwist.app.cli.console import progress_bar, telling
from deeptwist.app.cli.options import CompressOptions, Goal
from deeptwist.app.data import load_data
from deeptwist.app.folders import JOB, RECIPE, check_folder, read_job
from deeptwist.app.report import write_report
from deeptwist.app.tables import int8_changes, speed
from deeptwist.app.training.devices import own_device
from deeptwist.app.training.evaluation import (
    AugmentedInputs,
    Evaluation,
    evaluate,
    test_inputs,
    training_inputs,
)
from deeptwist.app.training.recipe import Recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.compress import CALIBRATION, DISTILLED, FIND, SMALL, Job, Values
from deeptwist.decompose import decompose, recalibrate_batch_norm
from deeptwist.distill import HELD_OUT, distill
from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.files import explaining_writes, write_text
from deeptwist.measure.runtimes import Setting
from deeptwist.save import WEIGHTS, load

logger = logging.getLogger("deeptwist")

REPORT = "report.html"
_SANITY_IMAGES = 256  # test images that tell whether the dense network is what it should be
# At most, that a ratio is searched on; to evaluate more takes no longer than to learn.
_SEARCH_IMAGES, _SEARCH_IMAGES_LEARNING = 1000, 5000
_NORM_BATCHES = 8  # for batch norm, where nothing is trained: training leaves statistics that fit
_NORM_IMAGES = 1000  # training images that tell whether the new statistics are the better ones
_DISTILL_STEPS = 1500  # at most, and no more than are trained afterwards
_INT8_IMAGES = 512  # training images that activations' ranges are taken from
_INT8_LOSS = 0.01  # of accuracy beside fp32: what is lost beyond it is warned of

# What a step came to, in a line.
_EVALUATED = "accuracy {accuracy:.2%}, loss {loss:.4f}".format
_TRAINED = "accuracy {untrained:.2%} untrained, {accuracy:.2%} at the end".format
_EXPORTED = (
    "{dense:,} → {small:,} bytes; outputs differ from PyTorch's by {difference:.0e} at most"
).format
_QUANTIZED = "accuracy {dense[accuracy]:.2%} dense, {small[accuracy]:.2%} small".format

Results = dict[str, Values]  # of the steps, by name
# A name; what is done, to announce it; does it, giving plain values; these by name → a line.
Step = tuple[str, str, Callable[[], Values], Callable[..., str]]


def run_compress(
    recipe: Recipe,
    options: CompressOptions,
    folder: Path,
    *,
    goal: Goal | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Compress a network as asked, and return what every step came to; see `CompressOptions.check`.

    Raises:
        DeepTwistError: if the folder holds a job and `resume` is not given, or a step fails.
    """
    has_onnx = "onnxruntime" in options.runtime
    if has_onnx:
        with require_extra("onnx"):
            import onnxruntime  # noqa: F401 (said before the work, not after it)
            import onnxscript  # noqa: F401
    if options.distill_steps is None and recipe.mode != "finetune":  # it begins with the dense one
        options = replace(options, distill_steps=0)
    optional = (
        recipe.calibration_images > 0,
        goal is not None,
        options.distill_steps != 0,
        has_onnx,
        options.int8,
    )
    record = _begin(folder, {**recipe.to_dict(), "options": asdict(options)}, resume=resume)
    results, seconds, total = record["results"], record["seconds"], 7 + sum(optional)
    started = time.perf_counter()
    _say(f"[1/{total}] load: {recipe.model}, and the images of {recipe.data.source}")
    job = ImageJob(recipe, options, folder, has_goal=goal is not None)
    train_images, test_images = (len(split.labels) for split in (job.data.train, job.data.test))
    took = f"{time.perf_counter() - started:.1f} s"
    _say(f"      {train_images:,} images to train on, {test_images:,} test images ({took})")
    steps = _steps(job, results, options, goal)
    for number, (name, what, work, describe) in enumerate(steps, start=2):
        _say(f"[{number}/{total}] {name}: {what}")
        took = "done already"
        if name not in results:
            started = time.perf_counter()
            results[name] = work()
            seconds[name] = time.perf_counter() - started
            took = f"{seconds[name]:.1f} s"
            with explaining_writes(folder / JOB):
                write_text(folder / JOB, json.dumps(record, indent=1, ensure_ascii=False))
        _say(f"      {describe(**results[name])} ({took})")
    if not options.keep_calibration:
        (folder / CALIBRATION).unlink(missing_ok=True)
    reached = {} if goal is None else {"goal": goal(results["dense"]["accuracy"])}
    return record | reached


def _begin(folder: Path, asked: Values, *, resume: bool) -> Values:
    """Return the record of a job: see `read_job`; of a new one, what is asked for alone.

    Raises:
        DeepTwistError: if the folder holds a job and `resume` is not given, or another job or run.
    """
    new = {"job": json.loads(json.dumps(asked)), "results": {}, "seconds": {}}
    record = read_job(folder)
    if record is None and (folder / RECIPE).exists():
        raise DeepTwistError(f"{folder} holds a run of 'deeptwist train': choose another folder")
    check_folder(folder, "job", record and record["job"], new["job"], resume=resume)
    with explaining_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return record or new


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _steps(
    job: "ImageJob", results: Results, options: CompressOptions, goal: Goal | None
) -> Iterator[Step]:
    """Yield the steps after the loading, in their order, each when those before it are done."""
    recipe, steps, settings = job.recipe, job.steps, options.settings()
    what = f"the dense {recipe.model} on {len(job.data.test.labels):,} images of {job.data.name}"
    yield "dense", what, job.evaluate_dense, _EVALUATED
    dense = results["dense"]
    if recipe.calibration_images:
        count = min(recipe.calibration_images, len(job.data.train.labels))
        what = f"{count:,} training images"
        yield "calibrate", what, steps.calibrate, "{layers} layers".format
    if goal is not None:
        max_loss = dense["accuracy"] - goal(dense["accuracy"])
        what = (
            f"the largest factor of {job.find} that costs at most {100 * max_loss:.2f} points on "
            f"either half of {len(job.search_images.labels):,} other images"
        )
        yield "search", what, partial(job.search, max_loss), _describe_search
    plan = steps.choose_plan if goal is None else steps.describe_plan
    yield "plan", recipe.compression.label, plan, _describe_plan
    if job.distill_steps:
        has_learned = goal is not None and results["search"]["learned"]
        distill = partial(job.distill, has_learned=has_learned)
        yield "distill", f"the dense {recipe.model}, without labels", distill, _describe_distill
    epochs = recipe.schedule.epochs
    what = f"{recipe.mode} for {epochs} epochs" if epochs else "no training"
    what = what if job.distill_steps else f"decompose, {what}"
    yield "train", what, partial(job.train, dense), _TRAINED
    verify = partial(job.verify, None if goal is None else goal(dense["accuracy"]))
    yield "verify", f"what is in {job.folder / SMALL}", verify, _EVALUATED
    if "onnxruntime" in options.runtime:
        export = partial(steps.export, job.example_input(2))
        yield "export", "both networks to ONNX, verified", export, _EXPORTED
    measure = partial(steps.time, job.example_input, settings, options.rounds)
    yield "time", "both networks, in turn", measure, _describe_times
    if options.int8:
        setting = next(setting for setting in settings if setting.runtime == "onnxruntime")
        what = "both networks by onnxruntime, calibrated on training images"
        yield "int8", what, partial(job.int8, results, setting), _QUANTIZED
    yield "report", REPORT, job.report, "{path}".format


def _describe_search(
    least: float, kept: bool, ratio: float, learned: bool, tried: list[tuple[float, float, bool]]
) -> str:
    in_order = sorted(tried, key=lambda case: (case[2], case[0]))
    shown = ", ".join(
        f"{ratio:g}×: {accuracy:.2%}" + (" distilled" if learns else "")
        for ratio, accuracy, learns in in_order
    )
    short = "" if kept else ", which costs more untrained"
    return f"{ratio:g}×{short} (at least {least:.2%}; {shown})"


def _describe_plan(layers: int, promise: str | None = None, **sizes: int) -> str:
    weights = sizes["dense_parameters"] / sizes["parameters"]
    macs = sizes["dense_macs"] / max(1, sizes["macs"])
    text = f"{layers} layers, {weights:.2f}× fewer weights, {macs:.2f}× fewer MACs"
    return text + (f", {promise}" if promise else "")


def _describe_distill(steps: int | None, images: int) -> str:
    how = "in the search" if steps is None else f"{steps:,} steps"
    return f"{how}, on {images:,} images, without their labels"


def _describe_times(machine: str, settings: list[Values]) -> str:
    speedups = [
        f"{row['runtime']} {speed(row['times']['speedup'])}" if row["times"] else row["reason"]
        for row in settings
    ]
    return f"{', '.join(speedups)}, on {machine}"


class ImageJob:
    """A job on images, as a recipe says.

    Attributes:
        recipe: the network, the data, what is compressed and how it is trained.
        options: what else was asked for.
        folder: of the job.
        distill_steps: in which the decomposed network learns from the dense one.
        data: the images, without those held out or searched on; the test images tell results.
        search_images: those that a goal's ratio is searched on; no result is told on them.
        model: the dense network.
        example_input: a number of test images → them as the network gets them.
        training_inputs: the same of training images, always the same ones, in batches.
        find: the option that a goal finds the largest value of.
        steps: those of every job.
    """

    def __init__(self, recipe: Recipe, options: CompressOptions, folder: Path, *, has_goal: bool):
        """Load the images; with a goal, every second test image is there to search on."""
        data = load_data(recipe.data)
        self.search_images = data.test
        if has_goal:
            rows = torch.arange(len(data.test.labels))
            most = _SEARCH_IMAGES if options.distill_steps == 0 else _SEARCH_IMAGES_LEARNING
            self.search_images = data.test.subset(rows[::2]).subsample(most)
            data = replace(data, test=data.test.subset(rows[1::2]))
        self._run = build_run(replace(recipe, mode="dense"), data, name="dense")
        self.recipe, self.options, self.folder = recipe, options, folder
        steps = options.distill_steps
        default = min(self._run.steps or _DISTILL_STEPS, _DISTILL_STEPS)
        self.distill_steps = default if steps is None else steps
        self.data = self._run.data
        self.model = self._run.model.to(own_device()).eval()
        self.example_input = partial(test_inputs, self.data, self.model)
        self.training_inputs = partial(training_inputs, self.data, self.model)
        self.find = options.find or FIND
        self.steps = Job(
            self.model,
            partial(
                recipe.compression.make_plan,
                self.model,
                self.example_input(2),
                find=self.find.replace("-", "_"),
            ),
            partial(self.training_inputs, recipe.calibration_images, progress=progress_bar),
            self._recover,
            folder,
            progress_bar,
            data.metadata,
        )
        if not recipe.calibration_images:
            self.steps.calibration = None

    def evaluate(self, network: nn.Module) -> Values:
        """Evaluate a network on the test images."""
        return asdict(evaluate(network, self.data.test, self.data, progress=progress_bar))

    def evaluate_dense(self) -> Values:
        """Evaluate the dense network; warn soon if it is not what it should be."""
        # On a few images first: those of a large set take minutes.
        few = self.data.test.subsample(_SANITY_IMAGES)
        if evaluate(self.model, few, self.data).accuracy < 1.5 / len(self.data.classes):
            logger.warning(
                "the dense network guesses: are --weights and --image-size those it needs?"
            )
        size = sum(x.numel() * x.element_size() for x in self.model.state_dict().values())
        return {**self.evaluate(self.model), "bytes": size}

    def search(self, max_loss: float) -> Values:
        """Find the largest size that costs no more accuracy, on either half of the search images.

        The largest of many is flattered by the images that it was found on: other images are to
        keep the goal too.
        """
        count = len(self.search_images.labels)
        rows = [torch.arange(first, count, 2) for first in range(min(2, count))]
        halves = [self.search_images.subset(half) for half in rows]

        def accuracies(network: nn.Module) -> Tensor:
            scores = [evaluate(network, half, self.data).accuracy for half in halves]
            return torch.tensor(scores, dtype=torch.float64)

        dense = accuracies(self.model)  # of the same images: others may be easier or harder

        def score(network: nn.Module) -> float:
            return float(dense.mean() + (accuracies(network) - dense).min())

        learns = self.distill_steps > 0
        return self.steps.search(score, float(dense.mean()) - max_loss, learns=learns)

    def distill(self, *, has_learned: bool = False) -> Values:
        """Decompose, learn from the dense network, and keep what came out, if no search did."""
        if has_learned:
            return {"steps": None, "images": self._inputs_to_distill(held_out=0).count}
        inputs = self._inputs_to_distill()
        calibration = self.steps.calibration
        self.steps.small = decompose(self.model, self.steps.plan, calibration=calibration)
        minutes = self.options.distill_minutes
        with self._autocast():
            values = self.steps.distill(inputs, steps=self.distill_steps, minutes=minutes)
        return {**values, "images": inputs.count}

    def train(self, dense: Values) -> Values:
        """Decompose and train as the recipe says, and write the run's folder."""
        recipe, is_trained = self.recipe, self.recipe.schedule.epochs > 0
        calibration, plan, small = self.steps.calibration, self.steps.plan, None
        untrained = "distilled" if self.distill_steps else "no training"
        if self.distill_steps:
            small = load(self.folder / DISTILLED, model=self.model)
        elif not is_trained and not recipe.batch_norm_batches:
            small = decompose(self.model, plan, calibration=calibration)
            recipe = replace(recipe, batch_norm_batches=self._choose_batch_norm(small)[1])
        run = replace(
            self._run,
            recipe=recipe,
            model=copy.deepcopy(self.model),
            plan=plan,
            name=recipe.mode if is_trained else untrained,
            start=small,
            calibration=calibration,
            before=Evaluation(dense["loss"], dense["accuracy"], dense["top5"]),
        )
        with telling("train", run) as shown:
            summary = train(run, self.folder, resume=True, latency_batch=None, **shown)
        self.steps.small = self.steps.read_small()  # in place of the distilled one
        return {"accuracy": summary["accuracy"], "untrained": summary["accuracy_untrained"]}

    def verify(self, goal: float | None) -> Values:
        """Evaluate the small network as it is on the disk."""
        path = self.folder / SMALL
        size = (path / WEIGHTS).stat().st_size
        values = {"path": str(path), "bytes": size, "goal": goal}
        return {**self.evaluate(self.steps.small), **values}

    def int8(self, results: Results, setting: Setting) -> Values:
        """Quantise both networks; warn of one that loses more than it should."""
        values = self.steps.int8(
            self.evaluate,
            partial(self.training_inputs, _INT8_IMAGES, progress=progress_bar),
            self.example_input(setting.batch),
            threads=setting.threads,
            rounds=self.options.rounds,
        )
        for name, change in int8_changes({**results, "int8": values}).items():
            if change < -_INT8_LOSS:
                logger.warning(
                    "int8 costs the %s network %.2f points: quantize_onnx of what is in its file, "
                    "on more images, with other ranges (calibrate_method) or layers left out "
                    "(nodes_to_exclude) may cost less",
                    name,
                    -100 * change,
                )
        return values

    def report(self) -> Values:
        """Write the page of the job."""
        title = f"deeptwist compress {self.recipe.model.rpartition(':')[2]}"  # without its module
        return {"path": str(write_report([self.folder], self.folder / REPORT, title=title))}

    def _inputs_to_distill(self, held_out: int = HELD_OUT) -> AugmentedInputs:
        """Return the images that the small network learns on, from the first round on."""
        count, seed = self.options.distill_images, self.recipe.seed
        return AugmentedInputs(self.data, self.model, count, seed=seed, held_out=held_out)

    def _recover(self, small: nn.Module, learns: bool) -> nn.Module:
        """Return a network that a size is judged by, of batch norms anew, or distilled."""
        if not learns:
            return self._choose_batch_norm(small)[0]
        with self._autocast():
            return distill(
                small,
                self.model,
                self._inputs_to_distill(held_out=0),  # its score is its judge
                steps=self.distill_steps,
                minutes=self.options.distill_minutes,
                held_out=0,
            )

    def _autocast(self) -> torch.autocast:
        """Return what a network learns from the dense one in: no scaled loss, so no fp16."""
        is_half = self.recipe.precision == "bf16-mixed"
        return torch.autocast(own_device().type, torch.bfloat16, enabled=is_half)

    def _choose_batch_norm(self, small: nn.Module) -> tuple[nn.Module, int]:
        """Return a decomposed network and the batches of its batch norms.

        Statistics are taken anew, unless the recipe leaves it open and the old ones recognise as
        many training images, as they do where little was cut. (The loss would prefer new ones too
        soon.)
        """
        count = self.recipe.batch_norm_batches or _NORM_BATCHES
        size = self.recipe.batch_size
        anew = recalibrate_batch_norm(small, self.training_inputs(count * size, size))
        if self.recipe.batch_norm_batches:
            return anew, count
        judges = self.data.train.subsample(_NORM_IMAGES)
        before, after = (evaluate(net, judges, self.data).accuracy for net in (small, anew))
        return (anew, count) if after > before else (small, 0)
