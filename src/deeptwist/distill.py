"""Recover a decomposed network without labels: the dense network is the teacher.

The small network learns to give the outputs of the dense one (Hinton et al., 2015), and those of
the blocks that its factored layers stand in, as reconstruction after quantisation does block by
block (BRECQ, Li et al., 2021); here all blocks at once, each on what the blocks before it make of
the input.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from deeptwist.decompose import recalibrate_batch_norm
from deeptwist.distributed import average, broadcast, mean_over_ranks, process_rank
from deeptwist.errors import DeepTwistError, check_int, explaining
from deeptwist.files import write_state
from deeptwist.inspection.run import ExampleInput, Inputs, eval_mode, output_tensors, read_batches
from deeptwist.inspection.swap import swap
from deeptwist.layers.factored import factored_layers

Pair = tuple[Tensor, Tensor]  # the small network's, the dense one's
Loss = Callable[[Tensor, Tensor], Tensor]

HELD_OUT = 2  # batches, by default
_LR, _LR_WITHOUT_BLOCKS = 4e-3, 1e-3  # outputs alone tell less of where to go
_RISE = 0.3  # of the budget: the rate rises, from a 25th, and falls to nothing in the rest
_NORM_BATCHES = 16  # that batch norm's statistics are taken anew on in the end
_CHECKPOINT_STEPS = 100  # between two


def distill(
    small: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = 600,
    minutes: float | None = None,
    lr: float | None = None,
    block_weight: float = 10.0,
    held_out: int = HELD_OUT,
    loss: Loss | None = None,
    inputs: Callable[[Any], ExampleInput] | None = None,
    on_step: Callable[[], None] = lambda: None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Return a copy of a decomposed network that is nearer to the dense one; never farther from it.

    AdamW without weight decay, one cycle of the rate. Modules stay in evaluation mode, but for
    batch norm, which sees the batches' own statistics, and takes them anew in the end. The same
    batches and number of steps give the same network. Of several processes each learns from its
    own batches, and all end with the same network.

    Args:
        small: what `deeptwist.decompose` made of `dense`, or any network of the same outputs, as a
            pruned one, whose outputs alone are then compared; left as it is.
        dense: the teacher; left as it is.
        batches: of inputs, with labels or without, which are not read. They are gone through again
            and again, augmented by whoever gives them.
        steps: of the optimizer, one a batch; `None` for no limit beside `minutes`.
        minutes: by the clock, at most.
        lr: the highest learning rate; without it 4e-3, and 1e-3 where no blocks are compared.
        block_weight: of the blocks' loss beside the outputs'.
        held_out: the first so many batches are not learned from, unless the loader shuffles: on
            them it is decided whether the result is better than the start, as it is or with batch
            norm taken anew; 0 to take it anyway.
        loss: of an output against the dense network's, both (examples, …) → a scalar; without it
            the Kullback-Leibler divergence for logits (examples, classes), and ‖x − y‖² / ‖y‖²
            for every other shape.
        inputs: a batch → what the networks are called with, see `deeptwist.calibrate`.
        on_step: called after every step.
        checkpoint: a file that is written now and then, and gone in the end: where it is there,
            what was cut goes on, and ends as if it had not been, given the same batches.

    Raises:
        DeepTwistError: if there is no budget, no parameter to learn, or no batch beyond those held
            out; if `small` was not made of `dense`, or nothing that they put out can be compared;
            or if the checkpoint cannot be read or is of other networks.
    """
    _check_budget(steps, minutes)
    check_int("held_out", held_out, 0)
    if factored_layers(dense) and not factored_layers(small):
        raise DeepTwistError("the dense network is the teacher: distill(small, dense, batches)")
    device = next(small.parameters()).device
    stream = read_batches(_repeated(batches, held_out), inputs, device)
    judges = [*islice(stream, held_out)]
    student = swap(small, {}).eval()
    broadcast([*student.state_dict().values()], source=0)
    start = swap(student, {})
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
    learning = [p for p in student.parameters() if p.requires_grad]
    if not learning:
        raise DeepTwistError(f"nothing in {type(small).__name__} is to be learned: all is frozen")
    optimizer = torch.optim.AdamW(learning, weight_decay=0.0)
    progress = _Progress(student, optimizer, steps, minutes, checkpoint)
    seen = deque(islice(stream, progress.done), maxlen=_NORM_BATCHES)
    for _ in range(progress.done):
        on_step()
    with eval_mode(dense), _side_by_side(student, dense) as run:
        while (share := progress.share) < 1:
            seen.append(x := next(stream))
            with explaining(f"{type(small).__name__} cannot learn on a batch"):
                outputs, blocks = run(x)
                value = _total(outputs, blocks, loss, block_weight)
            highest = lr or (_LR if blocks else _LR_WITHOUT_BLOCKS)
            for group in optimizer.param_groups:
                group["lr"] = highest * one_cycle(share)
            optimizer.zero_grad()
            value.backward()
            average([p.grad for p in learning if p.grad is not None])
            optimizer.step()
            # An autocast that the caller holds open would go on with casts of the old weights.
            torch.clear_autocast_cache()
            progress.advance()
            on_step()
    result = _recalibrated(student, seen)
    if judges:  # of equals the first: what changed nothing is no result
        candidates = [start, *([_recalibrated(start, seen)] if norms else ()), result]
        judge = partial(divergence_from, dense, batches=judges, loss=loss)
        result = min(candidates, key=lambda network: mean_over_ranks(partial(judge, network)))
    for module, source in zip(result.modules(), small.modules(), strict=True):
        module.training = source.training
    progress.forget()
    return result


