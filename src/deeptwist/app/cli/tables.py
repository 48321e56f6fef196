"""Tables of measurements, runs and jobs, and the line that tells each of a job's steps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeptwist.app.cli.console import print_table

if TYPE_CHECKING:
    from deeptwist.app.cli.sweep import SweepPoint
    from deeptwist.app.training.metrics import Values
    from deeptwist.export import Exported
    from deeptwist.measure.compare import Comparison
    from deeptwist.plan.plan import Plan


def plan_counts(plan: "Plan") -> dict[str, int]:
    """Return what a network costs by a plan, before and after, as plain values."""
    parameters = {"parameters_before": plan.dense_parameters, "parameters": plan.parameters}
    return {**parameters, "macs_before": plan.dense_macs, "macs": plan.macs}


def layer_rows(plan: "Plan", times: "Mapping[str, Comparison]") -> list[dict[str, Any]]:
    """Return what each layer that was timed by itself promises and keeps, as plain values.

    Returns:
        A row a layer: its name, `macs_ratio` (dense ÷ factored: the speed-up that the count
        promises), its times and `efficiency`, the share of the promise that is kept.
    """
    from deeptwist.plan.latency import most_expensive_call

    rows = []
    for layer in plan.compressed:
        if layer.name in times:
            size, measured = most_expensive_call(layer).size, times[layer.name]
            ratio = layer.convolution.macs(size) / layer.decomposition.macs(layer.convolution, size)
            values = {"macs_ratio": ratio, "efficiency": measured.speedup / ratio}
            rows.append({"name": layer.name, "times": asdict(measured), **values})
    return rows


def print_layers(layers: Sequence[dict[str, Any]]) -> None:
    """Print what `layer_rows` returned; nothing where no layer was timed by itself."""
    if not layers:
        return
    header = ["layer", "dense ms", "factored ms", "MAC ratio", "speed-up", "efficiency", ""]
    rows = [
        [
            layer["name"],
            f"{layer['times']['dense']['median']:.2f}",
            f"{layer['times']['decomposed']['median']:.2f}",
            f"{layer['macs_ratio']:.2f}",
            f"{layer['times']['speedup']:.2f}×",
            f"{layer['efficiency']:.2f}",
            "" if layer["times"]["speedup"] > 1 else "not worth it",
        ]
        for layer in layers
    ]
    print_table("each layer by itself", header, rows)
    print()


def print_networks(name: str, settings: Sequence[dict[str, Any]], macs_ratio: float) -> None:
    """Print one row for each setting that the whole network was timed in, see `Job.time`."""
    header = ["setting", "dense ms", "decomposed ms", "quartiles", "speed-up", "efficiency", ""]
    rows = []
    for row in settings:
        label = "{runtime}, {dtype}, {threads} threads, batch {batch}".format(**row)
        if row["times"] is None:
            rows.append([label, "", "", "", "", "", row["reason"]])
            continue
        small, speedup = row["times"]["decomposed"], row["times"]["speedup"]
        rows.append(
            [
                label,
                f"{row['times']['dense']['median']:.2f}",
                f"{small['median']:.2f}",
                f"{small['lower']:.2f} – {small['upper']:.2f}",
                f"{speedup:.2f}×",
                f"{speedup / macs_ratio:.2f}",
                "" if speedup > 1 else "not worth it",
            ]
        )
    print_table(f"{name}, {macs_ratio:.2f}× fewer MACs", header, rows)


def print_compressed(title: str, result: dict[str, Any]) -> None:
    """Print what `deeptwist compress` came to: its files, and a table of before and after."""
    from deeptwist.compress import count_row, size_rows

    results = result["results"]
    print(f"small network: {results['verify']['path']}\nreport: {results['report']['path']}\n")
    dense, small = results["dense"], results["verify"]
    rows = [_accuracy_row("accuracy", dense, small), *size_rows(results["plan"])]
    for row in results["time"]["settings"]:
        label = f"ms, {row['runtime']}, batch {row['batch']}"
        rows.append(
            _time_row(label, row["times"]) if row["times"] else [label, "", "", row["reason"]]
        )
    if "export" in results:
        export = results["export"]
        rows.append(count_row("bytes, ONNX", export["dense"], export["small"]))
    if "int8" in results:
        int8 = results["int8"]
        rows += [
            _accuracy_row("int8: accuracy", int8["dense"], int8["small"]),
            _time_row(f"int8: ms, onnxruntime, batch {int8['batch']}", int8["times"]),
            count_row("int8: bytes, ONNX", int8["dense"]["bytes"], int8["small"]["bytes"]),
        ]
    if "goal" in result:
        is_kept = small["accuracy"] >= result["goal"]
        rows.append(["goal", "", f"{result['goal']:.2%}", "met" if is_kept else "not met"])
    print_table(title, ["", "dense", "small", ""], rows)


def _accuracy_row(label: str, dense: dict[str, Any], small: dict[str, Any]) -> list[str]:
    before, after = dense["accuracy"], small["accuracy"]
    change = f"{100 * (after - before):+.2f} points".replace("-", "−")
    return [label, f"{before:.2%}", f"{after:.2%}", change]


def _time_row(label: str, times: dict[str, Any]) -> list[str]:
    medians = [f"{times[side]['median']:.2f}" for side in ("dense", "decomposed")]
    return [label, *medians, f"{times['speedup']:.2f}× as fast"]


def print_exported(path: Path, format: str, written: "Exported") -> None:
    """Print what was written, and how exact it is."""
    version = "" if written.opset is None else f" (opset {written.opset})"
    print(f"{path}: {format}{version}, {written.bytes:,} bytes")
    if written.worst_difference is not None:
        batches = ", ".join(map(str, written.batches))
        sizes = ", ".join("×".join(map(str, size)) for size in written.sizes)
        print(
            f"outputs differ from PyTorch's by {written.worst_difference:.1e} at most, "
            f"at batches {batches}" + (f" and sizes {sizes}" if sizes else "")
        )


def print_sweep(
    title: str, points: "Sequence[SweepPoint]", knee: int, dense_accuracy: float | None
) -> None:
    """Print a row for each ratio, and which of them is the knee."""
    header = ["ratio", "relative error", "fewer weights", "fewer MACs", "accuracy, untrained", ""]
    rows = [
        [
            f"{point.ratio:g}×",
            f"{point.error:.3f}",
            f"{point.weights:.2f}×",
            f"{point.macs:.2f}×",
            "" if point.accuracy is None else f"{point.accuracy:.2%}",
            "knee" * (index == knee),
        ]
        for index, point in enumerate(points)
    ]
    if dense_accuracy is not None:
        rows.insert(0, ["dense", "", "", "", f"{dense_accuracy:.2%}", ""])
    print_table(title, header, rows)


def _latency_cells(times: "Values | None") -> list[str]:
    if times is None:
        return ["", ""]
    return [f"{times['decomposed']['median']:.2f} ms", f"{times['speedup']:.2f}×"]


def print_summaries(title: str, summaries: "Sequence[Values]") -> None:
    """Print one row for each run, then one for each network derived from it."""
    header = ["run", "accuracy", "untrained", "parameters", "MACs", "file", "latency", "speed-up"]
    rows = [
        [
            summary["name"],
            f"{summary['accuracy']:.2%}",
            "" if (before := summary["accuracy_untrained"]) is None else f"{before:.2%}",
            f"{summary['parameters']:,}",
            f"{summary['macs']:,}",
            f"{summary['bytes'] / 1024:,.0f} kB",
            *_latency_cells(summary["latency"]),
        ]
        for summary in summaries
    ]
    rows += [
        [f"{summary['name']}, {variant['name']}", f"{variant['accuracy']:.2%}", *[""] * 6]
        for summary in summaries
        for variant in summary["variants"]
    ]
    print_table(title, header, rows)


def describe_accuracy(accuracy: float, loss: float, **_: object) -> str:
    """Tell accuracy and loss."""
    return f"accuracy {accuracy:.2%}, loss {loss:.4f}"


def describe_search(
    least: float, kept: bool, ratio: float, tried: list[tuple[float, float]], **_: object
) -> str:
    """Tell which ratio was taken, and what others kept."""
    shown = ", ".join(f"{ratio:g}×: {accuracy:.2%}" for ratio, accuracy in sorted(tried))
    short = "" if kept else ", which costs more untrained"
    return f"{ratio:g}×{short} (at least {least:.2%}; {shown})"


def describe_plan(
    layers: int,
    dense_parameters: int,
    parameters: int,
    dense_macs: int,
    macs: int,
    promise: str | None = None,
) -> str:
    """Tell what the plan saves."""
    return (
        f"{layers} layers, {dense_parameters / parameters:.2f}× fewer weights, "
        f"{dense_macs / max(1, macs):.2f}× fewer MACs" + (f", {promise}" if promise else "")
    )


def describe_training(accuracy: float, untrained: float | None) -> str:
    """Tell accuracy before and after."""
    return f"accuracy {untrained or 0:.2%} untrained, {accuracy:.2%} at the end"


def describe_export(difference: float, dense: int, small: int) -> str:
    """Tell the sizes of both files, and how exact they are."""
    return f"{dense:,} → {small:,} bytes; outputs differ from PyTorch's by {difference:.0e} at most"


def describe_times(machine: str, settings: list[dict[str, Any]]) -> str:
    """Tell the speedup in every setting, and the machine."""
    speedups = [
        f"{row['runtime']} {row['times']['speedup']:.2f}×" if row["times"] else row["reason"]
        for row in settings
    ]
    return f"{', '.join(speedups)}, on {machine}"


def describe_int8(dense: dict[str, Any], small: dict[str, Any], **_: object) -> str:
    """Tell both accuracies."""
    return f"accuracy {dense['accuracy']:.2%} dense, {small['accuracy']:.2%} small"
