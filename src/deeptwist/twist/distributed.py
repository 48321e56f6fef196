"""Workload shared out among the processes of a `torch.distributed` job.

A process by itself is a job of one: the same code then runs without any communication. All
functions but `deal` are collective where there are more: every process must call them, in turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deeptwist.errors import DeepTwistError, first_line

_BUCKET = 2**23  # numbers sent at once: 32 MiB in fp32, where bandwidth has long been reached

T = TypeVar("T")
S = TypeVar("S")


def processes() -> int:
    """How many processes the job has; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the job, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def deal(costs: Mapping[str, float], hands: int) -> list[list[str]]:
    """Shares tasks out, the dearest first, each to the hand that has least to do so far.

    The dearest hand then has at most 4/3 of what the best division gives it (Graham, "Bounds on
    Multiprocessing Timing Anomalies", 1969). Equal on all processes: ties go by order.

    Args:
        costs: by task.
        hands: how many there are to share among.

    Returns:
        The tasks of every hand, in the order of `costs`.
    """
    loads, owner = [0.0] * hands, {}
    for task in sorted(costs, key=lambda task: -costs[task]):
        owner[task] = loads.index(min(loads))
        loads[owner[task]] += costs[task]
    return [[task for task in costs if owner[task] == hand] for hand in range(hands)]


def together(work: Callable[[], T], tell: Callable[[T], S]) -> tuple[T, list[S]]:
    """Does a piece of work on every process; where it fails on one, it fails on all.

    Args:
        work: what each does by itself.
        tell: what the others are to know of its result; pickled.

    Returns:
        This process's result, and what every process tells of its own, in order.

    Raises:
        DeepTwistError: on all, if one raised it or another process failed in any other way; such
            a failure is raised as it is where it happened.
    """
    if processes() == 1:
        result = work()
        return result, [tell(result)]
    error: Exception | None = None
    outcome: tuple[str, S | None]
    try:
        result = work()
        outcome = "", tell(result)
    except Exception as caught:
        error = caught
        ours = isinstance(error, DeepTwistError)
        outcome = (str(error) if ours else f"{type(error).__name__}: {first_line(error)}"), None
    outcomes: list[Any] = [None] * processes()
    dist.all_gather_object(outcomes, outcome)
    if error is not None and not isinstance(error, DeepTwistError):
        raise error
    for number, (failure, _) in enumerate(outcomes):
        if failure:
            raise DeepTwistError(f"{failure} (in process {number} of {processes()})") from error
    return result, [told for _, told in outcomes]


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """Writes the numbers of one process's tensors into every other's, a bucket at a time.

    Args:
        tensors: of equal shapes and types on all processes, in any memory format, and on devices
            of any type: where the backend cannot send from one, they go by way of one it can.
        source: the process that gives.
    """
    if processes() == 1:
        return
    for bucket in _buckets(tensors):
        device = _carrier(bucket[0].device)
        if rank() == source:
            flat = torch.cat([tensor.flatten() for tensor in bucket]).to(device)
        else:
            numbers = sum(tensor.numel() for tensor in bucket)
            flat = torch.empty(numbers, dtype=bucket[0].dtype, device=device)
        dist.broadcast(flat.view(torch.uint8), source)  # bytes: a backend need not know the type
        if rank() != source:
            pieces = flat.split([tensor.numel() for tensor in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, no more numbers at once than `_BUCKET`, or one tensor."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        bucket: list[Tensor] = []
        room = _BUCKET
        for tensor in group:
            if bucket and tensor.numel() > room:
                yield bucket
                bucket, room = [], _BUCKET
            bucket.append(tensor)
            room -= tensor.numel()
        yield bucket


def _carrier(device: torch.device) -> torch.device:
    """Where the backend can send from: the device itself, or the first that it knows."""
    # For example "cpu:gloo,cuda:nccl".
    able = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return device if device.type in able else torch.device(able[0])
