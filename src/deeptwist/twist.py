"""DeepTwist: the network trains unchanged, its weights are pulled to low rank now and then."""

import copy
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deeptwist.decompose import (
    check_finite,
    check_plan,
    dry_run,
    frobenius_norms,
    keep_frozen,
    materialize_weights,
    planned_weight,
    prefer_channels_last,
    replace_layers,
)
from deeptwist.decompositions import Factors
from deeptwist.distributed import (
    Summary,
    broadcast,
    check_in_sync,
    mean_over_ranks,
    process_rank,
    run_on_all_ranks,
    world_size,
)
from deeptwist.errors import DATA_ERRORS, DeepTwistError, check_int, explaining
from deeptwist.inspection.proof import check_equivalent, example_inputs
from deeptwist.inspection.run import ExampleInput
from deeptwist.layers.geometry import compute_dtype, kernel_to_weight, weight_to_kernel
from deeptwist.plan.plan import CompressedLayer, Plan

logger = logging.getLogger("deeptwist")

Loss = Callable[[], Tensor | float]
Perturb = Callable[[str, int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Distortion:
    """What one distortion step changed.

    Attributes:
        step: the number of optimizer steps before it.
        weight_shift: Δw = ‖W − W′‖_F / N over all N compressed weights.
        layer_shifts: the same for each layer by itself.
        loss_increase: ΔL/L of the closure's loss; `None` without a closure, or where L is 0.
    """

    step: int
    weight_shift: float
    layer_shifts: dict[str, float]
    loss_increase: float | None = None


class DeepTwist:
    """Counts optimizer steps and distorts the planned weights at every `interval`-th.

    >>> twist = DeepTwist(model, plan, interval=200)  # doctest: +SKIP
    >>> for x, y in loader:  # doctest: +SKIP
    ...     loss(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
    ...     twist.step()
    >>> small = twist.finish()  # doctest: +SKIP

    Attributes:
        plan: what `finish` carries out.
        steps: optimizer steps so far.
        history: the record of every distortion so far.
        output_difference: ‖y − y′‖ / ‖y‖ of the deployed network, once `finish` measured it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        interval: int,
        *,
        example_input: ExampleInput | None = None,
        perturb: Perturb | None = None,
    ):
        """Attach to a model; nothing is changed until the first distortion.

        The first distortion and the last are exact; those between refine the last one's factors.

        Args:
            model: the network that was planned, unwrapped (not inside DDP or a compiled one). In a
                `torch.distributed` job every process attaches to its own, at the same step, and
                calls `step`, `distort` and `finish`; each factors a share of the layers.
            plan: see `deeptwist.plan`.
            interval: S_D in the paper, in optimizer steps; 100 to 5,000 is usual.
            example_input: what `finish` compares outputs on, moved to the model's device; without
                it, standard normal numbers of the plan's shapes.
            perturb: for ablations, a layer's name, the step, its weight and the approximation →
                what is written instead, by all distortions but the last.

        Raises:
            DeepTwistError: if the interval is not positive, the plan compresses nothing, it is
                for another model, or the model cannot run with factored layers.
        """
        check_int("interval", interval)
        if not plan.compressed:
            raise DeepTwistError("the plan compresses no layer: print it to see the reasons")
        check_plan(model, plan)
        plan = keep_frozen(model, plan)
        if plan.inputs or example_input is not None:
            dry_run(model, plan, example_input)
        self.model, self.plan, self.interval, self.steps = model, plan, interval, 0
        self.history: list[Distortion] = []
        self.output_difference: float | None = None
        self._example_input, self._perturb = example_input, perturb
        self._factors: dict[str, Factors] = {}
        self._first: dict[str, Tensor] = {}  # what the first distortion wrote, until the second
        self._written: dict[str, Tensor] = {}  # by the last distortion, of what computes its weight

    def step(self, loss: Loss | None = None) -> Distortion | None:
        """Count an optimizer step: call it after each (after the last of accumulated gradients).

        Args:
            loss: a closure that gives the training loss on some fixed batch; it is called just
                before and just after a distortion, for ΔL/L.

        Returns:
            The record of the distortion, at every `interval`-th call; else `None`.

        Raises:
            DeepTwistError: if a weight is not finite; no weight is changed then.
        """
        self.steps += 1
        return self.distort(loss) if self.steps % self.interval == 0 else None

    def distort(self, loss: Loss | None = None) -> Distortion:
        """Distort now, whatever the step; see `step`."""
        return self._distort(loss)

    def finish(self, loss: Loss | None = None) -> nn.Module:
        """Distort a last time, exactly, and decompose the model, checked against the distorted one.

        Args:
            loss: as for `step`.

        Returns:
            The decomposed model; `output_difference` then holds ‖y − y′‖ / ‖y‖ on the example.

        Raises:
            DeepTwistError: if a parameter is not finite, or if the outputs differ by more than
                the square root of the coarsest precision that they are computed in.
        """
        run_on_all_ranks(self._check_parameters, lambda _: None)
        self._distort(loss, last=True)
        # The same factors serve both: CP's could not be found again from their product.
        kernels = {name: factors.kernels() for name, factors in self._factors.items()}
        small = replace_layers(self.model, self.plan, kernels)
        self.output_difference, _ = run_on_all_ranks(lambda: self._compare(small), lambda _: None)
        return small

    def _distort(self, loss: Loss | None, *, last: bool = False) -> Distortion:
        held = {layer.name: planned_weight(self.model, layer) for layer in self.plan.compressed}
        weights = {name: weight.read() for name, weight in held.items()}
        if not last:
            self._warn_of_untrained(weights)
        (factors, approximations, _), summaries = run_on_all_ranks(
            lambda: self._approximate(weights, last), lambda result: result[2]
        )
        check_in_sync(summaries)
        before = None if loss is None else mean_over_ranks(loss)
        # No weight has been written so far; from here on nothing can fail before all are.
        shapes = [summary.shapes for summary in summaries]
        self._factors = self._write(weights, factors, approximations, shapes)
        self._written = {name: weights[name] for name, x in held.items() if x.is_computed}
        for name, weight in self._written.items():
            held[name].write(weight)
        if not self.history and not last:
            self._first = {name: weight.clone() for name, weight in weights.items()}
        shifts = {name: x for summary in summaries for name, x in summary.shifts.items()}
        after = None if loss is None else mean_over_ranks(loss)
        self.history.append(self._record(shifts, before, after))
        return self.history[-1]

    def _warn_of_untrained(self, weights: Mapping[str, Tensor]) -> None:
        """Name the layers that did not move between the first distortion and the second, once."""
        if len(self.history) != 1 or not self._first:
            return
        still = [n for n, w in self._first.items() if torch.equal(w, weights[n])]
        self._first = {}
        if still:
            logger.warning(
                "not trained since the first distortion: %s: does the optimizer hold the weights "
                "of this model, and not of a copy?",
                ", ".join(map(repr, still)),
            )

    @torch.no_grad()
    def _approximate(
        self, weights: Mapping[str, Tensor], last: bool
    ) -> tuple[dict[str, Factors], dict[str, Tensor], Summary]:
        """Approximate this process's share of the layers, every n-th; nothing is written.

        Returns:
            The factors by layer, what is to be written over the weights, and what the others are
            told.
        """
        check_finite(weights)
        own = self.plan.compressed[process_rank() :: world_size()]
        factors = self._factorize(own, weights, last)
        approximations, differences = {}, []
        for layer in own:
            weight, held = weights[layer.name], factors[layer.name]
            if last or layer.name not in self._factors:  # exact
                # What sums in fp32 lose would stand between the distorted network and the
                # decomposed one.
                held = held.to(dtype=torch.float64)
            approximation = kernel_to_weight(held.reconstruct(), layer.convolution)
            # In the weight's own memory format: to meet it in another would cost more each time.
            written = torch.empty_like(weight).copy_(approximation.reshape(weight.shape))
            if self._perturb is not None and not last:
                written.copy_(self._perturb(layer.name, self.steps, weight, written))
            approximations[layer.name] = written
            differences.append(weight.to(compute_dtype(weight.dtype)) - written)
        shifts = dict(zip(approximations, frobenius_norms(differences), strict=True))
        for name, shift in shifts.items():
            if not math.isfinite(shift):
                dtype = weights[name].dtype
                raise DeepTwistError(f"layer {name!r} has an approximation beyond {dtype}")
        summary = Summary(
            steps=self.steps,
            plan=[(layer.name, str(layer.decomposition)) for layer in self.plan.compressed],
            norms=dict(zip(weights, frobenius_norms(weights.values()), strict=True)),
            shifts=shifts,
            shapes={name: [x.shape for x in held.tensors] for name, held in factors.items()},
        )
        return factors, approximations, summary

    def _factorize(
        self, layers: Sequence[CompressedLayer], weights: Mapping[str, Tensor], last: bool
    ) -> dict[str, Factors]:
        """Return factors by layer, refined from those of the last distortion where there are some.

        Layers of one shape are refined at once, as the groups of one kernel: on an accelerator
        small layers cost what it takes to launch their work.
        """
        factors: dict[str, Factors] = {}
        alike: dict[Hashable, list[CompressedLayer]] = {}
        kernels = {
            layer.name: weight_to_kernel(weights[layer.name], layer.convolution) for layer in layers
        }
        for layer in layers:
            kernel, start = kernels[layer.name], self._factors.get(layer.name)
            if last or start is None:
                factors[layer.name] = layer.decomposition.decompose(kernel)
            else:
                key = layer.decomposition, kernel.shape, kernel.dtype, kernel.device
                alike.setdefault(key, []).append(layer)
        for group in alike.values():
            names = [layer.name for layer in group]
            refined = group[0].decomposition.refine_together(
                [kernels[name] for name in names], [self._factors[name] for name in names]
            )
            factors |= dict(zip(names, refined, strict=True))
        return factors

    @torch.no_grad()
    def _write(
        self,
        weights: Mapping[str, Tensor],
        factors: dict[str, Factors],
        approximations: Mapping[str, Tensor],
        shapes: list[dict[str, list[torch.Size]]],
    ) -> dict[str, Factors]:
        """Write every process's approximations over the weights; return all factors.

        The parameters stay the same objects in the same memory format.
        """
        for source, of_source in enumerate(shapes):
            tensors = []
            for layer in self.plan.compressed:
                if layer.name not in of_source:
                    continue
                weight = weights[layer.name]
                if source == process_rank():
                    weight.copy_(approximations[layer.name])
                else:
                    dtype = compute_dtype(weight.dtype)
                    empty = [weight.new_empty(x, dtype=dtype) for x in of_source[layer.name]]
                    factors[layer.name] = _factors(layer, empty)
                tensors += [weight, *factors[layer.name].tensors]
            broadcast(tensors, source)
        torch.clear_autocast_cache()  # of the old weights, where the caller's loop is in autocast
        return {layer.name: factors[layer.name] for layer in self.plan.compressed}

    def _record(
        self, shifts: Mapping[str, float], before: float | None, after: float | None
    ) -> Distortion:
        sizes = {layer.name: layer.weight_numel for layer in self.plan.compressed}
        return Distortion(
            step=self.steps,
            weight_shift=math.hypot(*shifts.values()) / sum(sizes.values()),
            layer_shifts={name: shifts[name] / size for name, size in sizes.items()},
            # Relative to nothing, an increase has no size.
            loss_increase=(after - before) / before if before and after is not None else None,
        )

    def _check_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                owner = name.rpartition(".")[0]
                raise DeepTwistError(f"layer {owner!r} has parameters that are NaN or infinite")

    def _compare(self, small: nn.Module) -> float | None:
        calls = {layer.name: len(layer.calls) for layer in self.plan.compressed}
        dense = materialize_weights(self.model, self._written)
        inputs = example_inputs(
            self.model, self.plan.inputs, self.plan.keywords, self._example_input
        )
        prefer_channels_last(small, inputs)
        try:
            difference = check_equivalent(dense, small, calls, inputs)
        except DeepTwistError as error:
            raise DeepTwistError(f"{error}; the trained weights are safe in `model`") from error
        logger.info("decomposed and distorted outputs differ by %.2e (relative)", difference)
        return difference

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on bit for bit, in plain containers and tensors.

        The step count, the history, and the factors with which the next distortion begins; the
        weights are the model's. `torch.load(weights_only=True)` reads it back.
        """
        return {
            "steps": self.steps,
            "history": [asdict(record) for record in self.history],
            "factors": {
                name: [tensor.clone() for tensor in factors.tensors]
                for name, factors in self._factors.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Invert `state_dict`.

        Raises:
            DeepTwistError: if the state is not one of `state_dict`.
        """
        with explaining("not a DeepTwist state", errors=DATA_ERRORS):
            steps = int(state["steps"])
            history = [Distortion(**copy.deepcopy(record)) for record in state["history"]]
            stored = state["factors"]
            factors = {
                layer.name: _checked_factors(layer, stored[layer.name])
                for layer in (self.plan.compressed if stored else ())
            }
        self.steps, self.history, self._factors = steps, history, factors


def _checked_factors(layer: CompressedLayer, tensors: Iterable[Tensor]) -> Factors:
    """Return factors of a checkpoint.

    Raises:
        DeepTwistError: if they are no factors, or for another plan.
    """
    expected = [part.kernel_shape for part in layer.decomposition.parts(layer.convolution)]
    problem = f"the factors of layer {layer.name!r} are for another plan"
    with explaining(problem):
        factors = _factors(layer, tensors)
        shapes = [tuple(kernel.shape) for kernel in factors.kernels()]
    if shapes != expected:
        raise DeepTwistError(problem)
    return factors


def _factors(layer: CompressedLayer, tensors: Iterable[Tensor]) -> Factors:
    return Factors(layer.decomposition, layer.convolution.kernel_shape, tuple(tensors))
