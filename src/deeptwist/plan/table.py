"""A plan as a text table."""

from collections.abc import Sequence

from deeptwist.plan.planned_layer import KeptLayer, PlannedLayer

Row = tuple[str, ...]
_HEADER: Row = (
    "layer",
    "shape",
    "lowered",
    "decomposition",
    "rank",
    "weights",
    "MACs",
    "relative error",
)


def layer_row(layer: PlannedLayer, dense_macs: int, macs: int) -> Row:
    """Return the cells of one layer: its shape, its decomposition, and its costs before → after."""
    geometry = str(layer.convolution) if layer.convolution else layer.kind
    if isinstance(layer, KeptLayer):
        costs = f"{layer.weight_numel:,}", f"{dense_macs:,}"
        return (layer.name, geometry, "", "", "", *costs, f"kept: {layer.reason}")
    lowered = layer.decomposition.lowered_shape(layer.convolution)
    tile, rank = (getattr(layer.decomposition, name, None) for name in ("tile", "rank"))
    return (
        layer.name,
        geometry,
        "" if lowered is None else "×".join(map(str, lowered)),
        layer.decomposition.method + (f" {tile[0]}×{tile[1]}" if tile else ""),
        "×".join(map(str, rank)) if isinstance(rank, tuple) else str(rank),
        f"{layer.weight_numel:,} → {layer.compressed_numel:,}",
        f"{dense_macs:,} → {macs:,}",
        "" if layer.relative_error is None else f"{layer.relative_error:.3f}",
    )


def total_row(
    parameters: tuple[int, int], macs: tuple[int, int], network_speedup: float | None
) -> Row:
    """Return the cells of the whole model, of (dense, decomposed) counts."""
    fewer = f"{macs[0] / max(1, macs[1]):.2f}× fewer MACs"
    if network_speedup is not None:
        fewer += f" in layers, {network_speedup:.2f}× in the whole network"
    return (
        "all parameters",
        *[""] * 4,
        f"{parameters[0]:,} → {parameters[1]:,}",
        f"{macs[0]:,} → {macs[1]:,}",
        f"{parameters[0] / parameters[1]:.2f}× smaller, {fewer}",
    )


def format_table(rows: Sequence[Row], total: Row, notes: Sequence[str] = ()) -> str:
    """Align the cells in columns; below a rule come the notes and the total."""
    lines = [_HEADER, *rows, total]
    # The last column holds reasons, whose length must not push the others apart.
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER) - 1)]
    header, *body, last = ("  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines)
    rule = "─" * len(header)
    return "\n".join([header, rule, *body, rule, *notes, last])


def kept_lines(kept: Sequence[KeptLayer], parameters: int) -> list[str]:
    """Return a line for every reason, of how many layers and parameters it keeps dense."""
    reasons: dict[str, list[KeptLayer]] = {}
    for layer in kept:
        reasons.setdefault(layer.reason.partition(":")[0], []).append(layer)
    lines = []
    for reason, layers in reasons.items():
        count = sum(layer.weight_numel for layer in layers)
        lines.append(
            f"kept, {len(layers)} layers, {count:,} parameters ({count / parameters:.1%}): {reason}"
        )
    return lines
