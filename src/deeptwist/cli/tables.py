"""Tables of measurements and of runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deeptwist.cli.console import print_table

if TYPE_CHECKING:
    from deeptwist.benchmark.layers import LayerComparison
    from deeptwist.benchmark.networks import Measurement
    from deeptwist.training.metrics import Summary


def print_layers(layers: "Sequence[LayerComparison]") -> None:
    """Print one row for each layer that was timed by itself; nothing where none was."""
    if not layers:
        return
    header = ["layer", "dense ms", "factored ms", "MAC ratio", "speed-up", "efficiency", ""]
    rows = [
        [
            layer.name,
            f"{layer.times.dense.median:.2f}",
            f"{layer.times.decomposed.median:.2f}",
            f"{layer.macs_ratio:.2f}",
            f"{layer.times.speedup:.2f}×",
            f"{layer.efficiency:.2f}",
            "" if layer.is_worth_it else "not worth it",
        ]
        for layer in layers
    ]
    print_table("each layer by itself", header, rows)
    print()


def print_networks(name: str, measurements: "Sequence[Measurement]", macs_ratio: float) -> None:
    """Print one row for each setting that the whole network was timed in."""
    header = ["setting", "dense ms", "decomposed ms", "quartiles", "speed-up", "efficiency", ""]
    rows = []
    for measurement in measurements:
        setting, times = measurement.setting, measurement.times
        label = f"{setting.runtime}, {setting.dtype}, {setting.threads} threads, " + (
            f"batch {setting.batch}"
        )
        if times is None:
            rows.append([label, "", "", "", "", "", measurement.reason or ""])
            continue
        small = times.decomposed
        rows.append(
            [
                label,
                f"{times.dense.median:.2f}",
                f"{small.median:.2f}",
                f"{small.lower:.2f} – {small.upper:.2f}",
                f"{times.speedup:.2f}×",
                f"{times.speedup / macs_ratio:.2f}",
                "" if times.speedup > 1 else "not worth it",
            ]
        )
    print_table(f"{name}, {macs_ratio:.2f}× fewer MACs", header, rows)


def print_summaries(title: str, summaries: "Sequence[Summary]") -> None:
    """Print one row for each run, then one for each network derived from it."""
    header = ["run", "accuracy", "untrained", "parameters", "MACs", "file", "latency", "speed-up"]
    rows = [
        [
            summary.name,
            f"{summary.accuracy:.2%}",
            "" if summary.accuracy_untrained is None else f"{summary.accuracy_untrained:.2%}",
            f"{summary.parameters:,}",
            f"{summary.macs:,}",
            f"{summary.bytes / 1024:,.0f} kB",
            "" if summary.latency is None else f"{summary.latency.decomposed.median:.2f} ms",
            "" if summary.latency is None else f"{summary.latency.speedup:.2f}×",
        ]
        for summary in summaries
    ]
    rows += [
        [f"{summary.name}, {variant.name}", f"{variant.accuracy:.2%}", *[""] * 6]
        for summary in summaries
        for variant in summary.variants
    ]
    print_table(title, header, rows)
