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
from deeptwist.app.data import ImageData, Split
from deeptwist.app.models import build_model, load_weights
from deeptwist.app.training.devices import Fabric, images_on, make_fabric
from deeptwist.app.training.evaluation import (
    Evaluation,
    evaluate,
    recalibrate_batch_norm,
    test_inputs,
    training_inputs,
)
from deeptwist.app.training.loop import OnRecord, Trainer, steps_per_epoch
from deeptwist.app.training.metrics import (
    DENSE_WEIGHTS,
    PLAN,
    SMALL,
    SUMMARY,
    Values,
    read_run,
)
from deeptwist.app.training.optimizers import make_optimizer
from deeptwist.app.training.recipe import Recipe, ScheduleRecipe
from deeptwist.app.training.run_dir import RunDir, check_same_recipe, lock_run_dir
from deeptwist.decompose import decompose
from deeptwist.errors import DeepTwistError
from deeptwist.files import atomic_write, write_text
from deeptwist.measure.compare import time_models
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import Setting
from deeptwist.plan.calibration import Calibration, calibrate
from deeptwist.plan.from_model import plan_from_model
from deeptwist.plan.plan import Plan
from deeptwist.save import WEIGHTS, save
from deeptwist.twist.distortion import DeepTwist, Perturb

_TAIL = "tail"


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A recipe with the network, the plan and the images that it is run on.

    Attributes:
        recipe: see `Recipe`.
        model: with the weights that training starts from, in fp64 where the recipe says so;
            layers that it freezes are decomposed already, but in a dense run.
        plan: of the model.
        data: without the images that the recipe holds out.
        validation: those images; `None` where it holds out none.
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
    validation: Split | None
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
    if recipe.frozen_compression is not None and recipe.compresses:
        frozen = recipe.frozen_compression.make_plan(model, example)
        model = decompose(model, frozen)
        for layer in frozen.compressed:
            model.get_submodule(layer.name).requires_grad_(False)
    data, validation = _hold_out(data, recipe.data.validation)
    calibration = None
    if recipe.compresses:
        if recipe.calibration_images:
            calibration = _calibrate(model, data, recipe.calibration_images)
        plan = recipe.compression.make_plan(model, example, calibration=calibration)
    else:  # a plan that says what the network costs
        plan = plan_from_model(model, model, example)
    teacher = _build_teacher(recipe, data)
    return TrainingRun(
        recipe, model, plan, data, validation, name, teacher=teacher, calibration=calibration
    )


def train(
    run: TrainingRun,
    folder: Path,
    *,
    resume: bool = False,
    latency_batch: int | None = 16,
    on_record: OnRecord = lambda values: None,
    on_step: Callable[[], object] = lambda: None,
) -> Values:
    """Train, evaluate what would be deployed, and write the run's folder.

    Under ``torchrun``, all processes train together; the first one writes.

    Args:
        run: its model is changed in place, where the mode does not decompose it first.
        folder: where the run is written.
        resume: go on from the last checkpoint in the folder, if there is one; a finished run is
            read.
        latency_batch: images in the batch that latency is measured on; `None` to leave it out.
        on_record: called with every epoch's and every distortion's record, see `metrics`.
        on_step: called after every optimizer step, those before the checkpoint included.

    Returns:
        The run's summary, see `metrics`.

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
    on_record: OnRecord,
    on_step: Callable[[], object],
) -> Values:
    images, validation = images_on(fabric.device, run.data, run.validation)
    run = replace(run, data=images, validation=validation)
    recipe, data, model = run.recipe, run.data, run.model.to(fabric.device)
    before, untrained = run.before or evaluate(model, data.test, data), None
    if recipe.distillation is not None and run.teacher is None:
        run = replace(run, teacher=copy.deepcopy(model))
    network = model
    if recipe.mode == "finetune" and run.start is not None:
        network = run.start.to(fabric.device)
    elif recipe.mode == "finetune":
        network = decompose(model, run.plan, calibration=run.calibration)
    if recipe.compresses:
        untrained = evaluate(_deployed(run, network), data.test, data)
        _write_plan(fabric, folder, run.plan)
    twist, trainer = _make_trainer(fabric, run, network)
    run_dir = RunDir(folder, fabric)
    finished = run_dir.train(trainer, on_record, on_step)
    if twist is not None and twist.plan != run.plan:  # frozen layers are kept
        run = replace(run, plan=twist.plan)
        _write_plan(fabric, folder, run.plan)
    final = _recalibrated(run, finished)
    after = evaluate(final, data.test, data)
    weights = _write_network(fabric, run, final, folder)

    networks = dict(_derived_networks(run, trainer, finished))
    if recipe.finetune_after is not None:
        tail = RunDir(folder / _TAIL, fabric)
        tuned = tail.train(_tail_trainer(fabric, run, copy.deepcopy(final)), on_record, on_step)
        networks[_TAIL] = _recalibrated(run, tuned)
        tail.close()
    variants = [_write_variant(fabric, run, folder, name, net) for name, net in networks.items()]
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
        "bytes": weights.stat().st_size,
        "output_difference": None if twist is None else twist.output_difference,
        "latency": latency,
        "latency_batch": None if latency is None else latency_batch,
        "variants": variants,
        "steps": trainer.steps,
        "seconds": run_dir.seconds,
        "processes": fabric.world_size,
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    if fabric.is_global_zero:
        write_text(folder / SUMMARY, text)  # last of all: it marks the run as finished
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


def _make_trainer(
    fabric: Fabric, run: TrainingRun, network: nn.Module
) -> tuple[DeepTwist | None, Trainer]:
    """Return what distorts a run's network on the way, and the trainer of it."""
    recipe, data, twist = run.recipe, run.data, None
    optimizer = make_optimizer(network, recipe.optimizer)  # first: it freezes layers
    if recipe.distorts:
        example, perturb = test_inputs(data, network, 8), run.perturb
        twist = DeepTwist(
            network, run.plan, recipe.interval, example_input=example, perturb=perturb
        )
    return twist, Trainer(
        fabric,
        network,
        data,
        recipe,
        optimizer=optimizer,
        twist=twist,
        teacher=run.teacher,
        validation=run.validation,
    )


