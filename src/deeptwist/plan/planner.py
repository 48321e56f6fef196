"""Decide for every layer of a model how it is held."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from deeptwist.decompositions import CannotDecomposeError, Decomposition, FactoredLayer
from deeptwist.decompositions.ranks import check_ratio
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.inspection.run import as_tuple
from deeptwist.inspection.usage import Inspection, Layer, inspect_model
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.latency import LatencyCache, LatencySetting
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.measure.runtimes import Runtime
from deeptwist.plan.autotune import exclude_slow_layers
from deeptwist.plan.budget import Budgets, Way, layer_costs, layer_ways, share_budgets
from deeptwist.plan.calibration import Calibration
from deeptwist.plan.layer_errors import LayerErrors
from deeptwist.plan.layer_filter import LayerFilter, Override
from deeptwist.plan.network_clock import meet_milliseconds, time_network
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer, KeptLayer, PlannedLayer

Allocation = Literal["uniform", "budget"]


def plan(
    model: nn.Module,
    decomposition: Decomposition | Sequence[Decomposition],
    *,
    example_input: Tensor | tuple[Tensor, ...],
    ratio: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    allocation: Allocation | None = None,
    skip_first_conv: bool = False,
    min_in_channels: int = 1,
    linear: bool = True,
    rank_multiple: int | None = None,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, Override] | None = None,
    min_speedup: float | None = None,
    calibration: Calibration | None = None,
    latency_batch: int = 16,
    latency_runtime: Runtime = "eager",
    latency_threads: int | None = None,
) -> Plan:
    """Decide for every layer how it is held; the model itself is not touched.

    A name pattern is an exact module name, a glob (``layer3.*``) or, after ``re:``, a regular
    expression that matches the whole name.

    Args:
        model: any network; it is run once on the example input, in evaluation mode.
        decomposition: how layers are held; its rank, if open, is set by `ratio`. Of several, each
            layer takes the one that loses least for its cost.
        example_input: one batch, or the tuple of the model's positional inputs.
        ratio: dense ÷ factored weights that every compressed layer keeps at least; with a
            budget, that the layers to compress keep together.
        macs: dense ÷ factored MACs that the layers to compress keep together: a budget.
        latency: dense ÷ factored milliseconds, measured here, that the layers to compress keep
            together: a budget.
        latency_ms: milliseconds that the whole network takes at most, measured here: a budget.
        allocation: ``"uniform"``: `ratio` for every layer, the paper's rule and the default
            beside a ratio and one decomposition alone; ``"budget"``: the ranks that lose least,
            by the sum of the layers' relative squared errors, under all budgets given.
        skip_first_conv: keep the convolution that runs first, as the paper does.
        min_in_channels: keep layers with fewer input channels S (the paper: S ≥ 128).
        linear: whether linear layers are compressed too.
        rank_multiple: ranks that a ratio or a budget sets are rounded down to a multiple of this,
            where they are that large; by default 1, or with a budget of milliseconds the width of
            the processor's vectors, where the clock shows it.
        include: pattern or patterns of the layers to compress.
        exclude: pattern or patterns of the layers to keep.
        overrides: pattern → another decomposition, another ratio, or `None` to keep the layer;
            the last pattern that matches counts, before all rules above.
        min_speedup: keep layers that are not this many times as fast factored, timed here.
        calibration: what `deeptwist.calibrate` returned; `relative_error` is then the outputs',
            in every layer that it holds. Give it to `deeptwist.decompose` too.
        latency_batch: examples in the batch that milliseconds are measured at.
        latency_runtime: what runs the network then: eager, compile or onnxruntime.
        latency_threads: of the processor; those that PyTorch has without it.

    Returns:
        The plan; every layer that is not compressed is in it with its reason.

    Raises:
        DeepTwistError: if neither rank nor ratio is given, a pattern matches no layer, or an
            override by exact name cannot be met.
    """
    if latency is not None and latency_ms is not None:
        raise DeepTwistError("latency and latency_ms are one budget: leave one of them out")
    rules = LayerFilter(
        skip_first_conv,
        min_in_channels,
        linear,
        (include,) if isinstance(include, str) else tuple(include),
        (exclude,) if isinstance(exclude, str) else tuple(exclude),
        overrides or {},
    )
    methods = (decomposition,) if isinstance(decomposition, Decomposition) else (*decomposition,)
    planner = Planner(model, example_input, methods, rules, rank_multiple, calibration)
    clock = None
    if latency is not None or latency_ms is not None:
        clock = planner.clock(LatencySetting(latency_batch, latency_runtime, latency_threads))

    def attempt(latency: float | None) -> Plan:
        made = planner.plan(Budgets(ratio, macs, latency), allocation, clock)
        if min_speedup is not None:
            made = exclude_slow_layers(model, made, min_speedup)
        if clock is None:
            return made
        promise = time_network(model, as_tuple(example_input), made, clock.setting)
        return replace(made, latency=promise)

    if latency_ms is None:
        return attempt(latency)
    return meet_milliseconds(latency_ms, attempt)


class Planner:
    """A model, inspected, and the rules that it is planned by; budgets come and go."""

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        decompositions: Sequence[Decomposition],
        rules: LayerFilter,
        rank_multiple: int | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Inspect the model; see `plan` for the arguments."""
        if not decompositions:
            raise DeepTwistError("there is no decomposition to plan with: give at least one")
        if rank_multiple is not None:
            check_int("rank_multiple", rank_multiple)
        self._model, self._inputs = model, as_tuple(example_input)
        self._inspection = inspect_model(model, self._inputs)
        layers = self._inspection.layers
        rules.check_patterns(name for layer in layers for name in layer.names)
        self._decompositions, self._rules = decompositions, rules
        self._rank_multiple = rank_multiple
        self._first = _first_convolution(layers)
        moments = calibration.moments if calibration else {}
        self._errors = [LayerErrors(layer, moments.get(layer.names[0])) for layer in layers]

    def clock(self, setting: LatencySetting) -> LayerClock:
        """Return what times the model's layers, and remembers what was timed before."""
        with setting.applied():
            cache = LatencyCache(setting.runtime)
        return LayerClock(
            next(self._model.parameters()),
            examples=_count_examples(self._inputs, self._inspection.layers),
            setting=setting,
            cache=cache,
        )

    def plan(
        self,
        budgets: Budgets,
        allocation: Allocation | None = None,
        clock: LayerClock | None = None,
    ) -> Plan:
        """Return the plan that keeps these budgets; see `deeptwist.plan`.

        Args:
            budgets: of the layers to compress together.
            allocation: see `deeptwist.plan`.
            clock: for a budget of milliseconds.
        """
        shares = self._shares_budgets(budgets, allocation)
        for choice in (*(() if shares else self._decompositions), *self._rules.overrides.values()):
            if isinstance(choice, Decomposition) and choice.needs_ratio and budgets.ratio is None:
                raise DeepTwistError(f"{choice} has no rank: give it one, or give a ratio")
        multiple = self._rank_multiple or (1 if clock is None else self._timed_multiple(clock))
        ways = [self._ways(errors, multiple, clock) if shares else [] for errors in self._errors]
        shared = iter(share_budgets(filter(None, ways), budgets) if shares else ())
        planned = [
            _plan_shared(errors.layer, next(shared))
            if options
            else self._plan_layer(errors, budgets.any_factor)
            for errors, options in zip(self._errors, ways, strict=True)
        ]
        return _assemble(self._model, self._inputs, self._inspection, planned)

    def _shares_budgets(self, budgets: Budgets, allocation: str | None) -> bool:
        """Whether ranks come from budgets of all layers together."""
        if allocation not in (None, "uniform", "budget"):
            raise unknown_name_error("allocation", allocation, ("uniform", "budget"))
        needs_budget = budgets != Budgets(budgets.ratio) or len(self._decompositions) > 1
        if allocation == "uniform" and needs_budget:
            raise DeepTwistError("a uniform allocation takes a ratio and one decomposition alone")
        if not needs_budget and allocation != "budget":
            return False
        if budgets.any_factor is None:
            raise DeepTwistError("there is no budget to share: give ratio, macs or latency")
        for decomposition in self._decompositions:
            if not decomposition.needs_ratio:
                raise DeepTwistError(f"{decomposition} has a rank: leave it to the budget")
        return True

    def _skip_reason(self, layer: Layer) -> str | None:
        """Return why a layer is kept, whatever an override says aside."""
        if layer.convolution is None:
            return layer.reason or "has no geometry"
        if layer.reason is not None or self._rules.override(layer.names) is not None:
            return layer.reason
        is_first = layer is self._first
        return self._rules.skip_reason(layer.names, layer.convolution, is_first=is_first)

    def _shares(self, layer: Layer) -> bool:
        """Return whether a layer takes part in a budget."""
        is_bound = self._rules.override(layer.names) or self._skip_reason(layer)
        return not is_bound and layer.convolution is not None

    def _timed_multiple(self, clock: LayerClock) -> int:
        """Return the multiple of ranks that the clock shows, at the layer with most work."""
        layers = [errors.layer for errors in self._errors if self._shares(errors.layer)]
        uses = [(x.convolution, call) for x in layers if x.convolution for call in x.calls]
        if not uses:
            return 1
        convolution, call = max(uses, key=lambda use: use[1].count * use[0].macs(use[1].size))
        return clock.rank_multiple(convolution, call, self._decompositions[0])

    def _ways(self, errors: LayerErrors, multiple: int, clock: LayerClock | None) -> list[Way]:
        """Return the ways to hold a layer that takes part in a budget; none for another."""
        convolution = errors.layer.convolution
        if convolution is None or not self._shares(errors.layer):
            return []
        return layer_ways(errors, convolution, self._decompositions, multiple, clock)

    def _plan_layer(self, errors: LayerErrors, ratio: float | None) -> PlannedLayer:
        """Plan a layer by itself: at a ratio, or as an override says."""
        layer, decomposition = errors.layer, self._decompositions[0]
        pattern, choice = self._rules.override(layer.names) or (None, decomposition)
        if choice is None:
            return _keep(layer, "by an override")
        if isinstance(choice, Decomposition):
            decomposition = choice
        else:
            ratio, decomposition = check_ratio(choice), decomposition.without_rank()
        reason = self._skip_reason(layer)
        if layer.convolution is not None and reason is None:
            try:
                resolved = decomposition.resolve(layer.convolution, ratio)
                if decomposition.needs_ratio:
                    resolved = resolved.round_ranks(self._rank_multiple or 1)
                _check_is_smaller(layer.convolution, layer.calls, resolved)
                error = errors.error(layer.convolution, resolved)
                return _compress(layer, layer.convolution, resolved, error=error)
            except CannotDecomposeError as error:
                reason = str(error)
        kept = _keep(layer, reason or "")
        if pattern in layer.names:  # asked for by its exact name: to keep it would be no answer
            shown = kept.convolution or kept.kind
            raise DeepTwistError(f"layer {kept.name!r} ({shown}) {kept.reason}")
        return kept


