"""What a job, or a sweep, came to, as one table: on the terminal, and in its report."""

from collections.abc import Mapping
from typing import Any

Values = dict[str, Any]  # as JSON holds them
HEADER = "", "dense", "small", ""
_SWEEP = ["ratio", "relative error", "fewer weights", "fewer MACs", "accuracy, untrained", ""]


def job_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a job's rows under `HEADER`: accuracy, sizes, times, and the same in int8."""
    from deeptwist.compress import count_row, size_rows  # help must not wait for torch

    dense, small = results["dense"], results["verify"]
    change = f"{points(small['accuracy'] - dense['accuracy'])} points"
    rows = [["accuracy", percent(dense["accuracy"]), percent(small["accuracy"]), change]]
    rows += size_rows(results["plan"])
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
        accuracies = int8["dense"]["accuracy"], int8["small"]["accuracy"]
        lost = " and ".join(points(change) for change in int8_changes(results).values())
        rows += [
            ["int8: accuracy", *map(percent, accuracies), f"{lost} points from fp32"],
            _time_row(f"int8: ms, onnxruntime, batch {int8['batch']}", int8["times"]),
            count_row("int8: bytes, ONNX", int8["dense"]["bytes"], int8["small"]["bytes"]),
        ]
    if small.get("goal") is not None:
        is_kept = small["accuracy"] >= small["goal"]
        rows.append(["goal", "", percent(small["goal"]), "met" if is_kept else "not met"])
    return rows


def sweep_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the header and a row for each ratio of a sweep, and which is the knee."""
    rows = [
        [
            f"{point['ratio']:g}×",
            f"{point['error']:.3f}",
            f"{point['weights']:.2f}×",
            f"{point['macs']:.2f}×",
            percent(point["accuracy"]),
            "knee" * (point["ratio"] == result["knee"]),
        ]
        for point in result["points"]
    ]
    if result["dense_accuracy"] is None:
        return [row[:4] + row[5:] for row in (_SWEEP, *rows)]
    return [_SWEEP, ["dense", "", "", "", percent(result["dense_accuracy"]), ""], *rows]


def int8_changes(results: Mapping[str, Any]) -> dict[str, float]:
    """Return what int8 changes of each network's accuracy, beside the same network in fp32."""
    exact = {"dense": results["dense"], "small": results["verify"]}
    return {n: results["int8"][n]["accuracy"] - fp32["accuracy"] for n, fp32 in exact.items()}


def speed(speedup: float) -> str:
    """Return how many times as fast a network became, or how many times slower."""
    return f"{speedup:.2f}× as fast" if speedup >= 1 else f"{1 / speedup:.2f}× SLOWER"


def medians(times: Values) -> list[str]:
    """Return the milliseconds of both networks."""
    return [f"{times[side]['median']:.2f}" for side in ("dense", "decomposed")]


def percent(share: float | None) -> str:
    """Return a share as a percentage; nothing for none."""
    return "" if share is None else f"{share:.2%}"


def points(change: float) -> str:
    """Return the change of a share in points, with its sign."""
    return f"{100 * change:+.2f}".replace("-", "−")


def _time_row(label: str, times: Values) -> list[str]:
    return [label, *medians(times), speed(times["speedup"])]
