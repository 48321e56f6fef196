"""DeepTwist: the network trains unchanged, its weights are pulled to low rank now and then."""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deeptwist.decompose import get_planned_module, numbers, replace_layers
from deeptwist.decompositions import Decomposition, Factors
from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, check_int, first_line
from deeptwist.inspect.layers import FORWARD_ERRORS, as_tuple, eval_mode, output_tensors
from deeptwist.layers.geometry import compute_dtype
from deeptwist.plan.plan import Plan
from deeptwist.twist.distributed import broadcast, deal, processes, rank, together
from deeptwist.twist.tracking import (
    Block,
    Starts,
    Tracked,
    Weights,
    check_starts,
    costs,
    shapes_of,
    track,
)

T = TypeVar("T")

logger = logging.getLogger("deeptwist")

_MARGIN = 128  # CP's components may cancel; all other approximations are projections
_TF32 = 2.0**-10  # precision that cuDNN computes fp32 in, unless told otherwise
_ALIKE = 1e-3  # relative difference of ‖W‖ from which two processes train two networks
_SQUARABLE = 1e-9, 1e15  # ‖W‖ for which fp32 squares of W − W′ neither under- nor overflow


@dataclass(frozen=True)
class Distortion:
    """What one distortion step changed.

    Attributes:
        step: the number of optimizer steps before it.
        weight_shift: Δw = ‖W − W′‖_F / N over all N compressed weights.
        layer_shifts: the same for each layer by itself.
        loss_increase: ΔL/L of the closure's loss; none without a closure, or where L is 0.
        iterations: the most steps that an approximation was improved by; 0 where all are exact.
        fallbacks: by layer, how many of its matrices or tensors could not be followed from the
            last distortion within the tolerance, and were factored exactly.
    """

    step: int
    weight_shift: float
    layer_shifts: dict[str, float]
    loss_increase: float | None = None
    iterations: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def check_range(tracked: Tracked) -> None:
    """Checks that every weight's type can hold its approximation.

    Raises:
        DeepTwistError: if one cannot, naming the layer.
    """
    for block, factors in tracked.factors:
        # No number of an approximation, nor of a sum on the way to it, is much above ‖W‖: only
        # near the end of the type can one lie beyond it.
        weights = block.of(tracked.weights)
        limit = torch.finfo(weights[0].dtype).max / _MARGIN
        if all(tracked.norms[name] < limit for name in block.names):
            continue
        for name, found in zip(block.names, _approximations(block, factors, weights), strict=True):
            if not found.isfinite().all():
                raise DeepTwistError(f"layer {name!r} has an approximation beyond {found.dtype}")


@torch.no_grad()
def write(tracked: Tracked) -> dict[str, float]:
    """Writes every reconstruction over its weight, in place; returns ‖W − W′‖_F of each layer.

    The Parameter stays the same object in the same memory format, and the optimizer's state is
    left alone.
    """
    names: list[str] = []
    norms: list[Tensor] = []
    low, high = _SQUARABLE
    for block, factors in tracked.factors:
        weights = block.of(tracked.weights)
        approximations = _approximations(block, factors, weights)
        squarable = all(low < tracked.norms[name] < high for name in block.names)
        dtype = compute_dtype(weights[0].dtype) if squarable else torch.float64
        shifts = torch._foreach_sub(
            [weight.to(dtype) for weight in weights], [found.to(dtype) for found in approximations]
        )
        names += block.names
        norms += torch._foreach_norm(shifts)
        torch._foreach_copy_(weights, approximations)
    found = dict.fromkeys(names, 0.0)
    for name, norm in zip(names, numbers(norms), strict=True):
        found[name] = math.hypot(found[name], norm)
    return found


def _approximations(block: Block, factors: Factors, weights: list[Tensor]) -> list[Tensor]:
    """What is to be written over each of a block's weights, in its type and memory format."""
    with torch.autocast(weights[0].device.type, enabled=False):
        found = block.split(factors.reconstruct())
    # To meet it in another format would cost more each time.
    approximations = [torch.empty_like(weight) for weight in weights]
    torch._foreach_copy_(
        approximations, [x.reshape(w.shape) for x, w in zip(found, weights, strict=True)]
    )
    return approximations


