"""A whole run: train as a recipe says, evaluate what is deployed, keep it with its records."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from deeptwist._version import __version__
from deeptwist.app.data import ImageData
from deeptwist.app.folders import DENSE_WEIGHTS, PLAN, SMALL, SUMMARY, check_same_recipe, read_run
from deeptwist.app.training.devices import images_on, make_fabric, own_device
from deeptwist.app.training.evaluation import Evaluation, evaluate, test_inputs, training_inputs
from deeptwist.app.training.loop import OnRecord, Trainer, steps_per_epoch
from deeptwist.app.training.recipe import Recipe, ScheduleRecipe
from deeptwist.app.training.run_dir import RunDir, lock_run_dir
from deeptwist.compress import Progress, Values, no_progress
from deeptwist.decompose import decompose, recalibrate_batch_norm
from deeptwist.errors import DeepTwistError, explaining
from deeptwist.files import atomic_write
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import Setting
from deeptwist.measure.timing import time_models
from deeptwist.networks.weights import build_trained
from deeptwist.plan.calibration import Calibration, calibrate
from deeptwist.plan.plan import Plan
from deeptwist.plan.planner import plan_from_model
from deeptwist.save import WEIGHTS, save
from deeptwist.twist import Perturb

_TAIL = "tail"


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A recipe with the network, the plan and the images that it is run on.

    Attributes:
        recipe: see `Recipe`.
        model: with the weights that training starts from, in fp64 where the recipe says so;
            layers that it freezes are decomposed already, but in a dense run.
        plan: of the model.
        data: with the images apart that the recipe holds out.
        name: of the run, as tables call it.
        start: the model decomposed by the plan, which finetune mode then trains, in place, instead
            of decomposing anew; other modes leave it alone.
        teacher: to distil from, where it is another network than the model.
        calibration: of the model, where the recipe asks for one.
        before: what the model's evaluation gave, where that is known.
        perturb: for ablations, see `DeepTwist`.
    """

    recipe: Recipe
    model: nn.Module
    plan: Plan
    data: ImageData
    name: str
    start: nn.Module | None = None
    teacher: nn.Module | None = None
    calibration: Calibration | None = None
    before: Evaluation | None = None
    perturb: Perturb | None = None

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps, those of fine-tuning after it included."""
        after = self.recipe.finetune_after
        epochs = self.recipe.schedule.epochs + (0 if after is None else after.epochs)
        return epochs * steps_per_epoch(self.data, self.recipe.batch_size)


def build_run(
    recipe: Recipe,
    data: ImageData,
    *,
    name: str,
    model: nn.Module | None = None,
    progress: Progress = no_progress,
) -> TrainingRun:
    """Build and plan a recipe's network.

    Args:
        recipe: see `Recipe`.
        data: see `deeptwist.app.data.load_data`.
        name: of the run.
        model: a network in place of the recipe's own; most modes change it in place.
        progress: shows a calibration, see `deeptwist.compress.Job`.

    Raises:
        DeepTwistError: if there is no such network, its weights do not fit, it cannot be planned
            so, more images are held out than there are, or what is left to train on does not fill
            one batch.
    """
    data = _hold_out(data, recipe.data.validation)
    if recipe.schedule.epochs and not steps_per_epoch(data, recipe.batch_size):
        raise DeepTwistError(
            f"batch_size {recipe.batch_size} is more than the {len(data.train.labels)} training "
            f"images of {data.name}: give a smaller one"
        )
    if model is None:
        torch.manual_seed(recipe.seed)
        model = build_trained(recipe.model, recipe.weights, new_head=True, **data.sizes)
    if recipe.precision == "64-true":  # Fabric would do so later: copies made until then, not
        model.double()
    example = torch.zeros(2, *data.shape).to(next(model.parameters()))
    if recipe.frozen_compression is not None and recipe.compresses:
        frozen = recipe.frozen_compression.make_plan(model, example)
        model = decompose(model, frozen)
        for layer in frozen.compressed:
            model.get_submodule(layer.name).requires_grad_(False)
    calibration = None
    if recipe.compresses:
        if recipe.calibration_images:
            calibration = _calibrate(model, data, recipe.calibration_images, progress)
        plan = recipe.compression.make_plan(model, example, calibration=calibration)
    else:  # a plan that says what the network costs
        plan = plan_from_model(model, model, example)
    teacher = _build_teacher(recipe, data)
    return TrainingRun(recipe, model, plan, data, name, teacher=teacher, calibration=calibration)


def train(
    run: TrainingRun,
    folder: Path,
    *,
    resume: bool = False,
    latency_batch: int | None = 16,
    on_record: OnRecord = lambda values: None,
    on_step: Callable[[], object] = lambda: None,
    progress: Progress = no_progress,
) -> Values:
    """Train, evaluate what would be deployed, and write the run's folder.

    Under ``torchrun``, all processes train together; the first one writes.

    Args:
        run: its model is changed in place, where the mode does not decompose it first.
        folder: where the run is written.
        resume: go on from the last checkpoint in the folder, if there is one; a finished run is
            read.
        latency_batch: images in the batch that latency is measured on; `None` to leave it out.
        on_record: called with every epoch's and every distortion's record, see `folders`.
        on_step: called after every optimizer step, those before the checkpoint included.
        progress: shows evaluations, see `deeptwist.compress.Job`.

    Returns:
        The run's summary, see `folders`.

    Raises:
        DeepTwistError: if the folder holds a run and `resume` is not given, or one of another
            recipe; if another live process is using it; or if training fails.
    """
    if resume and (folder / SUMMARY).exists():
        check_same_recipe(folder, run.recipe, resume=True)
        return read_run(folder).summary
    fabric = make_fabric(run.recipe)
    with lock_run_dir(folder, run.recipe, fabric, resume=resume):
        return _train(run, RunDir(folder, fabric, on_record, on_step), latency_batch, progress)


def _train(
    run: TrainingRun, run_dir: RunDir, latency_batch: int | None, progress: Progress
) -> Values:
    fabric, recipe, model = run_dir.fabric, run.recipe, run.model.to(run_dir.fabric.device)
    run = replace(run, data=images_on(fabric.device, run.data))
    data, untrained = run.data, None
    before = run.before or evaluate(model, data.test, data)
    if recipe.distillation is not None and run.teacher is None:
        run = replace(run, teacher=copy.deepcopy(model))
    network = model
    if recipe.mode == "finetune" and run.start is not None:
        network = run.start.to(fabric.device)
    elif recipe.mode == "finetune":
        network = decompose(model, run.plan, calibration=run.calibration)
    if recipe.compresses:
        untrained = evaluate(_deployed(run, network), data.test, data, progress=progress)
        run_dir.write(PLAN, run.plan.to_json())
    trainer = Trainer(
        fabric,
        network,
        data,
        recipe,
        plan=run.plan if recipe.distorts else None,
        perturb=run.perturb,
        teacher=run.teacher,
        on_record=run_dir.record,
    )
    finished, twist = run_dir.train(trainer), trainer.twist
    if twist is not None and twist.plan != run.plan:  # frozen layers are kept
        run = replace(run, plan=twist.plan)
        run_dir.write(PLAN, run.plan.to_json())
    final = _recalibrated(run, finished)
    after = untrained if trainer.steps == 0 and final is finished else None
    after = after or evaluate(final, data.test, data, progress=progress)
    path = _write_network(run, run_dir, final)
    derived = _derived_networks(run, run_dir, trainer, finished, final)
    variants = [_write_variant(run, run_dir, name, network) for name, network in derived]
    latency = None
    if latency_batch is not None and recipe.compresses:
        setting = Setting(latency_batch, torch.get_num_threads())
        inputs = test_inputs(data, final, latency_batch)
        latency = asdict(time_models(model, final, inputs, setting))
    summary: Values = {
        **_describe(run),
        "accuracy_before": before.accuracy,
        "top5_before": before.top5,
        "accuracy_untrained": None if untrained is None else untrained.accuracy,
        **asdict(after),
        "parameters": sum(parameter.numel() for parameter in final.parameters()),
        "bytes": (path / WEIGHTS if recipe.compresses else path).stat().st_size,
        "output_difference": None if twist is None else twist.output_difference,
        "latency": latency,
        "latency_batch": None if latency is None else latency_batch,
        "variants": variants,
        "steps": trainer.steps,
        "seconds": run_dir.seconds,
        "processes": fabric.world_size,
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    run_dir.write(SUMMARY, text)  # last of all: it marks the run as finished
    run_dir.close()
    return dict(json.loads(text))


def _describe(run: TrainingRun) -> Values:
    """Return what a run's summary says of it before anything is trained."""
    recipe, plan = run.recipe, run.plan
    return {
        "name": run.name,
        "mode": recipe.mode,
        "model": recipe.model,
        "data": run.data.name,
        "decomposition": recipe.compression.label if recipe.compresses else None,
        "ratio": recipe.compression.ratio if recipe.compresses else None,
        "parameters_before": plan.dense_parameters,
        "macs_before": plan.dense_macs,
        "macs": plan.macs,
        "recipe": recipe.to_dict(),
        "machine": describe_machine(),
        "version": __version__,
    }


