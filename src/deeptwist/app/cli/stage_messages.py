"""What the stages of a job come to, in one line each."""

from typing import Any


def say_accuracy(accuracy: float, loss: float, **_: object) -> str:
    """Tell accuracy and loss."""
    return f"accuracy {accuracy:.2%}, loss {loss:.4f}"


def say_search(
    least: float, kept: bool, ratio: float, tried: list[tuple[float, float]], **_: object
) -> str:
    """Tell which ratio was taken, and what others kept."""
    shown = ", ".join(f"{ratio:g}×: {accuracy:.2%}" for ratio, accuracy in sorted(tried))
    short = "" if kept else ", which costs more untrained"
    return f"{ratio:g}×{short} (at least {least:.2%}; {shown})"


def say_plan(
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


def say_training(accuracy: float, untrained: float | None) -> str:
    """Tell accuracy before and after."""
    return f"accuracy {untrained or 0:.2%} untrained, {accuracy:.2%} at the end"


def say_export(difference: float, dense: int, small: int) -> str:
    """Tell the sizes of both files, and how exact they are."""
    return f"{dense:,} → {small:,} bytes; outputs differ from PyTorch's by {difference:.0e} at most"


def say_times(machine: str, settings: list[dict[str, Any]]) -> str:
    """Tell the speedup in every setting, and the machine."""
    speedups = [
        f"{row['runtime']} {row['times']['speedup']:.2f}×" if row["times"] else row["reason"]
        for row in settings
    ]
    return f"{', '.join(speedups)}, on {machine}"


def say_int8(dense: dict[str, Any], small: dict[str, Any], **_: object) -> str:
    """Tell both accuracies."""
    return f"accuracy {dense['accuracy']:.2%} dense, {small['accuracy']:.2%} small"