class DeepTwist:
    """Counts optimizer steps and distorts the planned weights at every `interval`-th.

    >>> twist = DeepTwist(model, plan, interval=200)  # doctest: +SKIP
    >>> for x, y in loader:  # doctest: +SKIP
    ...     loss(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
    ...     twist.step()
    >>> small = twist.finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        interval: int,
        *,
        tolerance: float = 1e-3,
        example_input: Tensor | tuple[Tensor, ...] | None = None,
    ):
        """Attaches to a model; nothing is changed until the first distortion.

        Args:
            model: the network that was planned, unwrapped (not inside DDP or a compiled one). In a
                `torch.distributed` job every process attaches to its own, at the same step, and
                calls `step`, `distort` and `finish`; each factors a share of the layers.
            plan: see `deeptwist.plan`.
            interval: S_D in the paper, in optimizer steps; 100 to 5,000 is usual.
            tolerance: how much squared error above the optimum, relatively, a distortion on the
                way may have, by an estimate: it is then found from the one before it, at a
                fraction of the cost. 0 makes all exact, as the first and the last always are.
            example_input: what `finish` compares outputs on, moved to the model's device; without
                it, standard normal numbers of the plan's shapes.

        Raises:
            DeepTwistError: if the interval is not positive, the tolerance is not from 0 to 1, the
                plan compresses nothing, or it is for another model.
        """
        check_int("interval", interval)
        if not 0 <= tolerance <= 1:
            raise DeepTwistError(f"tolerance {tolerance} is not from 0 (exact) to 1")
        if not plan.compressed:
            raise DeepTwistError("the plan compresses no layer: print it to see the reasons")
        for layer in plan.compressed:
            get_planned_module(model, layer)
        self.model = model
        self.plan = plan
        self.interval = interval
        self.tolerance = tolerance
        self.steps = 0
        self.records: list[Distortion] = []
        self.output_difference: float | None = None
        self._example_input = example_input
        self._starts: Starts = {}

    def step(self, loss: Callable[[], Tensor | float] | None = None) -> Distortion | None:
        """LayerCall once after every optimizer step (after the last of accumulated gradients).

        Args:
            loss: a closure that gives the training loss on some fixed batch; it is called just
                before and just after a distortion, for ΔL/L.

        Returns:
            The record of the distortion, at every `interval`-th call; else none.

        Raises:
            DeepTwistError: if a weight is not finite; no weight is changed then.
        """
        self.steps += 1
        return self.distort(loss) if self.steps % self.interval == 0 else None

    def distort(self, loss: Callable[[], Tensor | float] | None = None) -> Distortion:
        """One distortion step now; see `step`."""
        self._distort(self._starts, self.tolerance, loss)
        return self.records[-1]

    def _distort(
        self,
        starts: Starts,
        tolerance: float,
        loss: Callable[[], Tensor | float] | None,
        last: bool = False,
    ) -> dict[str, list[Tensor]]:
        """One distortion, of which each process does its share; the layers' kernels if `last`."""
        shared = processes() > 1
        mine = deal(costs(self.plan), processes())[rank()] if shared else None

        def find() -> tuple[Tracked, Starts]:
            tracked = track(self.model, self.plan, starts, tolerance, mine)
            check_range(tracked)
            parts = {n: [*some] if self.tolerance else [] for n, some in tracked.starts.items()}
            if last:
                for block, factors in tracked.factors:  # exact: each is one layer
                    parts[block.names[0]].append(tuple(factors.kernels()))
            return tracked, parts

        (tracked, parts), tidings = together(find, lambda found: self._tidings(*found))
        _check_alike(tidings)
        before = _mean(loss)
        _, shifts = together(lambda: write(tracked), _as_it_is)
        if shared:
            parts = self._exchange(tracked.weights, parts, tidings)
        kernels = {name: list(some.pop()) for name, some in parts.items()} if last else {}
        self._starts = parts if self.tolerance else {}
        self.records.append(self._record(tidings, shifts, before, _mean(loss)))
        return kernels

    def _tidings(self, tracked: Tracked, parts: Starts) -> "_Tidings":
        orders = {}
        for name in parts:
            strides = tracked.weights[name].stride()
            orders[name] = tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))
        return _Tidings(
            steps=self.steps,
            plan=[(layer.name, layer.decomposition) for layer in self.plan.compressed],
            norms=tracked.norms,
            iterations=tracked.iterations,
            fallbacks=tracked.fallbacks,
            orders=orders,
            shapes={name: shapes_of(some) for name, some in parts.items()},
        )

    def _exchange(self, weights: Weights, own: Starts, tidings: "list[_Tidings]") -> Starts:
        """Everyone's parts, by layer; everyone's weights are written over those here."""
        found: Starts = {}
        for source, theirs in enumerate(tidings):
            tensors = []
            for name, order in theirs.orders.items():
                weight = weights[name]
                mine = source == rank()
                found[name] = own[name] if mine else _empty(theirs.shapes[name], weight)
                # As the numbers lie in memory, so that they are sent without being put in order.
                tensors.append(weight.permute(order))
                tensors += [tensor for some in found[name] for tensor in some]
            broadcast(tensors, source)
        return {layer.name: found[layer.name] for layer in self.plan.compressed}

    def _record(
        self,
        tidings: "list[_Tidings]",
        shifts: list[dict[str, float]],
        before: float | None,
        after: float | None,
    ) -> Distortion:
        moved = {name: shift for theirs in shifts for name, shift in theirs.items()}
        fallbacks = {name: n for theirs in tidings for name, n in theirs.fallbacks.items()}
        sizes = {layer.name: layer.weight_numel for layer in self.plan.compressed}
        whole = math.hypot(*(moved[name] for name in sizes))
        return Distortion(
            step=self.steps,
            weight_shift=whole / sum(sizes.values()),
            layer_shifts={name: moved[name] / size for name, size in sizes.items()},
            # Relative to nothing, an increase has no size.
            loss_increase=(after - before) / before if before and after is not None else None,
            iterations=max(theirs.iterations for theirs in tidings),
            fallbacks={name: fallbacks[name] for name in sizes if name in fallbacks},
        )

    def finish(self, loss: Callable[[], Tensor | float] | None = None) -> nn.Module:
        """A last distortion, then the decomposed model, checked against the distorted one.

        Args:
            loss: as for `step`.

        Returns:
            The decomposed model; `output_difference` then holds ‖y − y′‖ / ‖y‖ on the example.

        Raises:
            DeepTwistError: if a parameter is not finite, or if the outputs differ by more than
                the square root of the coarsest precision that they are computed in.
        """
        together(self._check_parameters, lambda _: None)
        # The same factors serve both: CP's could not be found again from their product.
        small = replace_layers(self.model, self.plan, self._distort({}, 0, loss, last=True))
        self.output_difference, _ = together(lambda: self._compare(small), lambda _: None)
        return small

    def _check_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                owner = name.rpartition(".")[0]
                raise DeepTwistError(f"layer {owner!r} has parameters that are NaN or infinite")

    def _compare(self, small: nn.Module) -> float | None:
        with eval_mode(self.model), eval_mode(small), torch.no_grad():
            try:
                inputs = self._inputs()
                expected = _outputs(self.model, inputs)
            except FORWARD_ERRORS as error:
                raise DeepTwistError(
                    f"the model cannot run on the example input: {first_line(error)}"
                ) from error
            try:
                found = _outputs(small, inputs)
            except FORWARD_ERRORS as error:
                raise DeepTwistError(
                    f"the decomposed model cannot run: {first_line(error)}: a layer is used in "
                    "other ways than calling it; exclude it"
                ) from error
        if not expected:
            logger.warning("the model returns no tensors: decomposed and distorted not compared")
            return None
        differences = [relative_error(e, f) for e, f in zip(expected, found, strict=True)]
        # NaN is no number to compare with: it must count as the worst.
        worst = max(math.inf if math.isnan(d) else d for d in differences)
        allowed = _coarsest([*self.model.parameters(), *expected]) ** 0.5
        logger.info("decomposed and distorted outputs differ by %.2e (relative)", worst)
        if not worst <= allowed:
            raise DeepTwistError(
                f"the decomposed model's output differs by {worst:.1e} from the distorted one's "
                f"(at most {allowed:.1e}): a layer computes more than its weight says; exclude it"
            )
        return worst

    def _inputs(self) -> tuple[Tensor, ...]:
        reference = next(self.model.parameters())
        if self._example_input is not None:
            return tuple(x.to(reference.device) for x in as_tuple(self._example_input))
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(shape, generator=generator).to(reference)
            if getattr(torch, dtype).is_floating_point
            else torch.zeros(shape, dtype=getattr(torch, dtype), device=reference.device)
            for shape, dtype in self.plan.inputs
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on bit for bit, in plain containers and tensors.

        The step count, the records, and the bases from which the next distortion is found; the
        weights are the model's. `torch.load(weights_only=True)` reads it back.
        """
        return {
            "steps": self.steps,
            "records": [asdict(record) for record in self.records],
            "starts": {
                name: [tuple(tensor.clone() for tensor in tensors) for tensors in parts]
                for name, parts in self._starts.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; without its bases, the next distortion is exact.

        Raises:
            DeepTwistError: if the state is not one of `state_dict`.
        """
        try:
            steps = int(state["steps"])
            records = [Distortion(**copy.deepcopy(record)) for record in state["records"]]
            starts = check_starts(self.plan, state.get("starts"))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DeepTwistError(f"not a DeepTwist state: {first_line(error)}") from None
        self.steps, self.records, self._starts = steps, records, starts


