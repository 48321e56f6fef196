"""Decide for every layer of a model how it is held, or read it from a model that is decomposed."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from deeptwist.decompositions import CannotDecomposeError, Decomposition, find_method
from deeptwist.errors import DeepTwistError, check_int, check_ratio
from deeptwist.inspection.run import ExampleInput, Inputs
from deeptwist.inspection.usage import Layer, inspect_model
from deeptwist.layers.factored import factored_layers
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.measure.machine import LatencyCache
from deeptwist.measure.runtimes import Setting
from deeptwist.measure.timing import Clock, time_modules
from deeptwist.plan.budget import Budgets, Candidate, LayerErrors, layer_candidates, share_budgets
from deeptwist.plan.calibration import Calibration
from deeptwist.plan.latency import Latency, search_latency, time_network
from deeptwist.plan.layers import Layers
from deeptwist.plan.plan import CompressedLayer, KeptLayer, Plan, PlannedLayer, layer_costs

logger = logging.getLogger("deeptwist.clock")  # what is being timed, shown on the command line

LayerChoice = Layers | Callable[[str, nn.Module], bool]
_LAYERS = Layers()
_ANY_RATIO = 2.0  # at which a layer that no budget can shrink says why


def plan(
    model: nn.Module,
    decomposition: Decomposition | str | Sequence[Decomposition | str],
    *,
    example_input: ExampleInput,
    ratio: float | None = None,
    weights: float | None = None,
    macs: float | None = None,
    latency: float | Latency | None = None,
    layers: LayerChoice = _LAYERS,
    rank_multiple: int | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide for every layer how it is held; the model itself is not touched.

    How much smaller is said in one of three ways: by the ranks of the decomposition, by `ratio`, or
    by budgets (`weights`, `macs`, `latency`; several are kept together). Under budgets every layer
    takes the ranks that lose least, by the sum of the layers' relative squared errors.

    Args:
        model: any network; it is run once on the example input, in evaluation mode.
        decomposition: how layers are held, or its name (``"spatial_svd"``). Of several, each layer
            takes the one that loses least: at the ratio, or for its cost under budgets.
        example_input: one batch, the tuple of the model's arguments, or a dict of its keyword
            arguments; numbers, `None` and lists of tensors may be among them.
        ratio: dense ÷ factored weights that every compressed layer keeps at least: the paper's
            rule.
        weights: dense ÷ factored weights that the layers to compress keep together.
        macs: dense ÷ factored MACs that the layers to compress keep together.
        latency: how many times as fast the whole network is to be, measured here; or a `Latency`,
            which says it in milliseconds, or at which batch and in which runtime.
        layers: which layers to compress, see `Layers`; or a function of a layer's name and module
            that returns whether to.
        rank_multiple: ranks that a ratio or a budget sets are rounded down to a multiple of this,
            where they are that large; by default 1, or with a budget of latency the width of the
            processor's vectors, where the clock shows it.
        calibration: what `deeptwist.calibrate` returned; `relative_error` is then the outputs',
            in every layer that it holds. Give it to `deeptwist.decompose` too.

    Returns:
        The plan; every layer that is not compressed is in it with its reason.

    Raises:
        DeepTwistError: if neither rank, ratio nor budget is given, no plan keeps the budgets, a
            pattern matches no layer, or an override by exact name cannot be met.
    """
    if isinstance(decomposition, Decomposition | str):
        decomposition = (decomposition,)
    methods = [find_method(x)() if isinstance(x, str) else x for x in decomposition]
    planner = Planner(model, example_input, methods, layers, rank_multiple, calibration)
    budgets = Budgets(weights, macs)
    if budgets == Budgets() and latency is None:
        return planner.plan_at_ratio(ratio)
    if ratio is not None:
        raise DeepTwistError("a ratio is every layer's: weights= is that of all together")
    if isinstance(latency, int | float):
        latency = Latency(speedup=latency)
    return planner.plan_within(budgets, latency)


