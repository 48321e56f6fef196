"""Work shared out among the processes of a `torch.distributed` job.

A process by itself is a job of one: the same code then runs without any communication. Where there
are more, every process must call these functions, in turn.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deeptwist.errors import DeepTwistError, first_line

T = TypeVar("T")
S = TypeVar("S")


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


def _communication_device(device: torch.device) -> torch.device:
    """Return where the backend can send from: the device itself, or the first that it knows."""
    # For example "cpu:gloo,cuda:nccl".
    known = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return device if device.type in known else torch.device(known[0])
