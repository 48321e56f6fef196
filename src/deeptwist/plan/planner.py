"""Decide for every layer of a model how it is held."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from deeptwist.decompositions import CannotDecomposeError, Decomposition, FactoredLayer
from deeptwist.decompositions.linalg import relative_error
from deeptwist.decompositions.ranks import check_ratio
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.inspect.layers import Inspection, Layer, inspect_model
from deeptwist.inspect.modes import as_tuple
from deeptwist.inspect.weights import read_weight
from deeptwist.layers.geometry import ConvGeometry, weight_to_kernel
from deeptwist.layers.moments import SecondMoment
from deeptwist.plan.allocation import Candidate, allocate
from deeptwist.plan.autotune import choose_by_clock, keep
from deeptwist.plan.calibration import Calibration, relative_output_error, to_device
from deeptwist.plan.layer_filter import LayerFilter, Override
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer, KeptLayer, PlannedLayer

Allocation = Literal["uniform", "budget"]
_RATIOS = (1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # tried by layer


def plan(
    model: nn.Module,
    decomposition: Decomposition | Sequence[Decomposition],
    *,
    example_input: Tensor | tuple[Tensor, ...],
    ratio: float | None = None,
    macs: float | None = None,
    allocation: Allocation | None = None,
    skip_first_conv: bool = False,
    min_in_channels: int = 1,
    linear: bool = True,
    rank_multiple: int = 1,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, Override] | None = None,
    min_speedup: float | None = None,
    tune: bool = False,
    calibration: Calibration | None = None,
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
        allocation: ``"uniform"``: `ratio` for every layer, the paper's rule and the default
            beside a ratio and one decomposition alone; ``"budget"``: the ranks that lose least,
            by the sum of the layers' relative squared errors, under all budgets given.
        skip_first_conv: keep the convolution that runs first, as the paper does.
        min_in_channels: keep layers with fewer input channels S (the paper: S ≥ 128).
        linear: whether linear layers are compressed too.
        rank_multiple: ranks that a ratio sets are rounded down to a multiple of this, where they
            are that large: 16 suits AVX-512 processors (``docs/speed.md``).
        include: pattern or patterns of the layers to compress.
        exclude: pattern or patterns of the layers to keep.
        overrides: pattern → another decomposition, another ratio, or `None` to keep the layer;
            the last pattern that matches counts, before all rules above.
        min_speedup: keep layers that are not this many times as fast factored, timed here.
        tune: whether the exact forms of every layer are timed and the fastest is taken.
        calibration: what `deeptwist.calibrate` returned; `relative_error` is then the outputs',
            in every layer that it holds. Give it to `deeptwist.decompose` too.

    Returns:
        The plan; every layer that is not compressed is in it with its reason.

    Raises:
        DeepTwistError: if neither rank nor ratio is given, a pattern matches no layer, or an
            override by exact name cannot be met.
    """
    rules = LayerFilter(
        skip_first_conv,
        min_in_channels,
        linear,
        (include,) if isinstance(include, str) else tuple(include),
        (exclude,) if isinstance(exclude, str) else tuple(exclude),
        overrides or {},
    )
    inputs = as_tuple(example_input)
    inspection = inspect_model(model, inputs)
    layers = inspection.layers
    rules.check_patterns(name for layer in layers for name in layer.names)
    decompositions = (
        [decomposition] if isinstance(decomposition, Decomposition) else [*decomposition]
    )
    shares_budget = _shares_budget(allocation, ratio, macs, decompositions)
    for choice in (*(() if shares_budget else decompositions), *rules.overrides.values()):
        if isinstance(choice, Decomposition) and choice.needs_ratio and ratio is None:
            raise DeepTwistError(f"{choice} has no rank: give it one, or give a ratio")
    if ratio is not None:
        check_ratio(ratio)
    check_int("rank_multiple", rank_multiple)
    first = _first_convolution(layers)
    moments = calibration.moments if calibration else {}
    options: list[list[CompressedLayer]] = [[] for _ in layers]
    if shares_budget:
        options = [
            _options(layer, decompositions, rules, rank_multiple, moments, layer is first)
            for layer in layers
        ]
    planned = [
        ways[0]
        if ways
        else _plan_layer(
            layer,
            decompositions[0],
            ratio or macs,
            rules,
            rank_multiple,
            moments.get(layer.names[0]),
            is_first=layer is first,
        )
        for layer, ways in zip(layers, options, strict=True)
    ]
    if shares_budget:
        planned = _share_budget(options, planned, (ratio, macs))
    made = _assemble(model, inputs, inspection, planned)
    return choose_by_clock(model, made, min_speedup=min_speedup, tune=tune)


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
            planned.append(
                _compress(layer, module.convolution, module.decomposition, module.implementation)
            )
    if factored:
        raise DeepTwistError(f"the dense model has no layer {min(factored)!r}")
    return _assemble(model, inputs, inspection, planned)


