"""Optimizers by name, their parameter groups, and the learning rate's schedules."""

import inspect
import math
from typing import Any

import torch
from torch import nn

from deeptwist.app.training.recipe import OptimizerRecipe, ScheduleRecipe, torch_optimizers
from deeptwist.errors import DeepTwistError, unknown_name_error
from deeptwist.plan.layers import matches
from deeptwist.precondition import precondition


def make_optimizer(model: nn.Module, options: OptimizerRecipe) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters that are trained; the frozen ones are marked.

    Raises:
        DeepTwistError: if a pattern to freeze matches no module, nothing is left to train, or
            factors are to be preconditioned that there are none of, or CP's.
    """
    for module in frozen_modules(model, options):
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DeepTwistError("optimizer.freeze leaves nothing to train: freeze fewer layers")
    optimizer = _make(_parameter_groups(model, decay_all=options.decay_all), options)
    if options.precondition:
        precondition(model, optimizer)
    return optimizer


def _make(groups: list[Any], options: OptimizerRecipe) -> torch.optim.Optimizer:
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
    kind = torch_optimizers()[options.name]
    accepted = inspect.signature(kind).parameters
    nesterov = options.nesterov and options.momentum > 0
    own: dict[str, Any] = {"momentum": options.momentum, "nesterov": nesterov}
    return kind(groups, **values, **{n: v for n, v in own.items() if n in accepted})


def frozen_modules(model: nn.Module, options: OptimizerRecipe) -> list[nn.Module]:
    """Return the modules that are not trained.

    Raises:
        DeepTwistError: if a pattern matches none, naming the nearest.
    """
    modules = dict(model.named_modules())
    for pattern in options.freeze:
        if not any(matches(pattern, name) for name in modules):
            raise unknown_name_error("module", pattern, modules)
    return [m for name, m in modules.items() if any(matches(p, name) for p in options.freeze)]


def lr_factor(schedule: ScheduleRecipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the share of the learning rate that a step has, after `step` of `steps` steps."""
    steps = max(steps, 1)
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