def block_names(small: nn.Module) -> list[str]:
    """Return the modules whose outputs are compared: those that the factored layers are part of.

    Where that is a plain sequence of layers, or the whole network, it is the layer itself.
    """
    parents = {name: name.rpartition(".")[0] for name in factored_layers(small)}
    is_block = {
        name: bool(parent) and type(small.get_submodule(parent)) is not nn.Sequential
        for name, parent in parents.items()
    }
    return [*dict.fromkeys(parents[name] if is_block[name] else name for name in parents)]


def squared_error(
    x: Tensor,  # (examples, …)
    y: Tensor,  # (examples, …), the dense network's
) -> Tensor:  # ()
    """Return ‖x − y‖² / ‖y‖²."""
    x, y = x.float(), y.float()
    return (x - y).square().sum() / y.square().sum().clamp_min(torch.finfo(y.dtype).tiny)


def kullback_leibler(
    x: Tensor,  # (examples, classes)
    y: Tensor,  # (examples, classes), the dense network's
) -> Tensor:  # ()
    """Return the divergence of two sets of logits, the mean over the examples, in nats."""
    x, y = x.float().log_softmax(1), y.float().log_softmax(1)
    return functional.kl_div(x, y, log_target=True, reduction="batchmean")


@torch.no_grad()
def divergence_from(
    dense: nn.Module, model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> float:
    """Return the mean loss of a network's outputs, as it is deployed, against the dense one's.

    Args:
        dense: the teacher.
        model: any network with the same outputs.
        batches: see `deeptwist.calibrate`.
        loss: see `distill`.
    """
    values: list[float] = []
    with eval_mode(dense), eval_mode(model), _side_by_side(model, dense) as run:
        for inputs in read_batches(batches, device=next(model.parameters()).device):
            outputs, blocks = run(inputs)
            losses = [(loss or _default_loss(y))(x, y) for x, y in outputs]
            # Where outputs are sorted, filtered or integers, the blocks' tell.
            losses = losses or [squared_error(*pair) for pair in blocks]
            values.append(sum(map(float, losses)))
    return math.fsum(values) / len(values)


def one_cycle(share: float) -> float:
    """Return the learning rate, as a share of the highest, when so much of a budget is spent."""
    if share < _RISE:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * share / _RISE)) / 2
    return (1 + math.cos(math.pi * (share - _RISE) / (1 - _RISE))) / 2


def _check_budget(steps: int | None, minutes: float | None) -> None:
    if steps is not None:
        check_int("steps", steps)
    if minutes is not None and not 0 < minutes < math.inf:
        raise DeepTwistError(f"minutes={minutes} is no time to learn in: give a positive number")
    if steps is None and minutes is None:
        raise DeepTwistError("there is no budget to learn in: give steps or minutes")


def _recalibrated(network: nn.Module, batches: Iterable[Inputs]) -> nn.Module:
    """Return a copy whose batch norms hold the statistics of these batches, of all processes."""
    network = recalibrate_batch_norm(network, batches)
    average([buffer for buffer in network.buffers() if buffer.is_floating_point()])
    return network


