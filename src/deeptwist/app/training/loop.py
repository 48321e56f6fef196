"""The training loop, on Lightning Fabric, which brings devices, precision and processes.

Fabric rather than Lightning's Trainer, so that the loop stays readable and DeepTwist is one call
in it. What is random in a step is drawn from the seed and the step's own number, so that a
training that was cut goes on with the same numbers.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deeptwist.app.data import ImageData, Split, train_batches
from deeptwist.app.training.devices import Fabric, checkpoint_gradients, step_network
from deeptwist.app.training.evaluation import (
    Evaluation,
    evaluate,
    logits_of,
    preprocess,
    test_inputs,
)
from deeptwist.app.training.optimizers import frozen_modules, lr_factor, make_optimizer
from deeptwist.app.training.recipe import Recipe
from deeptwist.compress import Values
from deeptwist.decompose import to_floats
from deeptwist.distributed import broadcast
from deeptwist.errors import DeepTwistError
from deeptwist.plan.plan import Plan
from deeptwist.twist import DeepTwist, Perturb

T = TypeVar("T")
OnRecord = Callable[[Values], object]  # takes a line of an epoch or a distortion, see `folders`

_LOSSES_AT_ONCE = 50  # steps between looks at the losses, for which an accelerator is waited


class Trainer:
    """A network in training with all that a step changes: it can be cut anywhere and continued.

    Attributes:
        step: optimizer steps so far.
        steps: optimizer steps in all.
        twist: distorts the weights on the way; `None` without a plan.
        average: the moving average of the network's weights, `None` if the recipe has none.
        best: the best accuracy on the validation split so far, and the weights that had it;
            `None` without a validation split.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        *,
        plan: Plan | None = None,
        perturb: Perturb | None = None,
        teacher: nn.Module | None = None,
        on_record: OnRecord = lambda values: None,
    ):
        """Set a network up for training.

        Args:
            fabric: launched; the network ends on its device.
            model: changed in place.
            data: trained on `recipe.schedule.epochs` times, evaluated on after each; the best
                weights are chosen on its validation split, if any, after each distortion, or
                after each epoch where there are none.
            recipe: optimizer, schedule, precision and what else changes a step.
            plan: what the weights are distorted by on the way; not at all without it.
            perturb: see `DeepTwist`.
            teacher: gives the logits that a distillation learns from.
            on_record: called with every epoch's and every distortion's record.

        Raises:
            DeepTwistError: if a batch cannot be shared evenly among the processes, or the model
                does not offer what the recipe asks for.
        """
        self._fabric, self._model, self._data, self._recipe = fabric, model, data, recipe
        self._teacher, self._on_record = teacher, on_record
        options = recipe.optimizer
        if plan is not None:  # a network to distort has no factors yet
            options = replace(options, precondition=False)
        optimizer = make_optimizer(model, options)  # first: it freezes layers
        self.twist: DeepTwist | None = None
        if plan is not None:
            example = test_inputs(data, model, 8)
            self.twist = DeepTwist(
                model, plan, recipe.interval, example_input=example, perturb=perturb
            )
        self._steps_per_epoch = steps_per_epoch(data, recipe.batch_size)
        _check_shares(recipe, fabric.world_size)
        self.step = 0
        self.steps = recipe.schedule.epochs * self._steps_per_epoch
        self.best: tuple[float, dict[str, Tensor]] | None = None
        model.to(memory_format=torch.channels_last)  # what convolutions run fastest in
        if recipe.checkpoint_gradients:
            checkpoint_gradients(model)
        self.average: AveragedModel | None = None
        if recipe.ema is not None:
            ema = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
        self._wrapped, self._optimizer = fabric.setup(model, optimizer)
        self._lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._lr_factor)
        count = recipe.batch_size // recipe.optimizer.accumulate
        size = count, *data.train.images.shape[1:]
        images = torch.zeros(size, dtype=torch.uint8, device=fabric.device)
        example = preprocess(images, model, data)
        self._network = step_network(fabric, self._wrapped, model, example, recipe)
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        self._scaler: torch.amp.GradScaler | None = scaler
        for copied in (teacher, self.average):
            if copied is not None:
                copied.to(fabric.device)
        self._epoch_loss = torch.zeros((), device=fabric.device)  # sum over its steps so far
        self._epoch_seconds = 0.0
        self._unchecked: list[Tensor] = []  # losses that were not looked at so far
        torch.manual_seed(recipe.seed)  # dropout

    def fit(self) -> Iterator[bool]:
        """Train to the end, from the step reached so far; yield after every optimizer step.

        Yields:
            Whether a checkpoint is due, as it is at the end, too.

        Raises:
            DeepTwistError: if the loss is not finite, naming the step.
        """
        every = self._recipe.logging.checkpoint_every
        self._model.train()
        for module in frozen_modules(self._model, self._recipe.optimizer):
            module.eval()
        started = time.perf_counter()
        for x, labels in self._batches():
            self._unchecked.append(self._update(x, labels))
            self._epoch_loss += self._unchecked[-1]
            self._lr_scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self._model)
            self.step += 1
            ends = self.step % self._steps_per_epoch == 0
            saves = self.step % every == 0 or self.step == self.steps
            if ends or saves or len(self._unchecked) == _LOSSES_AT_ONCE:
                self._check_losses()
            self._epoch_seconds += time.perf_counter() - started

            if self.twist is not None:
                self._distort(self.twist)
            if ends:
                self._end_epoch()
            if saves:
                self._broadcast_buffers()
            yield saves
            started = time.perf_counter()

    def finish(self) -> nn.Module:
        """Return the network to deploy: distorted a last time and decomposed, if it was twisted."""
        if self.twist is None:
            return self._model
        return self._recorded(self.twist, self.twist.finish)

    def best_model(self) -> nn.Module:
        """Return a copy of the network with its best weights, its last ones if none are known."""
        model = copy.deepcopy(self._model)
        if self.best is not None:
            model.load_state_dict(self.best[1])
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on bit for bit, in plain containers and tensors."""
        return {
            "step": self.step,
            "best": self.best,
            "epoch_loss": self._epoch_loss,
            "epoch_seconds": self._epoch_seconds,
            "random": torch.get_rng_state(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Raises:
            AttributeError, LookupError, RuntimeError, TypeError, ValueError: if the state is of
                another training.
        """
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._epoch_loss.copy_(state["epoch_loss"])
        self._epoch_seconds = float(state["epoch_seconds"])
        self.best = state["best"]
        self.step = int(state["step"])
        torch.set_rng_state(state["random"])

    @property
    def learning_rate(self) -> float:
        """Return the rate that the next step has."""
        return float(self._lr_scheduler.get_last_lr()[0])

    def _parts(self) -> dict[str, Any]:
        """Return everything that has a state dict of its own, by its name in checkpoints."""
        parts = {
            "model": self._model,
            "optimizer": self._optimizer,
            "lr_scheduler": self._lr_scheduler,
            "twist": self.twist,
            "average": self.average,
            "scaler": self._scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _lr_factor(self, step: int) -> float:
        return lr_factor(self._recipe.schedule, step, self.steps, self._steps_per_epoch)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of every batch that is left, as the network takes it."""
        remaining = train_batches(
            self._data,
            self._recipe.batch_size,
            seed=self._recipe.seed,
            steps=range(self.step, self.steps),
            share=(self._fabric.global_rank, self._fabric.world_size),
            device=self._fabric.device,
        )
        for images, labels in remaining:
            yield preprocess(images, self._model, self._data), labels

    def _update(self, x: Tensor, labels: Tensor) -> Tensor:
        """Take an optimizer step; return its loss.

        One that fp16 skips, as gradients overflowed, is no step: it is taken again on the same
        images, at the smaller scale that followed.
        """
        clip_norm, scaler = self._recipe.optimizer.clip_norm, self._scaler
        while True:
            loss = self._backward(x, labels)
            if self._fabric.world_size > 1:
                loss = cast(Tensor, self._fabric.all_reduce(loss.clone(), reduce_op="mean"))
            if clip_norm is not None:
                self._fabric.clip_gradients(
                    self._wrapped, self._optimizer, max_norm=clip_norm, error_if_nonfinite=False
                )
            scale = 0.0 if scaler is None else scaler.get_scale()
            self._optimizer.step()
            self._optimizer.zero_grad()
            if scaler is None or scaler.get_scale() >= scale:
                return loss
            if scale <= 1:  # no overflow of the scaled loss
                raise DeepTwistError(
                    f"the loss is {loss:g} at step {self.step + 1}, its gradients are not finite "
                    f"in fp16: lower optimizer.lr={self._recipe.optimizer.lr}, or choose bf16-mixed"
                )

    def _backward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Add the gradients of this process's share of a batch; return its loss, detached."""
        parts = self._recipe.optimizer.accumulate
        total = torch.zeros((), device=x.device)
        chunks = zip(x.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for number, (images, targets) in enumerate(chunks, start=1):
            with self._fabric.no_backward_sync(self._wrapped, enabled=number < parts):
                loss = self._loss(images, targets) / parts
                self._fabric.backward(loss)
            total = total + loss.detach()
        return total

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        recipe = self._recipe
        logits = logits_of(self._network(x)).to(x.dtype)  # which autocast left in half precision
        loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if self._teacher is None or recipe.distillation is None:
            return loss
        with torch.no_grad(), self._fabric.autocast():
            taught = logits_of(self._teacher.eval()(x))
        weight, temperature = recipe.distillation.weight, recipe.distillation.temperature
        return (1 - weight) * loss + weight * distillation_loss(logits, taught, temperature)

    def _check_losses(self) -> None:
        """Look at the losses since the last look; raise a `DeepTwistError` if one is not finite."""
        losses = to_floats(self._unchecked)
        self._unchecked.clear()
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise DeepTwistError(
                    f"the loss is {loss} at step {step}: "
                    f"lower optimizer.lr={self._recipe.optimizer.lr}"
                )

    def _distort(self, twist: DeepTwist) -> None:
        try:
            distortion = self._recorded(twist, twist.step)
        except DeepTwistError:
            self._check_losses()  # a loss that was not finite explains weights that are not
            raise
        if distortion is not None:
            self._keep_best()

    def _recorded(self, twist: DeepTwist, distort: Callable[[Callable[[], float] | None], T]) -> T:
        """Return the result of `distort`, and record the distortion if there was one."""
        count, started = self._recipe.logging.images, time.perf_counter()
        evaluated: dict[str, list[Values]] = {"train": [], "test": []}
        evaluating = 0.0

        def loss() -> float:
            nonlocal evaluating
            self._broadcast_buffers()
            started = time.perf_counter()
            for name, split in (("train", self._data.train), ("test", self._data.test)):
                evaluated[name].append(asdict(self._evaluate(split.subsample(count))))
            evaluating += time.perf_counter() - started
            return float(evaluated["train"][-1]["loss"])

        known = len(twist.history)
        result = distort(loss if count else None)
        seconds = time.perf_counter() - started - evaluating
        if len(twist.history) > known:
            fields = {**asdict(twist.history[-1]), "lr": self.learning_rate, "seconds": seconds}
            self._on_record({"event": "distortion", **fields, **evaluated})
        return result

    def _end_epoch(self) -> None:
        self._broadcast_buffers()
        if self.twist is None:
            self._keep_best()
        images = self._steps_per_epoch * self._recipe.batch_size
        self._on_record(
            {
                "event": "epoch",
                "epoch": self.step // self._steps_per_epoch,
                "step": self.step,
                "train_loss": float(self._epoch_loss) / self._steps_per_epoch,
                "test": asdict(self._evaluate(self._data.test)),
                "lr": self.learning_rate,
                "seconds": self._epoch_seconds,
                "images_per_second": images / self._epoch_seconds,
            }
        )
        self._epoch_loss.zero_()
        self._epoch_seconds = 0.0

    def _keep_best(self) -> None:
        if self._data.validation is None:
            return
        accuracy = self._evaluate(self._data.validation).accuracy
        if self.best is None or accuracy > self.best[0]:
            weights = {n: t.detach().clone() for n, t in self._model.state_dict().items()}
            self.best = accuracy, weights

    def _evaluate(self, split: Split) -> Evaluation:
        with self._fabric.autocast():
            return evaluate(self._model, split, self._data)

    def _broadcast_buffers(self) -> None:
        """Give every process the first one's batch-norm statistics, as the next step would."""
        broadcast([*self._model.buffers()], source=0)


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    """Return the optimizer steps in an epoch; an incomplete last batch is left out."""
    return len(data.train.labels) // batch_size


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(teacher ‖ student) of the softened outputs (Hinton et al., 2015, section 2)."""
    student, teacher = (functional.log_softmax(x / temperature, 1) for x in (logits, taught))
    return temperature**2 * functional.kl_div(
        student, teacher, reduction="batchmean", log_target=True
    )


def _check_shares(recipe: Recipe, processes: int) -> None:
    parts = recipe.optimizer.accumulate
    if recipe.batch_size % (processes * parts):
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise DeepTwistError(
            f"batch_size {recipe.batch_size} cannot be shared by {processes} processes{in_parts}"
        )