def plan_from_model(
    decomposed: nn.Module, model: nn.Module, example_input: Tensor | tuple[Tensor, ...]
) -> Plan:
    """Return the plan that a decomposed model carries out, read from its factored layers.

    Args:
        decomposed: what `decompose` or `deeptwist.load` returned; `model` itself for a plan that
            compresses nothing but says what the model costs.
        model: the dense network.
        example_input: see `plan`.

    Raises:
        DeepTwistError: if a factored layer has no counterpart in `model`.
    """
    factored = {
        name: module
        for name, module in decomposed.named_modules()
        if isinstance(module, FactoredLayer)
    }
    inputs = as_tuple(example_input)
    inspection = inspect_model(model, inputs)
    layers = inspection.layers
    planned: list[PlannedLayer] = []
    for layer in layers:
        module = factored.pop(layer.names[0], None)
        if module is None:
            planned.append(_keep(layer, layer.reason or "is dense in the decomposed model"))
        elif module.convolution != layer.convolution:
            raise DeepTwistError(
                f"layer {layer.names[0]!r} stands for ({module.convolution}) where the dense "
                f"model has ({layer.convolution})"
            )
        else:
            planned.append(_compress(layer, module.convolution, module.decomposition))
    if factored:
        raise DeepTwistError(f"the dense model has no layer {min(factored)!r}")
    return _assemble(model, inputs, inspection, planned)