class _Progress:
    """How far a distillation is; written down now and then where there is a file for it.

    Attributes:
        done: steps that are made, in an earlier process too.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: Optimizer,
        steps: int | None,
        minutes: float | None,
        path: Path | None,
    ):
        """Go on from the file, if it is there."""
        self._student, self._optimizer, self._path = student, optimizer, path
        self._steps, self._seconds = steps, None if minutes is None else 60 * minutes
        self.done, spent = 0, 0.0
        if path is not None and path.exists():
            problem, advice = f"cannot go on from '{path}'", "remove it to begin anew"
            with explaining(problem, advice, (Exception,)):  # of damaged bytes, a dozen types
                state = torch.load(path, map_location="cpu", weights_only=True)
                student.load_state_dict(state["network"])
                optimizer.load_state_dict(state["optimizer"])
                self.done, spent = int(state["done"]), float(state["seconds"])
        self._begun = time.monotonic() - spent

    @property
    def share(self) -> float:
        """Return the share of the budget that is spent, the same in all processes."""
        by_steps = 0.0 if self._steps is None else self.done / self._steps
        if self._seconds is None:
            return by_steps
        spent = time.monotonic() - self._begun
        return max(by_steps, mean_over_ranks(lambda: spent) / self._seconds)

    def advance(self) -> None:
        """Count a step."""
        self.done += 1
        if self._path is None or self.done % _CHECKPOINT_STEPS or process_rank() > 0:
            return
        state = {
            "network": self._student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "done": self.done,
            "seconds": time.monotonic() - self._begun,
        }
        write_state(self._path, state)

    def forget(self) -> None:
        """Remove the file: nothing is left to go on with."""
        if self._path is not None and process_rank() == 0:
            self._path.unlink(missing_ok=True)


def _total(outputs: list[Pair], blocks: list[Pair], loss: Loss | None, weight: float) -> Tensor:
    """Return the loss of a batch.

    Raises:
        DeepTwistError: if nothing of it depends on what is to be learned.
    """
    losses = [(loss or _default_loss(y))(x, y) for x, y in outputs]
    losses += [weight * squared_error(*pair) for pair in blocks]
    if not any(value.requires_grad for value in losses):
        raise DeepTwistError(
            "nothing that the networks put out can be learned: there are no numbers that are "
            "comparable, or none that depend on the weights"
        )
    return torch.stack(losses).sum()


def _repeated(batches: Iterable[Any], held_out: int) -> Iterator[Any]:
    """Yield the batches again and again, those held out once; an iterator's own are kept."""
    if isinstance(batches, Iterator):
        batches = [*batches]
    begin = 0
    while True:
        count = 0
        for count, batch in enumerate(batches, 1):
            if count > begin:
                yield batch
        if count <= held_out:
            raise DeepTwistError(
                f"{count} batches leave none to learn from: {held_out} are held out, to tell "
                "whether the result is better (held_out=)"
            )
        begin = held_out


def _default_loss(
    y: Tensor,  # (examples, …)
) -> Loss:
    """Return the loss that suits an output of this shape."""
    return kullback_leibler if y.dim() == 2 and y.shape[1] > 1 else squared_error


@contextmanager
def _side_by_side(
    model: nn.Module, dense: nn.Module
) -> Iterator[Callable[[Inputs], tuple[list[Pair], list[Pair]]]]:
    """Give a call that runs both: what is comparable of their outputs, and of their blocks'."""
    names = block_names(model)
    with _recording(model, names) as learned, _recording(dense, names) as taught:

        def run(inputs: Inputs) -> tuple[list[Pair], list[Pair]]:
            with torch.no_grad():
                targets = output_tensors(inputs.run(dense))
            outputs = output_tensors(inputs.run(model))
            pairs = zip(outputs, targets, strict=True) if len(outputs) == len(targets) else ()
            blocks = [
                (learned[name], taught[name])
                for name in names
                if learned.keys() & taught.keys() >= {name}
            ]
            return [*filter(_is_comparable, pairs)], [*filter(_is_comparable, blocks)]

        yield run


def _is_comparable(pair: Pair) -> bool:
    x, y = pair
    return x.shape == y.shape and y.is_floating_point() and y.numel() > 0


@contextmanager
def _recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Hold what the named modules put out last, the first tensor of it, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            outputs.update((name, tensor) for tensor in output_tensors(output)[:1])

        return hook

    with ExitStack() as stack:
        for name in names:
            with explaining("small is not made of this dense network", errors=(AttributeError,)):
                module = model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(keep(name)))
        yield outputs