def plan_from_model(decomposed: nn.Module, model: nn.Module, example_input: ExampleInput) -> Plan:
    """Return the plan that a decomposed model carries out, read from its factored layers.

    Args:
        decomposed: what `decompose` or `deeptwist.load` returned; `model` itself for a plan that
            compresses nothing but says what the model costs.
        model: the dense network.
        example_input: see `plan`.

    Raises:
        DeepTwistError: if a factored layer has no counterpart in `model`.
    """
    factored = factored_layers(decomposed)
    unplanned, layers = inspect_for_plan(model, Inputs.of(example_input))
    planned: list[PlannedLayer] = []
    for layer in layers:
        module = factored.pop(layer.names[0], None)
        if module is None:
            planned.append(KeptLayer.of(layer, layer.reason or "is dense in the decomposed model"))
        elif module.convolution != layer.convolution:
            raise DeepTwistError(
                f"layer {layer.names[0]!r} stands for ({module.convolution}) where the dense "
                f"model has ({layer.convolution})"
            )
        else:
            planned.append(CompressedLayer.of(layer, module.decomposition))
    if factored:
        raise DeepTwistError(f"the dense model has no layer {min(factored)!r}")
    return replace(unplanned, layers=tuple(planned))


class Planner:
    """A model, inspected, and the rules that it is planned by; budgets come and go."""

    def __init__(
        self,
        model: nn.Module,
        example_input: ExampleInput,
        decompositions: Sequence[Decomposition],
        layers: LayerChoice = _LAYERS,
        rank_multiple: int | None = None,
        calibration: Calibration | None = None,
        clock: Clock = time_modules,
    ) -> None:
        """Inspect the model; see `plan` for the arguments, `time_modules` for the clock."""
        if not decompositions:
            raise DeepTwistError("there is no decomposition to plan with: give at least one")
        if rank_multiple is not None:
            check_int("rank_multiple", rank_multiple)
        self._model, self._inputs = model, Inputs.of(example_input)
        self._decompositions, self._clock = decompositions, clock
        self._rank_multiple = rank_multiple
        self._unplanned, found = inspect_for_plan(model, self._inputs)
        self._chosen = None if isinstance(layers, Layers) else layers
        self._rules = layers if isinstance(layers, Layers) else Layers(False, linear=True)
        self._rules.check_patterns(name for layer in found for name in layer.names)
        self._first = first_convolution(found)
        moments = calibration.moments if calibration else {}
        self._errors = [LayerErrors(layer, moments.get(layer.names[0])) for layer in found]

    def plan_at_ratio(self, ratio: float | None) -> Plan:
        """Return the plan in which every layer keeps a ratio, or has the rank that it is given."""
        if ratio is None:
            self._check_ranks(self._decompositions)
        else:
            check_ratio(ratio)
        layers = tuple(self._plan_layer(errors, ratio) for errors in self._errors)
        return replace(self._unplanned, layers=layers)

    def plan_within(self, budgets: Budgets, latency: Latency | None = None) -> Plan:
        """Return the plan that keeps the budgets, and makes the network as fast as asked."""
        for decomposition in self._decompositions:
            if not decomposition.needs_ratio:
                raise DeepTwistError(f"{decomposition} has a rank: leave it to the budget")
        if budgets.weights is None:
            self._check_ranks(())
        if latency is None:
            return self._share(self._candidates(None), budgets)
        inputs, setting = self._timed_inputs(latency)
        with setting.applied():
            cache = LatencyCache(setting.runtime) if self._clock is time_modules else None
        layer_clock = LayerClock(
            next(self._model.parameters()),
            examples=self._unplanned.examples,
            setting=setting,
            clock=self._clock,
            cache=cache,
        )
        candidates = self._candidates(layer_clock)

        def attempt(speedup: float | None) -> Plan:
            made = self._share(candidates, replace(budgets, milliseconds=speedup), speedup is None)
            logger.info("timing the network as planned beside the dense one")
            times = time_network(self._model, inputs, made, setting, self._clock)
            logger.info("timed the network: %s", times)
            return replace(made, latency=times)

        return search_latency(latency, attempt)

    def _share(
        self, candidates: Sequence[Sequence[Candidate]], budgets: Budgets, fastest: bool = False
    ) -> Plan:
        """Return the plan whose layers keep budgets together; those without candidates do not."""
        sharing = [own for own in candidates if own]
        chosen = iter(share_budgets(sharing, budgets, fastest=fastest))
        ratio = budgets.weights or budgets.macs or _ANY_RATIO
        layers = [
            _choose(errors.layer, next(chosen)) if own else self._plan_layer(errors, ratio)
            for errors, own in zip(self._errors, candidates, strict=True)
        ]
        return replace(self._unplanned, layers=tuple(layers))

    def _check_ranks(self, decompositions: Sequence[Decomposition]) -> None:
        """Check that these and all overrides have a rank, where nothing else sets it."""
        for choice in (*decompositions, *self._rules.overrides.values()):
            if isinstance(choice, Decomposition) and choice.needs_ratio:
                raise DeepTwistError(
                    f"{choice} has no rank: give it one, or give ratio, weights, macs or latency"
                )

    def _timed_inputs(self, latency: Latency) -> tuple[Inputs, Setting]:
        """Return the example input at the batch that the network is timed at, and the setting."""
        setting = latency.setting(next(self._model.parameters()).dtype)
        batch = batch_of(self._inputs, [errors.layer for errors in self._errors])
        if batch is None:  # timed as they are
            return self._inputs, replace(setting, batch=1)
        rows = torch.arange(setting.batch, device=self._inputs.tensors[0].device) % batch
        inputs = self._inputs.map(lambda x: x[rows] if x.dim() and len(x) == batch else x)
        return inputs, setting

    def _skip_reason(self, layer: Layer) -> str | None:
        """Return why a layer is kept, whatever an override says aside."""
        if layer.convolution is None:
            return layer.reason or "has no geometry"
        if layer.reason is not None or self._rules.override(layer.names) is not None:
            return layer.reason
        if self._chosen and not any(self._chosen(name, layer.module) for name in layer.names):
            return "not chosen"
        is_first = layer is self._first
        return self._rules.skip_reason(layer.names, layer.convolution, is_first=is_first)

    def _candidates(self, clock: LayerClock | None) -> list[list[Candidate]]:
        """Return the ways to hold every layer that takes part in budgets; none for the others."""
        sharing = {
            errors: geometry
            for errors in self._errors
            if (geometry := errors.layer.convolution) is not None
            and self._rules.override(errors.layer.names) is None
            and self._skip_reason(errors.layer) is None
        }
        multiple = self._rank_multiple or 1
        uses = [
            (geometry, call) for errors, geometry in sharing.items() for call in errors.layer.calls
        ]
        if clock is not None and self._rank_multiple is None and uses:  # where most work is
            geometry, call = max(uses, key=lambda use: use[1].count * use[0].macs(use[1].size))
            multiple = clock.rank_multiple(geometry, call, self._decompositions[0])
        made: dict[LayerErrors, list[Candidate]] = {}
        started = time.monotonic()
        for done, (errors, geometry) in enumerate(sharing.items()):
            if clock is not None:
                name, seconds = errors.layer.names[0], time.monotonic() - started
                left = f", {seconds / done * (len(sharing) - done):.0f} s left" if done else ""
                logger.info("timing layer %d of %d, %s%s", done + 1, len(sharing), name, left)
            options = self._decompositions, multiple, clock
            made[errors] = layer_candidates(errors, geometry, *options)
        return [made.get(errors, []) for errors in self._errors]

    def _plan_layer(self, errors: LayerErrors, ratio: float | None) -> PlannedLayer:
        """Plan a layer by itself: at a ratio, or as an override says."""
        layer, decompositions = errors.layer, self._decompositions
        pattern, choice = self._rules.override(layer.names) or (None, decompositions)
        if choice is None:
            return KeptLayer.of(layer, "by an override")
        if isinstance(choice, Decomposition):
            decompositions = [choice]
        elif isinstance(choice, int | float):
            ratio = check_ratio(choice)
            decompositions = [decomposition.without_rank() for decomposition in decompositions]
        reason = self._skip_reason(layer)
        if layer.convolution is not None and reason is None:
            try:
                return self._best(errors, layer.convolution, decompositions, ratio)
            except CannotDecomposeError as error:
                reason = str(error)
        kept = KeptLayer.of(layer, reason or "")
        if pattern in layer.names:  # asked for by its exact name: to keep it would be no answer
            shown = kept.convolution or kept.kind
            raise DeepTwistError(f"layer {kept.name!r} ({shown}) {kept.reason}")
        return kept

    def _best(
        self,
        errors: LayerErrors,
        convolution: ConvGeometry,
        decompositions: Sequence[Decomposition],
        ratio: float | None,
    ) -> CompressedLayer:
        """Return the layer in the decomposition that loses least of those that fit it.

        Raises:
            CannotDecomposeError: if none does, for the first one's reason.
        """
        fitting: list[CompressedLayer] = []
        refusals: list[CannotDecomposeError] = []
        for decomposition in decompositions:
            try:
                resolved = decomposition.resolve(convolution, ratio)
                if decomposition.needs_ratio:
                    resolved = resolved.round_ranks(self._rank_multiple or 1)
                _check_is_smaller(convolution, errors.layer.calls, resolved)
                error = errors.error(resolved)
                fitting.append(CompressedLayer.of(errors.layer, resolved, error))
            except CannotDecomposeError as refusal:
                refusals.append(refusal)
        if not fitting:
            raise refusals[0]
        if len(fitting) > 1 and any(layer.relative_error is None for layer in fitting):
            raise DeepTwistError("which decomposition loses least is seen from weights: load them")
        return min(fitting, key=lambda layer: layer.relative_error or 0.0)