def _tail_trainer(fabric: Fabric, run: TrainingRun, network: nn.Module) -> Trainer:
    """Return the trainer of a decomposed network with a cosine decay of its own."""
    tail = run.recipe.finetune_after
    assert tail is not None
    recipe = replace(
        run.recipe,
        schedule=ScheduleRecipe(epochs=tail.epochs),
        optimizer=replace(run.recipe.optimizer, lr=tail.lr),
        ema=None,
    )
    return Trainer(fabric, network, run.data, recipe, teacher=run.teacher)


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
        evaluate(teacher, data.test.subsample(8), data)
    except DeepTwistError as error:
        raise DeepTwistError(f"teacher {distillation.model}: {error}") from error
    return teacher


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
    """Return the data without its last so many training images of a fixed shuffle, and those."""
    if count == 0:
        return data, None
    total = len(data.train.labels)
    if count >= total:
        raise DeepTwistError(f"data.validation={count} leaves nothing of {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-count].sort().values, order[-count:]
    return replace(data, train=data.train.subset(train)), data.train.subset(held_out)


def _deployed(run: TrainingRun, network: nn.Module) -> nn.Module:
    """Return a trained network in the form that is deployed."""
    return decompose(network, run.plan) if run.recipe.distorts else network


def _recalibrated(run: TrainingRun, network: nn.Module) -> nn.Module:
    """Return a deployed network with batch norm's statistics taken anew, if the recipe asks."""
    count = run.recipe.batch_norm_batches
    if not count:
        return network
    return recalibrate_batch_norm(network, run.data, count, run.recipe.batch_size)


def _derived_networks(
    run: TrainingRun, trainer: Trainer, finished: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks that a training gives besides the one to use, in their deployed form."""
    if run.recipe.batch_norm_batches:
        yield "not recalibrated", finished
    if trainer.average is not None:
        yield "moving average", _recalibrated(run, _deployed(run, trainer.average.module))
    if trainer.best is not None:
        yield "best on validation", _recalibrated(run, _deployed(run, trainer.best_model()))


def _write_plan(fabric: Fabric, folder: Path, plan: Plan) -> None:
    if fabric.is_global_zero:
        write_text(folder / PLAN, plan.to_json())


def _write_variant(
    fabric: Fabric, run: TrainingRun, folder: Path, name: str, network: nn.Module
) -> Values:
    """Write a network that is derived from the run's; return what the summary says of it."""
    suffix = "-" + name.replace(" ", "-")
    result = evaluate(network, run.data.test, run.data)
    _write_network(fabric, run, network, folder, suffix)
    path = _path(run, folder, suffix).name
    return {"name": name, "accuracy": result.accuracy, "loss": result.loss, "path": path}


def _path(run: TrainingRun, folder: Path, suffix: str) -> Path:
    """Return where a network is written: a folder, or a file of weights where it is dense."""
    name = Path(SMALL if run.recipe.compresses else DENSE_WEIGHTS)
    return folder / f"{name.stem}{suffix}{name.suffix}"


def _write_network(
    fabric: Fabric, run: TrainingRun, network: nn.Module, folder: Path, suffix: str = ""
) -> Path:
    """Write a network, its weights alone where it is dense; return the path of the weights."""
    path = _path(run, folder, suffix)
    if fabric.is_global_zero and run.recipe.compresses:
        save(network, path, base_model=run.recipe.model)
    elif fabric.is_global_zero:
        # Copies: safetensors refuses tensors that share memory, as shared modules' do.
        state = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in network.state_dict().items()
        }
        with atomic_write(path) as temporary:
            save_file(state, temporary)
    fabric.barrier()
    return path / WEIGHTS if run.recipe.compresses else path
