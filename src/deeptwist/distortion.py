"""DeepTwist: the network trains unchanged, its weights are pulled to low rank now and then."""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeptwist.convolution import computing_dtype, weight_of
from deeptwist.decompositions import Factors
from deeptwist.errors import DeepTwistError, check_whole, first_line
from deeptwist.factorization import Dense, norms, numbers, planned_module, relative_difference, swap
from deeptwist.inspection import evaluating
from deeptwist.planning import Plan, PlannedLayer
from deeptwist.tracking import Starts, Tracked, check_starts, track

logger = logging.getLogger("deeptwist")

_MARGIN = 128  # CP's components may cancel; all other approximations are projections
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
def distort(model: nn.Module, plan: Plan, factors: dict[str, Factors]) -> dict[str, float]:
    """Writes every reconstruction over its weight, in place; returns ‖W − W′‖_F of each layer.

    The Parameter stays the same object in the same memory format, and the optimizer's state is
    left alone.

    Raises:
        DeepTwistError: if an approximation is beyond the weight's type; no weight is changed then.
    """
    weights = [cast(Dense, model.get_submodule(layer.name)).weight for layer in plan.compressed]
    before = norms(weight.detach() for weight in weights)
    for layer, weight, norm in zip(plan.compressed, weights, before, strict=True):
        # No number of an approximation, nor of a sum on the way to it, is much above ‖W‖: only
        # near the end of the type can one lie beyond it. There, look before writing.
        if not norm < torch.finfo(weight.dtype).max / _MARGIN:
            approximation = _reconstruction(layer, factors[layer.name], weight)
            if not approximation.isfinite().all():
                raise DeepTwistError(
                    f"layer {layer.name!r} has an approximation beyond {weight.dtype}"
                )
    shifts = []
    for layer, weight, norm in zip(plan.compressed, weights, before, strict=True):
        approximation = _reconstruction(layer, factors[layer.name], weight)
        dtype = computing_dtype(weight.dtype)
        low, high = _SQUARABLE
        shifts.append(
            torch.linalg.vector_norm(
                weight.to(dtype) - approximation.to(dtype),
                dtype=dtype if low < norm < high else torch.float64,
            )
        )
        weight.copy_(approximation)
    names = [layer.name for layer in plan.compressed]
    return dict(zip(names, numbers(shifts), strict=True))


def _reconstruction(layer: PlannedLayer, factors: Factors, weight: Tensor) -> Tensor:
    assert layer.convolution is not None
    with torch.autocast(weight.device.type, enabled=False):
        approximation = weight_of(factors.reconstruct(), layer.convolution).to(weight.dtype)
    approximation = approximation.reshape(weight.shape)
    # In the weight's memory format at once: to meet it in another would cost more each time.
    same = approximation.stride() == weight.stride()
    return approximation if same else torch.empty_like(weight).copy_(approximation)


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
            model: the network that was planned, unwrapped (not inside DDP or a compiled one).
            plan: see `deeptwist.plan`.
            interval: S_D in the paper, in optimizer steps; 100 to 5,000 is usual.
            tolerance: how much squared error above the optimum, relatively, a distortion on the
                way may have, by an estimate: it is then found from the one before it, at a
                fraction of the cost. 0 makes all exact, as the first and the last always are.
            example_input: what `finish` compares outputs on; without it, standard normal
                numbers of the plan's shapes.

        Raises:
            DeepTwistError: if the interval is not positive, the tolerance is not from 0 to 1, the
                plan compresses nothing, or it is for another model.
        """
        check_whole("interval", interval)
        if not 0 <= tolerance <= 1:
            raise DeepTwistError(f"tolerance {tolerance} is not from 0 (exact) to 1")
        if not plan.compressed:
            raise DeepTwistError("the plan compresses no layer: print it to see the reasons")
        for layer in plan.compressed:
            planned_module(model, layer)
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
        """Call once after every optimizer step (after the last of accumulated gradients).

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
        return self._distort(track(self.model, self.plan, self._starts, self.tolerance), loss)

    def _distort(
        self, tracked: Tracked, loss: Callable[[], Tensor | float] | None = None
    ) -> Distortion:
        before = None if loss is None else float(loss())
        shifts = distort(self.model, self.plan, tracked.factors)
        self._starts = tracked.starts if self.tolerance else {}
        after = None if loss is None else float(loss())
        sizes = {layer.name: layer.num_weights for layer in self.plan.compressed}
        whole = sum(shift**2 for shift in shifts.values()) ** 0.5
        record = Distortion(
            step=self.steps,
            weight_shift=whole / sum(sizes.values()),
            layer_shifts={name: shift / sizes[name] for name, shift in shifts.items()},
            # Relative to nothing, an increase has no size.
            loss_increase=(after - before) / before if before and after is not None else None,
            iterations=tracked.iterations,
            fallbacks=tracked.fallbacks,
        )
        self.records.append(record)
        return record

    def finish(self, loss: Callable[[], Tensor | float] | None = None) -> nn.Module:
        """A last distortion, then the decomposed model, checked against the distorted one.

        Args:
            loss: as for `step`.

        Returns:
            The decomposed model; `output_difference` then holds ‖y − y′‖ / ‖y‖ on the example.

        Raises:
            DeepTwistError: if a parameter is not finite, or if the outputs differ by more than
                the square root of the type's precision.
        """
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                owner = name.rpartition(".")[0]
                raise DeepTwistError(f"layer {owner!r} has parameters that are NaN or infinite")
        exact = track(self.model, self.plan, {}, 0)
        self._distort(exact, loss)
        # The same factors serve both: CP's could not be found again from their product.
        small = swap(self.model, self.plan, {n: f.kernels() for n, f in exact.factors.items()})
        self.output_difference = self._compare(small)
        return small

    def _compare(self, small: nn.Module) -> float | None:
        with evaluating(self.model), evaluating(small), torch.no_grad():
            try:
                inputs = self._inputs()
                expected = _tensors(self.model(*inputs))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise DeepTwistError(
                    f"the model cannot run on the example input: {first_line(error)}"
                ) from error
            try:
                found = _tensors(small(*inputs))
            except (AttributeError, RuntimeError, TypeError) as error:
                raise DeepTwistError(
                    f"the decomposed model cannot run: {first_line(error)}: a layer is used in "
                    "other ways than calling it; exclude it"
                ) from error
        if not expected:
            logger.warning("the model returns no tensors: decomposed and distorted not compared")
            return None
        differences = [relative_difference(e, f) for e, f in zip(expected, found, strict=True)]
        # NaN is no number to compare with: it must count as the worst.
        worst = max(math.inf if math.isnan(d) else d for d in differences)
        allowed = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        logger.info("decomposed and distorted outputs differ by %.2e (relative)", worst)
        if not worst <= allowed:
            raise DeepTwistError(
                f"the decomposed model's output differs by {worst:.1e} from the distorted one's "
                f"(at most {allowed:.1e}): a layer computes more than its weight says; exclude it"
            )
        return worst

    def _inputs(self) -> tuple[Tensor, ...]:
        if self._example_input is not None:
            given = self._example_input
            return given if isinstance(given, tuple) else (given,)
        reference = next(self.model.parameters())
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


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        parts = list(output.values())
    elif isinstance(output, (list, tuple)):
        parts = list(output)
    else:
        parts = list(getattr(output, "__dict__", {}).values())  # a dataclass, say
    return [tensor for part in parts for tensor in _tensors(part)]
