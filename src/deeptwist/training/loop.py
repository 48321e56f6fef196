"""The training loop, on Lightning Fabric: devices and precision are its, the loop is ours.

Fabric rather than the Trainer, so that the loop stays readable and DeepTwist is one call in it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional

from deeptwist.data import Dataset, augment, batches, normalize
from deeptwist.distortion import DeepTwist, Distortion
from deeptwist.errors import DeepTwistError
from deeptwist.training.evaluation import Evaluation, evaluate
from deeptwist.training.settings import Settings

_FIXED_BATCH = 512  # training images on which ΔL/L is measured, always the same


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training split came to.

    Attributes:
        epoch: from 1.
        step: optimizer steps so far.
        train_loss: mean over the epoch's images, augmented, before each step.
        test: on the test split with the weights as training left them, so in DeepTwist mode
            not on low-rank ones.
        lr: the learning rate at the end.
        seconds: of training alone.
    """

    epoch: int
    step: int
    train_loss: float
    test: Evaluation
    lr: float
    seconds: float


Record = Epoch | Distortion


def fit(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    *,
    twist: DeepTwist | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Trains a model in place.

    Args:
        model: on any device; it ends on Fabric's.
        data: trained on `settings.epochs` times, evaluated after each.
        settings: see `Settings`.
        twist: attached to `model`, to distort its weights on the way.
        on_record: called with every epoch's and every distortion's record.
        on_step: called after every optimizer step.

    Raises:
        DeepTwistError: if the loss is not finite, naming the step.
    """
    fabric = Fabric(accelerator="auto", devices=1, precision=settings.precision)
    model.to(memory_format=torch.channels_last)  # what convolutions run fastest in
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    wrapped, optimizer = fabric.setup(model, optimizer)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)  # dropout
    steps = settings.epochs * steps_per_epoch(data, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    fixed = data.train.images[:_FIXED_BATCH], data.train.labels[:_FIXED_BATCH]

    def loss_on_fixed_batch() -> float:
        return evaluate(wrapped, *fixed, data).loss

    step = 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        started, total = time.perf_counter(), torch.zeros((), device=fabric.device)
        for images, labels in batches(
            data.train, settings.batch_size, generator=generator, drop_last=True
        ):
            images = augment(images, padding=data.padding, flip=data.flip, generator=generator)
            x = normalize(images.to(fabric.device), data.mean, data.std).to(
                memory_format=torch.channels_last
            )
            loss = functional.cross_entropy(wrapped(x), labels.to(fabric.device))
            step += 1
            if not loss.isfinite():
                raise DeepTwistError(
                    f"the loss is {loss.item()} at step {step}: lower lr={settings.lr}"
                )
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach() * len(labels)
            if twist is not None and (distortion := twist.step(loss_on_fixed_batch)) is not None:
                on_record(distortion)
            on_step()
        seconds = time.perf_counter() - started
        on_record(
            Epoch(
                epoch=epoch,
                step=step,
                train_loss=float(total) / (step // epoch * settings.batch_size),
                test=evaluate(wrapped, data.test.images, data.test.labels, data),
                lr=float(schedule.get_last_lr()[0]),
                seconds=seconds,
            )
        )


def steps_per_epoch(data: Dataset, settings: Settings) -> int:
    """Optimizer steps in an epoch; an incomplete last batch is left out.

    Raises:
        DeepTwistError: if the training split does not fill one batch.
    """
    steps = len(data.train.labels) // settings.batch_size
    if steps == 0:
        raise DeepTwistError(
            f"batch_size {settings.batch_size} is more than the {len(data.train.labels)} "
            f"training images of {data.name}"
        )
    return steps
