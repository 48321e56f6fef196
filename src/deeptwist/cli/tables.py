"""The benchmark's tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deeptwist.cli.console import print_table

if TYPE_CHECKING:
    from deeptwist.benchmark.layers import LayerComparison
    from deeptwist.benchmark.networks import Measurement


def print_layers(layers: "Sequence[LayerComparison]") -> None:
    """One row for each layer that was timed by itself; nothing where none was."""
    if not layers:
        return
    header = ["layer", "dense ms", "factored ms", "MAC ratio", "speed-up", "efficiency", ""]
    rows = [
        [
            one.name,
            f"{one.times.dense.median:.2f}",
            f"{one.times.decomposed.median:.2f}",
            f"{one.macs_ratio:.2f}",
            f"{one.times.speedup:.2f}×",
            f"{one.efficiency:.2f}",
            "" if one.is_worth_it else "not worth it",
        ]
        for one in layers
    ]
    print_table("each layer by itself", header, rows)
    print()


def print_networks(name: str, networks: "Sequence[Measurement]", macs_ratio: float) -> None:
    """One row for each setting that the whole network was timed in."""
    header = ["setting", "dense ms", "decomposed ms", "quartiles", "speed-up", "efficiency", ""]
    rows = []
    for one in networks:
        setting = one.setting
        label = f"{setting.runtime}, {setting.dtype}, {setting.threads} threads, " + (
            f"batch {setting.batch}"
        )
        if one.times is None:
            rows.append([label, "", "", "", "", "", one.reason or ""])
            continue
        dense, small, speedup = one.times.dense, one.times.decomposed, one.times.speedup
        rows.append(
            [
                label,
                f"{dense.median:.2f}",
                f"{small.median:.2f}",
                f"{small.lower:.2f} – {small.upper:.2f}",
                f"{speedup:.2f}×",
                f"{speedup / macs_ratio:.2f}",
                "" if speedup > 1 else "not worth it",
            ]
        )
    print_table(f"{name}, {macs_ratio:.2f}× fewer MACs", header, rows)
