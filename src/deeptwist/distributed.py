"""Work shared out among the processes of a `torch.distributed` job.

A process by itself is a job of one: the same code then runs without any communication. Where there
are more, every process must call these functions, in turn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deeptwist.errors import DeepTwistError, first_line

T = TypeVar("T")
S = TypeVar("S")

_SYNC_RTOL = 1e-3  # relative difference of ‖W‖ from which two processes train two networks


@dataclass(frozen=True)
class Summary:
    """What a process tells the others of its share of a distortion, before any weight is written.

    Attributes:
        steps: optimizer steps so far.
        plan: every compressed layer's name and decomposition.
        norms: ‖W‖_F of every compressed layer.
        shifts: ‖W − W′‖_F of every layer of its share.
        shapes: by layer of its share, of the factors' tensors.
    """

    steps: int
    plan: list[tuple[str, str]]
    norms: dict[str, float]
    shifts: dict[str, float]
    shapes: dict[str, list[torch.Size]]


def world_size() -> int:
    """Return how many processes the job has; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return this process's number in the job, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def run_on_all_ranks(work: Callable[[], T], summarize: Callable[[T], S]) -> tuple[T, list[S]]:
    """Do a piece of work on every process; where it fails on one, it fails on all.

    Args:
        work: what each does by itself.
        summarize: what the others are to know of its result; pickled.

    Returns:
        This process's result, and the summaries of all processes, in order.

    Raises:
        DeepTwistError: on all, if one raised it or another process failed in any other way; such
            a failure is raised as it is where it happened.
    """
    if world_size() == 1:
        result = work()
        return result, [summarize(result)]
    error: Exception | None = None
    outcome: tuple[str, S | None]
    try:
        result = work()
        outcome = "", summarize(result)
    except Exception as caught:  # whatever it is, the others wait for it
        error = caught
        kind = "" if isinstance(error, DeepTwistError) else f"{type(error).__name__}: "
        outcome = kind + first_line(error), None
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, outcome)
    if error is not None and not isinstance(error, DeepTwistError):
        raise error
    for number, (failure, _) in enumerate(outcomes):
        if failure:
            raise DeepTwistError(f"{failure} (in process {number} of {world_size()})") from error
    return result, [summary for _, summary in outcomes]


def check_in_sync(summaries: list[Summary]) -> None:
    """Check that all processes train one network: what one approximates would ruin another's.

    Raises:
        DeepTwistError: on all of them, if they do not.
    """
    first = summaries[0]
    for number, summary in enumerate(summaries):
        if summary.plan != first.plan:
            raise DeepTwistError(f"process {number} has another plan than process 0")
        if summary.steps != first.steps:
            raise DeepTwistError(
                f"process {number} has made {summary.steps} steps, process 0 {first.steps}: "
                "load the same state on all"
            )
        for name, norm in first.norms.items():
            if not math.isclose(norm, summary.norms[name], rel_tol=_SYNC_RTOL):
                raise DeepTwistError(
                    f"layer {name!r} has other weights in process {number} than in process 0 "
                    f"(‖W‖ {summary.norms[name]:.6g} and {norm:.6g}): all must train one network, "
                    "as DDP does"
                )


def mean_over_ranks(loss: Callable[[], Tensor | float]) -> float:
    """Return the loss over the examples of all processes, each of which computes its own."""
    _, losses = run_on_all_ranks(lambda: float(loss()), lambda value: value)
    return sum(losses) / len(losses)


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """Write the numbers of one process's tensors into every other's, all at once.

    Args:
        tensors: of equal shapes and types on all processes, in any memory format, and on devices
            of any type: where the backend cannot send from one, they go by way of one it can.
        source: the process that gives.
    """
    if world_size() == 1 or not tensors:
        return
    device = _communication_device(tensors[0].device)
    # As bytes: a backend need not know the types.
    flat = torch.cat([x.contiguous().flatten().view(torch.uint8).to(device) for x in tensors])
    dist.broadcast(flat, source)
    if process_rank() != source:
        pieces = flat.split([x.numel() * x.element_size() for x in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            # A copy: a view as a wider type must begin where one of its numbers may.
            tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace every process's tensors by their means over all processes, all at once.

    Args:
        tensors: floating-point, of equal shapes on all processes.
    """
    if world_size() == 1 or not tensors:
        return
    device = _communication_device(tensors[0].device)
    flat = torch.cat([x.flatten().to(device, torch.float32) for x in tensors])
    dist.all_reduce(flat)
    pieces = (flat / world_size()).split([x.numel() for x in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))


def _communication_device(device: torch.device) -> torch.device:
    """Return where the backend can send from: the device itself, or the first that it knows."""
    # For example "cpu:gloo,cuda:nccl".
    known = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return device if device.type in known else torch.device(known[0])
