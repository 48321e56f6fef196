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


def total_row(parameters: tuple[int, int], macs: tuple[int, int]) -> Row:
    """Return the cells of the whole model, of (dense, decomposed) counts."""
    return (
        "all parameters",
        *[""] * 4,
        f"{parameters[0]:,} → {parameters[1]:,}",
        f"{macs[0]:,} → {macs[1]:,}",
        f"{parameters[0] / parameters[1]:.2f}× smaller, "
        f"{macs[0] / max(1, macs[1]):.2f}× fewer MACs",
    )


def format_table(rows: Sequence[Row], total: Row) -> str:
    """Align the cells in columns, the total below a rule."""
    lines = [_HEADER, *rows, total]
    # The last column holds reasons, whose length must not push the others apart.
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER) - 1)]
    header, *body, last = ("  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines)
    rule = "─" * len(header)
    return "\n".join([header, rule, *body, rule, last])
