"""The whole job: train as a recipe says, evaluate what is deployed, keep it with its records."""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deeptwist._version import __version__
from deeptwist.benchmark.comparison import Comparison, compare
from deeptwist.benchmark.environment import describe_machine
from deeptwist.data import Dataset, Split
from deeptwist.decompose import decompose
from deeptwist.decompositions import SVD
from deeptwist.errors import DeepTwistError
from deeptwist.models import build_model, load_weights
from deeptwist.plan.plan import Plan
from deeptwist.plan.plan import plan as make_plan
from deeptwist.serialization import WEIGHTS, atomic_write, save, write_text
from deeptwist.training import records
from deeptwist.training.ablations import RandomNoise
from deeptwist.training.evaluation import as_input, evaluate
from deeptwist.training.loop import Training, steps_per_epoch
from deeptwist.training.post_training import recalibrated
from deeptwist.training.recipe import Recipe, ScheduleRecipe
from deeptwist.training.records import Record, Refined, Summary, read_run
from deeptwist.training.run_dir import Folder, check_recipe, claimed
from deeptwist.twist.distortion import DeepTwist

_TAIL = "tail"


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe with the network, the plan and the images that it is run on.

    Attributes:
        recipe: see `Recipe`.
        model: with the weights that training starts from, in fp64 where the recipe says so;
            layers that it fixes are decomposed already, but in a dense run.
        plan: of the model.
        data: without the images that the recipe holds out.
        validation: those images; none where it holds out none.
        name: of the run, as tables call it.
    """

    recipe: Recipe
    model: nn.Module
    plan: Plan
    data: Dataset
    validation: Split | None
    name: str

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        tail = 0 if self.recipe.tail is None else self.recipe.tail.epochs
        epochs = self.recipe.schedule.epochs + tail
        return epochs * steps_per_epoch(self.data, self.recipe.batch_size)


def prepare(recipe: Recipe, data: Dataset, *, name: str, model: nn.Module | None = None) -> Job:
    """Builds and plans a recipe's network.

    Args:
        recipe: see `Recipe`.
        data: see `deeptwist.data.load_data`.
        name: of the run.
        model: a network in place of the recipe's own; most modes change it in place.

    Raises:
        DeepTwistError: if there is no such network, its weights do not fit, it cannot be planned
            so, or more images are held out than there are.
    """
    shape = data.train.images.shape[1:]
    if model is None:
        torch.manual_seed(recipe.seed)
        channels = None if shape[0] == 3 else int(shape[0])  # 3 is what networks take by themselves
        model = build_model(recipe.model, num_classes=len(data.classes), in_channels=channels)
        if recipe.weights is not None:
            load_weights(model, recipe.weights)
    if recipe.precision == "64-true":  # Fabric would do so later: copies made until then, not
        model.double()
    example = torch.zeros(2, *shape).to(next(model.parameters()))
    if recipe.fixed is not None and recipe.mode != "dense":
        model = _fixed(model, recipe.fixed.make_plan(model, example))
    if recipe.mode == "dense":  # its plan says what it costs
        plan = make_plan(model, SVD(rank=1), exclude=("*",), example_input=example)
    else:
        plan = recipe.compression.make_plan(model, example)
    data, validation = _hold_out(data, recipe.data.validation)
    return Job(recipe, model, plan, data, validation, name)


def run(
    job: Job,
    folder: Path,
    *,
    resume: bool = False,
    latency_batch: int | None = 16,
    on_record: Callable[[Record], None] = lambda record: None,
    on_step: Callable[[], None] = lambda: None,
) -> Summary:
    """Trains, evaluates what would be deployed, and writes the run's folder.

    Under ``torchrun``, all processes train together; the first one writes.

    Args:
        job: its model is changed in place, where the mode does not decompose it first.
        folder: where the run is written.
        resume: go on from the last checkpoint in the folder, if there is one; a finished run is
            read.
        latency_batch: images in the batch that latency is measured on; none to leave it out.
        on_record: called with every epoch's and every distortion's record.
        on_step: called after every optimizer step, those before the checkpoint included.

    Raises:
        DeepTwistError: if the folder holds a run and `resume` is not given, or one of another
            recipe; if another live process is using it; or if training fails.
    """
    if resume and (folder / records.SUMMARY).exists():
        check_recipe(folder, job.recipe, resume=True)
        return read_run(folder).summary
    fabric = _launched(job.recipe)
    with claimed(folder, job.recipe, fabric, resume=resume):
        return _run(fabric, job, folder, latency_batch, on_record, on_step)


def _run(
    fabric: Fabric,
    job: Job,
    folder: Path,
    latency_batch: int | None,
    on_record: Callable[[Record], None],
    on_step: Callable[[], None],
) -> Summary:
    recipe, plan, model = job.recipe, job.plan, job.model.to(fabric.device)
    dense = recipe.mode == "dense"
    test = job.data.test.images, job.data.test.labels, job.data
    before = evaluate(model, *test)
    small = None if dense else decompose(model, plan)
    untrained = None if small is None else evaluate(small, *test)
    teacher = None if recipe.distillation is None else copy.deepcopy(model)
    trained = small if small is not None and recipe.mode == "decomposed" else model
    average = None
    if recipe.ema is not None:
        decay = get_ema_multi_avg_fn(recipe.ema)
        average = AveragedModel(trained, multi_avg_fn=decay, use_buffers=True)
    twist = None if dense or recipe.mode == "decomposed" else _twist(job)
    training = Training(
        fabric,
        trained,
        job.data,
        recipe,
        recipe.schedule,
        recipe.optimizer.lr,
        twist=twist,
        teacher=teacher,
        average=average,
        validation=job.validation,
    )
    if fabric.is_global_zero and not dense:
        write_text(folder / records.PLAN, plan.to_json())
    main = Folder(folder, fabric)
    hooks = main.train(training, on_record, on_step)
    final = training.finish(hooks)
    after = evaluate(final, *test)
    weights = _write(fabric, final, folder / _file(dense, ""), recipe.model)
    refined = []
    for name, network in _variants(job, training, average, final):
        refined.append(_refined(fabric, job, folder, name, network))
    if recipe.tail is not None:
        tailed = copy.deepcopy(final)
        schedule = ScheduleRecipe(epochs=recipe.tail.epochs)
        further = Training(
            fabric, tailed, job.data, recipe, schedule, recipe.tail.lr, teacher=teacher
        )
        tail = Folder(folder / _TAIL, fabric)
        tail.train(further, on_record, on_step)
        refined.append(_refined(fabric, job, folder, _TAIL, tailed))
        tail.close()
    latency = None if dense else _latency(job, final, latency_batch)
    summary = Summary(
        name=job.name,
        mode=recipe.mode,
        model=recipe.model,
        data=job.data.name,
        decomposition=None if dense else recipe.compression.label,
        ratio=None if dense else recipe.compression.ratio,
        accuracy_before=before.accuracy,
        accuracy_untrained=None if untrained is None else untrained.accuracy,
        accuracy=after.accuracy,
        loss=after.loss,
        parameters_before=plan.dense_parameters,
        parameters=sum(parameter.numel() for parameter in final.parameters()),
        macs_before=plan.dense_macs,
        macs=plan.macs,
        bytes=weights.stat().st_size,
        steps=training.steps,
        seconds=main.seconds,
        output_difference=None if twist is None else twist.output_difference,
        latency=latency,
        latency_batch=None if latency is None else latency_batch,
        refined=tuple(refined),
        recipe=recipe.to_dict(),
        processes=fabric.world_size,
        machine=describe_machine(),
        version=__version__,
        top5=after.top5,
        top5_before=before.top5,
    )
    if fabric.is_global_zero:
        summary.write(folder)
    main.close()
    return summary


def _launched(recipe: Recipe) -> Fabric:
    """Fabric, with one process or with all those that ``torchrun`` started."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Fabric tells of its precision, through whichever of the two was imported last.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator="auto",
        devices=here,
        num_nodes=processes // here,
        strategy="ddp" if processes > 1 else "auto",
        precision=recipe.precision,
    )
    fabric.launch()
    return fabric