def _build_teacher(recipe: Recipe, data: ImageData) -> nn.Module | None:
    """Return a teacher of its own; check that it takes the images and knows as many classes."""
    distillation = recipe.distillation
    if distillation is None or distillation.model is None:
        return None
    with explaining(f"teacher {distillation.model}", errors=(DeepTwistError,)):
        teacher = build_trained(distillation.model, distillation.weights, **data.sizes)
        if recipe.precision == "64-true":
            teacher.double()
        evaluate(teacher, data.test.subsample(8), data)
    return teacher


def _calibrate(model: nn.Module, data: ImageData, count: int, progress: Progress) -> Calibration:
    """Return the calibration on so many training images of a shuffle that is always the same."""
    device = next(model.parameters()).device
    model.to(own_device())  # on a GPU it takes seconds, not minutes
    calibration = calibrate(model, training_inputs(data, model, count, progress=progress))
    model.to(device)
    moments = calibration.moments.items()
    return Calibration({name: replace(m, values=m.values.to(device)) for name, m in moments})


def _hold_out(data: ImageData, count: int) -> ImageData:
    """Return the data with the last so many training images of a fixed shuffle held out."""
    if count == 0:
        return data
    total = len(data.train.labels)
    if count >= total:
        raise DeepTwistError(f"data.validation={count} leaves nothing of {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-count].sort().values, order[-count:]
    return replace(data, train=data.train.subset(train), validation=data.train.subset(held_out))


def _deployed(run: TrainingRun, network: nn.Module) -> nn.Module:
    """Return a trained network in the form that is deployed."""
    return decompose(network, run.plan) if run.recipe.distorts else network


def _recalibrated(run: TrainingRun, network: nn.Module) -> nn.Module:
    """Return a deployed network with batch norm's statistics taken anew, if the recipe asks."""
    count, size = run.recipe.batch_norm_batches, run.recipe.batch_size
    if not count:
        return network
    return recalibrate_batch_norm(network, training_inputs(run.data, network, count * size, size))


def _derived_networks(
    run: TrainingRun, run_dir: RunDir, trainer: Trainer, finished: nn.Module, final: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks that a run gives besides the one to use, in their deployed form."""
    if run.recipe.batch_norm_batches:
        yield "not recalibrated", finished
    if trainer.average is not None:
        yield "moving average", _recalibrated(run, _deployed(run, trainer.average.module))
    if trainer.best is not None:
        yield "best on validation", _recalibrated(run, _deployed(run, trainer.best_model()))
    tail = run.recipe.finetune_after
    if tail is not None:  # in the decomposed form, with a cosine decay of its own
        schedule, optimizer = ScheduleRecipe(epochs=tail.epochs), run.recipe.optimizer
        recipe = replace(
            run.recipe, schedule=schedule, optimizer=replace(optimizer, lr=tail.lr), ema=None
        )
        below, data = run_dir.below(_TAIL), replace(run.data, validation=None)
        trainer = Trainer(
            run_dir.fabric,
            copy.deepcopy(final),
            data,
            recipe,
            teacher=run.teacher,
            on_record=below.record,
        )
        yield _TAIL, _recalibrated(run, below.train(trainer))
        below.close()


def _write_variant(run: TrainingRun, run_dir: RunDir, name: str, network: nn.Module) -> Values:
    """Write a network that is derived from the run's; return what the summary says of it."""
    result = evaluate(network, run.data.test, run.data)
    path = _write_network(run, run_dir, network, "-" + name.replace(" ", "-"))
    return {"name": name, "accuracy": result.accuracy, "loss": result.loss, "path": path.name}


def _write_network(run: TrainingRun, run_dir: RunDir, network: nn.Module, suffix: str = "") -> Path:
    """Write a network, its weights alone where it is dense; return the folder or the file."""
    name = Path(SMALL if run.recipe.compresses else DENSE_WEIGHTS)
    path = run_dir.path / f"{name.stem}{suffix}{name.suffix}"
    if run_dir.fabric.is_global_zero and run.recipe.compresses:
        save(network, path, base_model=run.recipe.model, metadata=run.data.metadata)
    elif run_dir.fabric.is_global_zero:
        # Copies: safetensors refuses tensors that share memory, as shared modules' do.
        state = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in network.state_dict().items()
        }
        with atomic_write(path) as temporary:
            save_file(state, temporary)
    run_dir.fabric.barrier()
    return path