@dataclass(frozen=True)
class _Tidings:
    """What a process tells the others of its share of a distortion, before any weight is written.

    Attributes:
        steps: optimizer steps so far.
        plan: every compressed layer's name and decomposition.
        norms: ‖W‖_F of every compressed layer.
        iterations: see `Distortion`.
        fallbacks: see `Distortion`.
        orders: by layer of its share, the weight's axes from the outermost in memory.
        shapes: by layer of its share, of the tensors that it gives besides.
    """

    steps: int
    plan: list[tuple[str, Decomposition | None]]
    norms: dict[str, float]
    iterations: int
    fallbacks: dict[str, int]
    orders: dict[str, tuple[int, ...]]
    shapes: dict[str, list[list[torch.Size]]]


def _empty(shapes: list[list[torch.Size]], weight: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of these shapes, for numbers computed from a weight."""
    dtype = compute_dtype(weight.dtype)
    return [tuple(weight.new_empty(shape, dtype=dtype) for shape in some) for some in shapes]


def _check_alike(tidings: list[_Tidings]) -> None:
    """Checks that all processes train one network: what one finds would ruin another's.

    Raises:
        DeepTwistError: on all of them, if they do not.
    """
    first = tidings[0]
    for number, theirs in enumerate(tidings):
        if theirs.plan != first.plan:
            raise DeepTwistError(f"process {number} has another plan than process 0")
        if theirs.steps != first.steps:
            raise DeepTwistError(
                f"process {number} has made {theirs.steps} steps, process 0 {first.steps}: "
                "load the same state on all"
            )
        for name, norm in first.norms.items():
            if not math.isclose(norm, theirs.norms[name], rel_tol=_ALIKE):
                raise DeepTwistError(
                    f"layer {name!r} has other weights in process {number} than in process 0 "
                    f"(‖W‖ {theirs.norms[name]:.6g} and {norm:.6g}): all must train one network, "
                    "as DDP does"
                )


def _as_it_is(value: T) -> T:
    return value


def _mean(loss: Callable[[], Tensor | float] | None) -> float | None:
    """The loss over the examples of all processes, if there is a closure for it."""
    if loss is None:
        return None
    _, losses = together(lambda: float(loss()), _as_it_is)
    return sum(losses) / len(losses)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All tensors in the model's output; what it draws at random is the same every time."""
    gpus = {x.device for x in (*inputs, *model.parameters()) if x.is_cuda}
    with torch.random.fork_rng(devices=list(gpus)):
        return output_tensors(model(*inputs))


def _coarsest(tensors: list[Tensor]) -> float:
    """The relative precision that a network of these tensors may be computed in."""
    floats = [x for x in tensors if x.is_floating_point()]
    devices = {x.device.type for x in floats}
    types = {x.dtype for x in floats}
    types |= {torch.get_autocast_dtype(kind) for kind in devices if torch.is_autocast_enabled(kind)}
    found = [torch.finfo(dtype).eps for dtype in types]
    return max(*found, _TF32) if "cuda" in devices and torch.float32 in types else max(found)