def _first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """Return the convolution that runs first, linear layers not counted."""
    convolutions = [layer for layer in layers if layer.convolution and layer.convolution.dims]
    return min(convolutions, key=lambda layer: layer.call_order, default=None)


def _assemble(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    inspection: Inspection,
    planned: Sequence[PlannedLayer],
) -> Plan:
    layers = inspection.layers
    counted = sum(layer.weight_numel for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    first = _first_convolution(layers)
    # A first convolution that sees one image of (c, h, w) was given no batch, as was one vector.
    batched = inputs[0].dim() > 1 and (first is None or not first.calls or first.calls[0].count > 1)
    empty = Plan(
        compressed=(),
        other_parameters=total - counted,
        examples=inputs[0].shape[0] if batched else 1,
        inputs=tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs),
        network_macs=inspection.macs,
    )
    return empty.with_layers(planned)


def _plan_layer(
    layer: Layer,
    decomposition: Decomposition,
    ratio: float | None,
    rules: LayerFilter,
    rank_multiple: int,
    moment: SecondMoment | None,
    *,
    is_first: bool,
) -> PlannedLayer:
    pattern, choice = rules.override(layer.names) or (None, decomposition)
    if choice is None:
        return _keep(layer, "by an override")
    if isinstance(choice, Decomposition):
        decomposition = choice
    else:
        ratio, decomposition = check_ratio(choice), decomposition.without_rank()
    reason = layer.reason
    if layer.convolution is None:
        reason = reason or "has no geometry"
    elif reason is None and pattern is None:
        reason = rules.skip_reason(layer.names, layer.convolution, is_first=is_first)
    if layer.convolution is not None and reason is None:
        try:
            resolved = decomposition.resolve(layer.convolution, ratio)
            if decomposition.needs_ratio:
                resolved = resolved.round_ranks(rank_multiple)
            planned = _compress(layer, layer.convolution, resolved)
            _check_is_smaller(planned)
            return replace(planned, relative_error=_initial_error(layer, planned, moment))
        except CannotDecomposeError as error:
            reason = str(error)
    kept = _keep(layer, reason or "")
    if pattern in layer.names:  # asked for by its exact name: to keep it would be no answer
        raise DeepTwistError(f"layer {kept.name!r} ({kept.convolution or kept.kind}) {kept.reason}")
    return kept


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
    implementation: str | None = None,
) -> CompressedLayer:
    name, *aliases = layer.names
    return CompressedLayer(
        name=name,
        kind=type(layer.module).__name__,
        convolution=convolution,
        decomposition=decomposition,
        aliases=tuple(aliases),
        calls=layer.calls,
        implementation=implementation,
    )


def _check_is_smaller(layer: CompressedLayer) -> None:
    if layer.compressed_numel >= layer.weight_numel:
        raise CannotDecomposeError(
            f"would grow: {layer.compressed_numel:,} weights for {layer.weight_numel:,}"
        )
    before, after = (
        sum(count * conv.macs(size) for conv, size, count in layer.workload(factored=factored))
        for factored in (False, True)
    )
    if after >= before:
        raise CannotDecomposeError(f"would slow down: {after:,} MACs for {before:,}")


def _initial_error(
    layer: Layer, planned: CompressedLayer, moment: SecondMoment | None
) -> float | None:
    weight = read_weight(layer.module)
    if weight.is_meta:
        return None
    kernel = weight_to_kernel(weight, planned.convolution)
    if not kernel.isfinite().all():
        raise DeepTwistError(f"layer {planned.name!r} has weights that are NaN or infinite")
    moment = to_device(moment, kernel)
    approximation = planned.decomposition.decompose(kernel, second_moment=moment).reconstruct()
    if moment is not None:
        return relative_output_error(kernel, approximation, moment)
    return relative_error(kernel, approximation)


