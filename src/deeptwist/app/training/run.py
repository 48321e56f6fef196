"""A whole run: train as a recipe says, evaluate what is deployed, keep it with its records."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from deeptwist._version import __version__
from deeptwist.app.data import ImageData, Split
from deeptwist.app.models import build_model, load_weights
from deeptwist.app.training.devices import images_on, make_fabric
from deeptwist.app.training.evaluation import evaluate, test_inputs, training_inputs
from deeptwist.app.training.fabric import Fabric
from deeptwist.app.training.loop import Trainer, steps_per_epoch
from deeptwist.app.training.metrics import (
    ARTEFACT,
    DENSE_WEIGHTS,
    PLAN,
    SUMMARY,
    Evaluation,
    Record,
    Summary,
    Variant,
    read_run,
)
from deeptwist.app.training.optimizers import make_optimizer
from deeptwist.app.training.post_training import recalibrate_batch_norm
from deeptwist.app.training.recipe import Recipe, ScheduleRecipe
from deeptwist.app.training.run_dir import RunDir, check_same_recipe, lock_run_dir
from deeptwist.decompose import decompose
from deeptwist.errors import DeepTwistError
from deeptwist.files import atomic_write, write_text
from deeptwist.measure.compare import Comparison, time_models
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import Setting
from deeptwist.plan.calibration import Calibration, calibrate
from deeptwist.plan.from_model import plan_from_model
from deeptwist.plan.plan import Plan
from deeptwist.save import WEIGHTS, save
from deeptwist.twist.distortion import DeepTwist

_TAIL = "tail"


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A recipe with the network, the plan and the images that it is run on.

    Attributes:
        recipe: see `Recipe`.
        model: with the weights that training starts from, in fp64 where the recipe says so;
            layers that it fixes are decomposed already, but in a dense run.
        plan: of the model.
        data: without the images that the recipe holds out.
        validation: those images; `None` where it holds out none.
        name: of the run, as tables call it.
        teacher: to distil from, where it is another network than the model.
        calibration: of the model, where the recipe asks for one.
        before: what the model's evaluation gave, where that is known.
    """

    recipe: Recipe
    model: nn.Module
    plan: Plan
    data: ImageData
    validation: Split | None
    name: str
    teacher: nn.Module | None = None
    calibration: Calibration | None = None
    before: Evaluation | None = None

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps, those of the tail included."""
        tail = 0 if self.recipe.tail is None else self.recipe.tail.epochs
        epochs = self.recipe.schedule.epochs + tail
        return epochs * steps_per_epoch(self.data, self.recipe.batch_size)


def build_run(
    recipe: Recipe, data: ImageData, *, name: str, model: nn.Module | None = None
) -> TrainingRun:
    """Build and plan a recipe's network.

    Args:
        recipe: see `Recipe`.
        data: see `deeptwist.app.data.load_data`.
        name: of the run.
        model: a network in place of the recipe's own; most modes change it in place.

    Raises:
        DeepTwistError: if there is no such network, its weights do not fit, it cannot be planned
            so, or more images are held out than there are.
    """
    if model is None:
        torch.manual_seed(recipe.seed)
        model = _build_for(data, recipe.model, recipe.weights)
    if recipe.precision == "64-true":  # Fabric would do so later: copies made until then, not
        model.double()
    example = torch.zeros(2, *data.shape).to(next(model.parameters()))
    compresses = recipe.training_mode.compresses
    if recipe.fixed is not None and compresses:
        model = _decompose_and_freeze(model, recipe.fixed.make_plan(model, example))
    data, validation = _hold_out(data, recipe.data.validation)
    calibration = None
    if compresses:
        if recipe.calibration_images:
            calibration = _calibrate(model, data, recipe.calibration_images)
        plan = recipe.compression.make_plan(model, example, calibration=calibration)
    else:  # a plan that says what the network costs
        plan = plan_from_model(model, model, example)
    teacher = _build_teacher(recipe, data)
    return TrainingRun(recipe, model, plan, data, validation, name, teacher, calibration)


def train(
    run: TrainingRun,
    folder: Path,
    *,
    resume: bool = False,
    latency_batch: int | None = 16,
    on_record: Callable[[Record], None] = lambda record: None,
    on_step: Callable[[], None] = lambda: None,
) -> Summary:
    """Train, evaluate what would be deployed, and write the run's folder.

    Under ``torchrun``, all processes train together; the first one writes.

    Args:
        run: its model is changed in place, where the mode does not decompose it first.
        folder: where the run is written.
        resume: go on from the last checkpoint in the folder, if there is one; a finished run is
            read.
        latency_batch: images in the batch that latency is measured on; `None` to leave it out.
        on_record: called with every epoch's and every distortion's record.
        on_step: called after every optimizer step, those before the checkpoint included.

    Raises:
        DeepTwistError: if the folder holds a run and `resume` is not given, or one of another
            recipe; if another live process is using it; or if training fails.
    """
    if resume and (folder / SUMMARY).exists():
        check_same_recipe(folder, run.recipe, resume=True)
        return read_run(folder).summary
    fabric = make_fabric(run.recipe)
    with lock_run_dir(folder, run.recipe, fabric, resume=resume):
        return _train(fabric, run, folder, latency_batch, on_record, on_step)


def _train(
    fabric: Fabric,
    run: TrainingRun,
    folder: Path,
    latency_batch: int | None,
    on_record: Callable[[Record], None],
    on_step: Callable[[], None],
) -> Summary:
    images, validation = images_on(fabric.device, run.data, run.validation)
    run = replace(run, data=images, validation=validation)
    recipe, plan, data, mode = run.recipe, run.plan, run.data, run.recipe.training_mode
    model = run.model.to(fabric.device)
    before = run.before or evaluate(model, data.test, data)
    teacher = run.teacher
    if recipe.distillation is not None and teacher is None:
        teacher = copy.deepcopy(model)
    network = mode.trained_network(model, plan, run.calibration)
    untrained = None
    if mode.compresses:
        untrained = evaluate(mode.deploy(network, plan), data.test, data)
        _write_plan(fabric, folder, plan)
    trainer, twist = _make_trainer(fabric, run, network, teacher)
    run_dir = RunDir(folder, fabric)
    callbacks = run_dir.train(trainer, on_record, on_step)
    finished = trainer.finish(callbacks)
    if twist is not None and twist.plan != plan:  # frozen layers are kept
        run = replace(run, plan=twist.plan)
        _write_plan(fabric, folder, run.plan)
    final = _recalibrated(run, finished)
    after = evaluate(final, data.test, data)
    weights = _write_network(fabric, final, folder / _file(run, ""), recipe.model)

    variants = [
        _write_variant(fabric, run, folder, name, variant)
        for name, variant in _post_training_variants(run, trainer, finished)
    ]
    if recipe.tail is not None:
        tail, tuned = RunDir(folder / _TAIL, fabric), copy.deepcopy(final)
        tail.train(_tail_trainer(fabric, run, tuned, teacher), on_record, on_step)
        variants.append(_write_variant(fabric, run, folder, _TAIL, _recalibrated(run, tuned)))
        tail.close()
    summary = _summarize(
        run,
        before=before,
        untrained=untrained,
        after=after,
        final=final,
        twist=twist,
        weights=weights,
        steps=trainer.steps,
        seconds=run_dir.seconds,
        variants=tuple(variants),
        latency=_latency(run, final, latency_batch),
        latency_batch=latency_batch,
        processes=fabric.world_size,
    )
    if fabric.is_global_zero:
        summary.write(folder)
    run_dir.close()
    return summary


def _write_plan(fabric: Fabric, folder: Path, plan: Plan) -> None:
    if fabric.is_global_zero:
        write_text(folder / PLAN, plan.to_json())


def _make_trainer(
    fabric: Fabric, run: TrainingRun, network: nn.Module, teacher: nn.Module | None
) -> tuple[Trainer, DeepTwist | None]:
    """Return the trainer of a run's network, and what distorts it on the way."""
    recipe, data = run.recipe, run.data
    optimizer = make_optimizer(network, recipe.optimizer)  # first: it freezes layers
    steps = recipe.schedule.epochs * steps_per_epoch(data, recipe.batch_size)
    twist = recipe.training_mode.attach(
        network,
        run.plan,
        interval=recipe.interval,
        seed=recipe.seed,
        steps=steps,
        example_input=test_inputs(data, network, 8),
    )
    trainer = Trainer(
        fabric,
        network,
        data,
        recipe,
        optimizer=optimizer,
        twist=twist,
        teacher=teacher,
        validation=run.validation,
    )
    return trainer, twist


