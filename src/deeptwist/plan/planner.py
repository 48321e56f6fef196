"""Decide for every layer of a model how it is held."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from deeptwist.decompositions import CannotDecomposeError, Decomposition, FactoredLayer, find_method
from deeptwist.errors import DeepTwistError, check_int, check_ratio
from deeptwist.inspection.run import as_tuple
from deeptwist.inspection.usage import Inspection, Layer, inspect_model
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.latency import Latency, LatencyCache, LatencySetting
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.plan.budget import Budgets, Way, layer_costs, layer_ways, share_budgets
from deeptwist.plan.calibration import Calibration
from deeptwist.plan.layer_errors import LayerErrors
from deeptwist.plan.layers import Layers
from deeptwist.plan.network_clock import search_latency, time_network
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer, KeptLayer, PlannedLayer

LayerChoice = Layers | Callable[[str, nn.Module], bool]
_LAYERS = Layers()


def plan(
    model: nn.Module,
    decomposition: Decomposition | str | Sequence[Decomposition | str],
    *,
    example_input: Tensor | tuple[Tensor, ...],
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
        example_input: one batch, or the tuple of the model's positional inputs.
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
    methods = [find_method(m)() if isinstance(m, str) else m for m in decomposition]
    planner = Planner(model, example_input, methods, layers, rank_multiple, calibration)
    if latency is None:
        return planner.plan(ratio, Budgets(weights, macs))
    if not isinstance(latency, Latency):
        latency = Latency(speedup=latency)
    clock = planner.clock(latency.setting)

    def attempt(speedup: float) -> Plan:
        made = planner.plan(ratio, Budgets(weights, macs, speedup), clock)
        times = time_network(model, as_tuple(example_input), made, clock.setting)
        return replace(made, latency=times)

    return search_latency(latency, attempt)


class Planner:
    """A model, inspected, and the rules that it is planned by; budgets come and go."""

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        decompositions: Sequence[Decomposition],
        layers: LayerChoice = _LAYERS,
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
        found = self._inspection.layers
        self._chosen = None if isinstance(layers, Layers) else layers
        self._rules = layers if isinstance(layers, Layers) else Layers(False, linear=True)
        self._rules.check_patterns(name for layer in found for name in layer.names)
        self._decompositions = decompositions
        self._rank_multiple = rank_multiple
        self._first = _first_convolution(found)
        moments = calibration.moments if calibration else {}
        self._errors = [LayerErrors(layer, moments.get(layer.names[0])) for layer in found]

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

    def plan(self, ratio: float | None, budgets: Budgets, clock: LayerClock | None = None) -> Plan:
        """Return the plan at this ratio, or that keeps these budgets.

        Args:
            ratio: see `deeptwist.plan`.
            budgets: of the layers to compress together.
            clock: for a budget of milliseconds.
        """
        shares = budgets != Budgets()
        self._check_ranks(ratio, budgets)
        multiple = self._rank_multiple or (1 if clock is None else self._timed_multiple(clock))
        ways = [self._ways(errors, multiple, clock) if shares else [] for errors in self._errors]
        shared = iter(share_budgets(filter(None, ways), budgets) if shares else ())
        planned = [
            _plan_shared(errors.layer, next(shared))
            if options
            else self._plan_layer(errors, ratio or budgets.any_factor)
            for errors, options in zip(self._errors, ways, strict=True)
        ]
        return _assemble(self._model, self._inputs, self._inspection, planned)

    def _check_ranks(self, ratio: float | None, budgets: Budgets) -> None:
        """Check that every decomposition has a rank, or one thing alone that sets it."""
        shares = budgets != Budgets()
        if ratio is not None:
            check_ratio(ratio)
            if shares:
                raise DeepTwistError("a ratio is every layer's: weights= is that of all together")
        for decomposition in self._decompositions if shares else ():
            if not decomposition.needs_ratio:
                raise DeepTwistError(f"{decomposition} has a rank: leave it to the budget")
        if ratio is not None or budgets.weights is not None:
            return
        for choice in (*(() if shares else self._decompositions), *self._rules.overrides.values()):
            if isinstance(choice, Decomposition) and choice.needs_ratio:
                raise DeepTwistError(
                    f"{choice} has no rank: give it one, or give ratio, weights, macs or latency"
                )

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
        layer, decompositions = errors.layer, self._decompositions
        pattern, choice = self._rules.override(layer.names) or (None, decompositions)
        if choice is None:
            return _keep(layer, "by an override")
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
        kept = _keep(layer, reason or "")
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
                error = errors.error(convolution, resolved)
                fitting.append(_compress(errors.layer, convolution, resolved, error=error))
            except CannotDecomposeError as refusal:
                refusals.append(refusal)
        if not fitting:
            raise refusals[0]
        if len(fitting) > 1 and any(layer.relative_error is None for layer in fitting):
            raise DeepTwistError("which decomposition loses least is seen from weights: load them")
        return min(fitting, key=lambda layer: layer.relative_error or 0.0)


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
    examples = _count_examples(inputs, layers)
    counted = sum(layer.weight_numel for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    empty = Plan(
        compressed=(),
        other_parameters=total - counted,
        examples=examples,
        inputs=tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs),
        network_macs=None if inspection.macs is None else inspection.macs // examples,
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