def _fixed(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with a plan's layers decomposed, and not to be trained."""
    fixed = decompose(model, plan)
    for layer in plan.compressed:
        fixed.get_submodule(layer.name).requires_grad_(False)
    return fixed


def _hold_out(data: Dataset, count: int) -> tuple[Dataset, Split | None]:
    if count == 0:
        return data, None
    images, labels = data.train.images, data.train.labels
    if count >= len(labels):
        raise DeepTwistError(f"data.validation={count} leaves nothing of {len(labels)} images")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-count].sort().values, order[-count:]
    rest = Split(images[train], labels[train])
    return replace(data, train=rest), Split(images[held_out], labels[held_out])


def _twist(job: Job) -> DeepTwist:
    recipe, data = job.recipe, job.data
    example = as_input(data.test.images[:8], job.model, data)
    interval = {"projection": 1, "once": job.steps + 1}.get(recipe.mode, recipe.interval)
    attach = partial(RandomNoise, seed=recipe.seed) if recipe.mode == "noise" else DeepTwist
    return attach(job.model, job.plan, interval, tolerance=recipe.tolerance, example_input=example)


def _variants(
    job: Job, training: Training, average: AveragedModel | None, final: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """The networks that come of a training besides its last one, in their deployed form."""

    def deployed(model: nn.Module) -> nn.Module:
        return decompose(model, job.plan) if training.distorts else model

    if job.recipe.recalibration:
        size = job.recipe.batch_size
        yield "recalibrated", recalibrated(final, job.data, job.recipe.recalibration, size)
    if average is not None:
        yield "moving average", deployed(average.module)
    if training.best is not None:
        yield "best on validation", deployed(training.best_model())


def _refined(fabric: Fabric, job: Job, folder: Path, name: str, network: nn.Module) -> Refined:
    found = evaluate(network, job.data.test.images, job.data.test.labels, job.data)
    path = folder / _file(job.recipe.mode == "dense", "-" + name.replace(" ", "-"))
    _write(fabric, network, path, job.recipe.model)
    return Refined(name, found.accuracy, found.loss, path.name)


def _latency(job: Job, final: nn.Module, batch: int | None) -> Comparison | None:
    if batch is None:
        return None
    return compare(job.model, final, as_input(job.data.test.images[:batch], final, job.data))


def _file(dense: bool, suffix: str) -> str:
    name = Path(records.DENSE_WEIGHTS if dense else records.ARTEFACT)
    return f"{name.stem}{suffix}{name.suffix}"


def _write(fabric: Fabric, model: nn.Module, path: Path, model_name: str) -> Path:
    """Writes a network, its weights alone where it is dense; returns the path of the weights."""
    if path.suffix:
        if fabric.is_global_zero:
            # Copies: safetensors refuses tensors that share memory, as shared modules' do.
            state = {
                name: tensor.cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in model.state_dict().items()
            }
            with atomic_write(path) as temporary:
                save_file(state, temporary)
    elif fabric.is_global_zero:
        save(model, path, base_model=model_name)
    fabric.barrier()
    return path if path.suffix else path / WEIGHTS