def _build_for(data: ImageData, name: str, weights: str | None) -> nn.Module:
    """Return a network for a data set's classes and channels."""
    channels = data.shape[0]
    model = build_model(
        name,
        num_classes=len(data.classes),
        in_channels=None if channels == 3 else channels,  # 3 is what networks take by themselves
    )
    if weights is not None:
        load_weights(model, weights)
    return model


def _build_teacher(recipe: Recipe, data: ImageData) -> nn.Module | None:
    """Return a teacher of its own; check that it takes the images and knows as many classes."""
    distillation = recipe.distillation
    if distillation is None or distillation.model is None:
        return None
    try:
        teacher = _build_for(data, distillation.model, distillation.weights)
        if recipe.precision == "64-true":
            teacher.double()
        evaluate(teacher, data.test.evenly_spaced(8), data)
    except DeepTwistError as error:
        raise DeepTwistError(f"teacher {distillation.model}: {error}") from error
    return teacher


def _decompose_and_freeze(model: nn.Module, plan: Plan) -> nn.Module:
    """Return the model with a plan's layers decomposed, and not to be trained."""
    fixed = decompose(model, plan)
    for layer in plan.compressed:
        fixed.get_submodule(layer.name).requires_grad_(False)
    return fixed


def _calibrate(model: nn.Module, data: ImageData, count: int) -> Calibration:
    """Return the calibration on so many training images of a shuffle that is always the same."""
    device = next(model.parameters()).device
    if torch.cuda.is_available():  # where it takes seconds, not minutes
        model.to("cuda")
    calibration = calibrate(model, training_inputs(data, model, count))
    model.to(device)
    moments = calibration.moments.items()
    return Calibration({name: replace(m, values=m.values.to(device)) for name, m in moments})