def _choose(layer: Layer, candidate: Candidate) -> PlannedLayer:
    """Return a layer in the way that a budget chose."""
    if candidate.decomposition is None:
        return KeptLayer.of(layer, "not worth it: the budget is met without")
    return CompressedLayer.of(layer, candidate.decomposition, candidate.error**0.5)


def _check_is_smaller(
    convolution: ConvGeometry, calls: tuple[LayerCall, ...], decomposition: Decomposition
) -> None:
    before, after = (layer_costs(convolution, calls, form) for form in (None, decomposition))
    if after[0] >= before[0]:
        raise CannotDecomposeError(f"would grow: {after[0]:,} weights for {before[0]:,}")
    if after[1] >= before[1]:
        raise CannotDecomposeError(f"would slow down: {after[1]:,} MACs for {before[1]:,}")


def first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """Return the convolution that runs first, linear layers not counted."""
    convolutions = [layer for layer in layers if layer.convolution and layer.convolution.dims]
    return min(convolutions, key=lambda layer: layer.call_order, default=None)


def batch_of(inputs: Inputs, layers: Sequence[Layer]) -> int | None:
    """Return how many examples the inputs hold; `None` where they have no batch in front."""
    first, x = first_convolution(layers), inputs.tensors[0]
    if x.dim() < 2 or not any(x is each for each in (*inputs.args, *inputs.kwargs.values())):
        return None  # a list of images is one example
    if first is not None and first.convolution and first.calls and first.calls[0].count == 1:
        # It saw one image: of a batch of one, or (c, h, w) without a batch.
        return 1 if len(x) == 1 and x.dim() != first.convolution.dims + 1 else None
    return len(x)


def inspect_for_plan(model: nn.Module, inputs: Inputs) -> tuple[Plan, tuple[Layer, ...]]:
    """Return what a plan says of the model whatever becomes of its layers; and these."""
    layers, macs = inspect_model(model, inputs)
    counted = sum(layer.weight_numel for layer in layers)
    examples = batch_of(inputs, layers) or 1
    plan = Plan(
        (),
        other_parameters=sum(p.numel() for p in model.parameters()) - counted,
        examples=examples,
        inputs=inputs.arguments,
        keywords=tuple(inputs.kwargs) if inputs.arguments else (),
        network_macs=None if macs is None else macs // examples,
    )
    return plan, layers