def _shares_budget(
    allocation: str | None,
    ratio: float | None,
    macs: float | None,
    decompositions: Sequence[Decomposition],
) -> bool:
    """Whether ranks come from budgets of all layers together."""
    if not decompositions:
        raise DeepTwistError("there is no decomposition to plan with: give at least one")
    if allocation not in (None, "uniform", "budget"):
        raise unknown_name_error("allocation", allocation, ("uniform", "budget"))
    if macs is not None:
        check_ratio(macs)
    needs_budget = macs is not None or len(decompositions) > 1
    if allocation == "uniform" and needs_budget:
        raise DeepTwistError("a uniform allocation takes a ratio and one decomposition alone")
    if not needs_budget and allocation != "budget":
        return False
    if ratio is None and macs is None:
        raise DeepTwistError("there is no budget to share: give ratio, macs or both")
    for decomposition in decompositions:
        if not decomposition.needs_ratio:
            raise DeepTwistError(f"{decomposition} has a rank: leave it to the budget")
    return True


def _options(
    layer: Layer,
    decompositions: Sequence[Decomposition],
    rules: LayerFilter,
    rank_multiple: int,
    moments: Mapping[str, SecondMoment],
    is_first: bool,
) -> list[CompressedLayer]:
    """Return the ways to compress a layer that takes part in a budget, with their errors."""
    if layer.reason is not None or layer.convolution is None or rules.override(layer.names):
        return []
    if rules.skip_reason(layer.names, layer.convolution, is_first=is_first) is not None:
        return []
    options: dict[Decomposition, CompressedLayer] = {}
    for decomposition in decompositions:
        for ratio in _RATIOS:
            try:
                resolved = decomposition.resolve(layer.convolution, ratio)
                planned = _compress(layer, layer.convolution, resolved.round_ranks(rank_multiple))
                if planned.decomposition in options:
                    continue
                _check_is_smaller(planned)
            except CannotDecomposeError:
                continue
            error = _initial_error(layer, planned, moments.get(layer.names[0]))
            if error is None:
                raise DeepTwistError("a budget is shared by errors: load weights, not on meta")
            options[planned.decomposition] = replace(planned, relative_error=error)
    return list(options.values())


def _share_budget(
    options: Sequence[Sequence[CompressedLayer]],
    planned: Sequence[PlannedLayer],
    ratios: tuple[float | None, float | None],
) -> list[PlannedLayer]:
    """Return the planned layers with those that have options at the ranks that lose least.

    Args:
        options: for every layer, the ways to compress it; none where it takes no part.
        planned: for every layer, what is planned where it has no options.
        ratios: dense ÷ factored weights and MACs of the layers that take part, together.
    """
    taking_part = [index for index, ways in enumerate(options) if ways]
    dense = [_costs(options[index][0], factored=False) for index in taking_part]
    kinds = [kind for kind, ratio in enumerate(ratios) if ratio is not None]
    budgets = [sum(costs[k] for costs in dense) / (ratios[k] or 1) for k in kinds]
    candidates = []
    for index, costs in zip(taking_part, dense, strict=True):
        row = [Candidate(tuple(costs[k] for k in kinds), 0.0)]
        for way in options[index]:
            way_costs = _costs(way, factored=True)
            error = (way.relative_error or 0.0) ** 2
            row.append(Candidate(tuple(way_costs[k] for k in kinds), error))
        candidates.append(row)
    shared = list(planned)
    for index, choice in zip(taking_part, allocate(candidates, budgets), strict=True):
        ways, reason = options[index], "not worth it: the budget is met without"
        shared[index] = ways[choice - 1] if choice else keep(ways[0], reason)
    return shared


def _costs(layer: CompressedLayer, *, factored: bool) -> tuple[int, int]:
    """Return a layer's weights and MACs."""
    macs = sum(n * conv.macs(size) for conv, size, n in layer.workload(factored=factored))
    return (layer.compressed_numel if factored else layer.weight_numel), macs