def _hold_out(data: ImageData, count: int) -> tuple[ImageData, Split | None]:
    if count == 0:
        return data, None
    total = len(data.train.labels)
    if count >= total:
        raise DeepTwistError(f"data.validation={count} leaves nothing of {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-count].sort().values, order[-count:]
    return replace(data, train=data.train.subset(train)), data.train.subset(held_out)


def _recalibrated(run: TrainingRun, network: nn.Module) -> nn.Module:
    """Return a deployed network with batch norm's statistics taken anew, if the recipe asks."""
    count = run.recipe.recalibration
    if not count:
        return network
    return recalibrate_batch_norm(network, run.data, count, run.recipe.batch_size)


def _post_training_variants(
    run: TrainingRun, trainer: Trainer, finished: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks that a training gives besides the one to use, in their deployed form."""
    mode = run.recipe.training_mode
    if run.recipe.recalibration:
        yield "not recalibrated", finished
    if trainer.average is not None:
        yield "moving average", _recalibrated(run, mode.deploy(trainer.average.module, run.plan))
    if trainer.best is not None:
        yield "best on validation", _recalibrated(run, mode.deploy(trainer.best_model(), run.plan))


def _tail_trainer(
    fabric: Fabric, run: TrainingRun, network: nn.Module, teacher: nn.Module | None
) -> Trainer:
    """Return the trainer of a decomposed network with a cosine decay of its own."""
    tail = run.recipe.tail
    assert tail is not None
    recipe = replace(
        run.recipe,
        schedule=ScheduleRecipe(epochs=tail.epochs),
        optimizer=replace(run.recipe.optimizer, lr=tail.lr),
        ema=None,
    )
    return Trainer(fabric, network, run.data, recipe, teacher=teacher)


def _write_variant(
    fabric: Fabric, run: TrainingRun, folder: Path, name: str, network: nn.Module
) -> Variant:
    evaluation = evaluate(network, run.data.test, run.data)
    path = folder / _file(run, "-" + name.replace(" ", "-"))
    _write_network(fabric, network, path, run.recipe.model)
    return Variant(name, evaluation.accuracy, evaluation.loss, path.name)


def _latency(run: TrainingRun, final: nn.Module, batch: int | None) -> Comparison | None:
    if batch is None or not run.recipe.training_mode.compresses:
        return None
    inputs = test_inputs(run.data, final, batch)
    return time_models(run.model, final, inputs, Setting(batch, torch.get_num_threads()))


def _summarize(
    run: TrainingRun,
    *,
    before: Evaluation,
    untrained: Evaluation | None,
    after: Evaluation,
    final: nn.Module,
    twist: DeepTwist | None,
    weights: Path,
    steps: int,
    seconds: float,
    variants: tuple[Variant, ...],
    latency: Comparison | None,
    latency_batch: int | None,
    processes: int,
) -> Summary:
    recipe, plan = run.recipe, run.plan
    compression = recipe.compression if recipe.training_mode.compresses else None
    return Summary(
        name=run.name,
        mode=recipe.mode,
        model=recipe.model,
        data=run.data.name,
        decomposition=None if compression is None else compression.label,
        ratio=None if compression is None else compression.ratio,
        accuracy_before=before.accuracy,
        accuracy_untrained=None if untrained is None else untrained.accuracy,
        accuracy=after.accuracy,
        loss=after.loss,
        parameters_before=plan.dense_parameters,
        parameters=sum(parameter.numel() for parameter in final.parameters()),
        macs_before=plan.dense_macs,
        macs=plan.macs,
        bytes=weights.stat().st_size,
        steps=steps,
        seconds=seconds,
        output_difference=None if twist is None else twist.output_difference,
        latency=latency,
        latency_batch=None if latency is None else latency_batch,
        variants=variants,
        recipe=recipe.to_dict(),
        processes=processes,
        machine=describe_machine(),
        version=__version__,
        top5=after.top5,
        top5_before=before.top5,
    )


def _file(run: TrainingRun, suffix: str) -> str:
    name = Path(ARTEFACT if run.recipe.training_mode.compresses else DENSE_WEIGHTS)
    return f"{name.stem}{suffix}{name.suffix}"


def _write_network(fabric: Fabric, model: nn.Module, path: Path, model_name: str) -> Path:
    """Write a network, its weights alone where it is dense; return the path of the weights."""
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
