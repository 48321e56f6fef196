"""The training loop, on Lightning Fabric: devices, precision and processes are its, the loop ours.

Fabric rather than the Trainer, so that the loop stays readable and DeepTwist is one call in it.
What is random in a step is drawn from the seed and the step's own number, so that a training that
was cut goes on with the same numbers.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from deeptwist.data import Dataset, Split, augment
from deeptwist.errors import DeepTwistError
from deeptwist.training.evaluation import Probe, as_input, evaluate, logits_of
from deeptwist.training.recipe import Recipe, ScheduleRecipe
from deeptwist.training.records import DistortedAt, Epoch, Record
from deeptwist.twist.distortion import DeepTwist

T = TypeVar("T")

_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Hooks:
    """What is told of a training as it goes on.

    Attributes:
        on_record: called with every epoch's and every distortion's record.
        on_step: called after every optimizer step.
        on_checkpoint: called when a checkpoint is due, and at the end.
    """

    on_record: Callable[[Record], None] = lambda record: None
    on_step: Callable[[], None] = lambda: None
    on_checkpoint: Callable[[], None] = lambda: None


class Training:
    """A network in training with all that a step changes: it can be cut anywhere and continued.

    Attributes:
        step: optimizer steps so far.
        steps: optimizer steps in all.
        best: the best accuracy on the validation split so far, and the weights that had it; none
            without a validation split.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        data: Dataset,
        recipe: Recipe,
        schedule: ScheduleRecipe,
        lr: float,
        *,
        twist: DeepTwist | None = None,
        teacher: nn.Module | None = None,
        average: AveragedModel | None = None,
        validation: Split | None = None,
    ):
        """Sets a network up for training.

        Args:
            fabric: launched; the network ends on its device.
            model: changed in place.
            data: trained on `schedule.epochs` times, evaluated on after each.
            recipe: all but its schedule and learning rate.
            schedule: see `ScheduleRecipe`.
            lr: the learning rate that the schedule starts from.
            twist: attached to `model`, to distort its weights on the way.
            teacher: whose logits are learnt from, if the recipe has a distillation.
            average: of `model`'s weights, kept up to date.
            validation: on which the best weights are chosen, after each distortion; after each
                epoch where there are none.

        Raises:
            DeepTwistError: if the training split does not fill one batch, or a batch cannot be
                shared evenly among the processes.
        """
        self._fabric, self._model, self._data, self._recipe = fabric, model, data, recipe
        self._schedule, self._twist, self._teacher = schedule, twist, teacher
        self._average, self._validation = average, validation
        self._per_epoch = steps_per_epoch(data, recipe.batch_size)
        if recipe.batch_size % fabric.world_size:
            raise DeepTwistError(
                f"batch_size {recipe.batch_size} cannot be shared by {fabric.world_size} processes"
            )
        self.step = 0
        self.steps = schedule.epochs * self._per_epoch
        self.best: tuple[float, dict[str, Tensor]] | None = None
        model.to(memory_format=torch.channels_last)  # what convolutions run fastest in
        options = recipe.optimizer
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov and options.momentum > 0,
        )
        self._wrapped, self._optimizer = fabric.setup(model, optimizer)
        self._rate = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._share_of_lr)
        for other in (teacher, average):
            if other is not None:
                other.to(fabric.device)
        self._epoch_loss = torch.zeros((), device=fabric.device)  # sum over its steps so far
        self._epoch_seconds = 0.0
        torch.manual_seed(recipe.seed)  # dropout

    def fit(self, hooks: Hooks) -> None:
        """Trains to the end, from wherever it stands.

        Raises:
            DeepTwistError: if the loss is not finite, naming the step.
        """
        every = self._recipe.records.checkpoint_every
        self._model.train()
        while self.step < self.steps:
            started = time.perf_counter()
            for images, labels in self._rest_of_epoch():
                self._epoch_loss += self._optimize(images, labels)
                self._epoch_seconds += time.perf_counter() - started
                self._distort(hooks)
                if self.step % self._per_epoch == 0:
                    self._end_epoch(hooks)
                if self.step % every == 0 or self.step == self.steps:
                    self._share_buffers()
                    hooks.on_checkpoint()
                hooks.on_step()
                started = time.perf_counter()

    @property
    def distorts(self) -> bool:
        """Whether weights are distorted on the way."""
        return self._twist is not None

    def best_model(self) -> nn.Module:
        """A copy of the network with its best weights; with the last ones if none are known."""
        model = copy.deepcopy(self._model)
        if self.best is not None:
            model.load_state_dict(self.best[1])
        return model

    def finish(self, hooks: Hooks) -> nn.Module:
        """The network to deploy: after a last distortion, where there are any, decomposed."""
        twist = self._twist
        if twist is None:
            return self._model
        small, record = self._distorted(twist, twist.finish)
        assert record is not None
        hooks.on_record(record)
        return small

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on bit for bit, in plain containers and tensors."""
        states = {"twist": self._twist, "average": self._average}
        return {
            "step": self.step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rate": self._rate.state_dict(),
            "best": self.best,
            "epoch_loss": self._epoch_loss,
            "epoch_seconds": self._epoch_seconds,
            "random": torch.get_rng_state(),
            **{name: None if one is None else one.state_dict() for name, one in states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            AttributeError, LookupError, RuntimeError, TypeError, ValueError: if the state is not
                one of this training's.
        """
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["rate"])
        for name, one in (("twist", self._twist), ("average", self._average)):
            if one is not None:
                one.load_state_dict(state[name])
        self._epoch_loss.copy_(state["epoch_loss"])
        self._epoch_seconds = float(state["epoch_seconds"])
        self.best = state["best"]
        self.step = int(state["step"])
        torch.set_rng_state(state["random"])

    def _optimize(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step; returns the loss over all processes' images."""
        loss = self._loss(images, labels)
        whole = loss.detach()
        if self._fabric.world_size > 1:
            whole = cast(Tensor, self._fabric.all_reduce(whole.clone(), reduce_op="mean"))
        if not whole.isfinite():
            raise DeepTwistError(
                f"the loss is {whole.item()} at step {self.step + 1}: "
                f"lower optimizer.lr={self._recipe.optimizer.lr}"
            )
        self._fabric.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._rate.step()
        if self._average is not None:
            self._average.update_parameters(self._model)
        self.step += 1
        return whole

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        images = augment(
            images.to(self._fabric.device),
            padding=self._data.padding,
            flip=self._data.flip,
            generator=_generator(self._recipe.seed, _AUGMENTATION, self.step),
            share=(self._fabric.global_rank, self._fabric.world_size),
        )
        x = as_input(images, self._model, self._data)
        logits = logits_of(self._wrapped(x))
        loss = functional.cross_entropy(
            logits, labels.to(x.device), label_smoothing=self._recipe.label_smoothing
        )
        distillation = self._recipe.distillation
        if self._teacher is None or distillation is None:
            return loss
        with torch.no_grad(), self._fabric.autocast():
            taught = logits_of(self._teacher.eval()(x))
        from_teacher = _divergence(logits, taught, distillation.temperature)
        return (1 - distillation.weight) * loss + distillation.weight * from_teacher

    def _rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of every batch that the epoch still holds."""
        epoch, done = divmod(self.step, self._per_epoch)
        split, size = self._data.train, self._recipe.batch_size
        generator = _generator(self._recipe.seed, _ORDER, epoch)
        order = torch.randperm(len(split.labels), generator=generator)
        for batch in order[done * size : self._per_epoch * size].split(size):
            rows = batch[self._fabric.global_rank :: self._fabric.world_size]
            rows = rows.to(split.images.device)
            yield split.images[rows], split.labels[rows]

    def _distort(self, hooks: Hooks) -> None:
        if self._twist is None:
            return
        _, record = self._distorted(self._twist, self._twist.step)
        if record is not None:
            hooks.on_record(record)
            self._keep_best()

    def _distorted(
        self, twist: DeepTwist, distort: Callable[[Callable[[], float] | None], T]
    ) -> tuple[T, DistortedAt | None]:
        """What `distort` returns, and the record of the distortion if it was one."""
        probe = Probe(self._wrapped, self._data, self._recipe.records.images)

        def loss() -> float:
            self._share_buffers()
            return probe.loss()

        count, started = len(twist.records), time.perf_counter()
        result = distort(loss if self._recipe.records.images else None)
        seconds = time.perf_counter() - started - probe.seconds
        if len(twist.records) == count:
            return result, None
        lr = float(self._rate.get_last_lr()[0])
        train, test = tuple(probe.train), tuple(probe.test)
        return result, DistortedAt(twist.records[-1], lr, seconds, train, test)

    def _end_epoch(self, hooks: Hooks) -> None:
        self._share_buffers()
        if self._twist is None:
            self._keep_best()
        images = self._per_epoch * self._recipe.batch_size
        hooks.on_record(
            Epoch(
                epoch=self.step // self._per_epoch,
                step=self.step,
                train_loss=float(self._epoch_loss) / self._per_epoch,
                test=evaluate(
                    self._wrapped, self._data.test.images, self._data.test.labels, self._data
                ),
                lr=float(self._rate.get_last_lr()[0]),
                seconds=self._epoch_seconds,
                images_per_second=images / self._epoch_seconds,
            )
        )
        self._epoch_loss.zero_()
        self._epoch_seconds = 0.0

    def _keep_best(self) -> None:
        if self._validation is None:
            return
        held_out = self._validation.images, self._validation.labels
        accuracy = evaluate(self._wrapped, *held_out, self._data).accuracy
        if self.best is None or accuracy > self.best[0]:
            weights = {n: t.detach().clone() for n, t in self._model.state_dict().items()}
            self.best = accuracy, weights

    def _share_buffers(self) -> None:
        """Gives every process the first one's batch-norm statistics, as the next step would."""
        if self._fabric.world_size > 1:
            for buffer in self._model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _share_of_lr(self, step: int) -> float:
        if self._schedule.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / self.steps))
        passed = sum(step >= epoch * self._per_epoch for epoch in self._schedule.milestones)
        return self._schedule.factor**passed


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """Optimizer steps in an epoch; an incomplete last batch is left out.

    Raises:
        DeepTwistError: if the training split does not fill one batch.
    """
    steps = len(data.train.labels) // batch_size
    if steps == 0:
        raise DeepTwistError(
            f"batch_size {batch_size} is more than the {len(data.train.labels)} "
            f"training images of {data.name}"
        )
    return steps


def _divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of the softened outputs (Hinton et al., 2015, section 2)."""
    own, teachers = (functional.log_softmax(x / temperature, dim=1) for x in (logits, taught))
    return temperature**2 * functional.kl_div(own, teachers, reduction="batchmean", log_target=True)


def _generator(*numbers: int) -> torch.Generator:
    """Random numbers of a seed, a stream and a place in it."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) - 2**63)
