"""Optimizers by name, their parameter groups, and the learning rate's schedules."""

import inspect
import math
from typing import Any

import torch
from torch import nn

from deeptwist.errors import require_extra, unknown_name_error
from deeptwist.training.recipe import OptimizerRecipe, ScheduleRecipe

_NOT_FOR_ALL = ("Muon", "SparseAdam", "LBFGS")  # take matrices, sparse gradients, closures only
_TORCH = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
    and name not in _NOT_FOR_ALL
}


def check_optimizer(name: str) -> None:
    """Check that an optimizer is known, torch's by its name or timm's as ``timm/NAME``.

    Raises:
        DeepTwistError: if it is not, naming the nearest; if timm is needed and not installed.
    """
    if name.startswith("timm/"):
        with require_extra("timm"):
            from timm.optim import list_optimizers  # type: ignore[attr-defined]
        known = [f"timm/{optimizer}" for optimizer in list_optimizers()]
    else:
        known = [*_TORCH, "timm/NAME"]
    if name not in known or name == "timm/NAME":
        raise unknown_name_error("optimizer", name, known)


def make_optimizer(model: nn.Module, options: OptimizerRecipe) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters that are trained."""
    groups = _parameter_groups(model, decay_all=options.decay_all)
    values: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.betas is not None:
        values["betas"] = options.betas
    if options.name.startswith("timm/"):
        from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

        name = options.name.removeprefix("timm/")
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, name, momentum=options.momentum, **values
        )
        return optimizer
    kind = _TORCH[options.name]
    accepted = inspect.signature(kind).parameters
    own: dict[str, Any] = {
        "momentum": options.momentum,
        "nesterov": options.nesterov and options.momentum > 0,
    }
    return kind(groups, **values, **{n: v for n, v in own.items() if n in accepted})


def lr_factor(schedule: ScheduleRecipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the share of the learning rate that a step has.

    Args:
        schedule: see `ScheduleRecipe`.
        step: optimizer steps before it.
        steps: optimizer steps in all.
        steps_per_epoch: optimizer steps in an epoch.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in schedule.milestones)
        return schedule.factor**passed
    if schedule.kind == "polynomial":
        return float((1 - (step - warmup) / (steps - warmup)) ** schedule.power)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _parameter_groups(model: nn.Module, *, decay_all: bool) -> list[Any]:
    """Return the trained parameters, norms and biases apart where they do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_all:
        return parameters
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    others = [parameter for parameter in parameters if parameter.dim() > 1]
    return [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