def _first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """Return the convolution that runs first, linear layers not counted."""
    convolutions = [layer for layer in layers if layer.convolution and layer.convolution.dims]
    return min(convolutions, key=lambda layer: layer.call_order, default=None)


def _count_examples(inputs: tuple[Tensor, ...], layers: Sequence[Layer]) -> int:
    """Return how many examples the inputs hold: one where they have no batch in front."""
    first = _first_convolution(layers)
    # A first convolution that sees one image of (c, h, w) was given no batch, as was one vector.
    batched = inputs[0].dim() > 1 and (first is None or not first.calls or first.calls[0].count > 1)
    return inputs[0].shape[0] if batched else 1


def _assemble(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    inspection: Inspection,
    planned: Sequence[PlannedLayer],
) -> Plan:
    layers = inspection.layers
    counted = sum(layer.weight_numel for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    empty = Plan(
        compressed=(),
        other_parameters=total - counted,
        examples=_count_examples(inputs, layers),
        inputs=tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs),
        network_macs=inspection.macs,
    )
    return empty.with_layers(planned)


def _keep(layer: Layer, reason: str) -> KeptLayer:
    name, *aliases = layer.names
    return KeptLayer(
        name=name,
        kind=type(layer.module).__name__,
        weight_numel=layer.weight_numel,
        reason=reason,
        convolution=layer.convolution,
        aliases=tuple(aliases),
        calls=layer.calls,
    )


def _compress(
    layer: Layer,
    convolution: ConvGeometry,
    decomposition: Decomposition,
    error: float | None = None,
) -> CompressedLayer:
    name, *aliases = layer.names
    return CompressedLayer(
        name=name,
        kind=type(layer.module).__name__,
        convolution=convolution,
        decomposition=decomposition,
        aliases=tuple(aliases),
        calls=layer.calls,
        relative_error=error,
    )


def _plan_shared(layer: Layer, way: Way) -> PlannedLayer:
    """Return a layer in the way that a budget chose."""
    if way.decomposition is None or layer.convolution is None:
        return _keep(layer, "not worth it: the budget is met without")
    return _compress(layer, layer.convolution, way.decomposition, error=way.error)


def _check_is_smaller(
    convolution: ConvGeometry, calls: tuple[LayerCall, ...], decomposition: Decomposition
) -> None:
    before, after = (layer_costs(convolution, calls, form) for form in (None, decomposition))
    if after[0] >= before[0]:
        raise CannotDecomposeError(f"would grow: {after[0]:,} weights for {before[0]:,}")
    if after[1] >= before[1]:
        raise CannotDecomposeError(f"would slow down: {after[1]:,} MACs for {before[1]:,}")
