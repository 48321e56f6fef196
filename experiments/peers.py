"""``python -m experiments.peers``: draw what ``benchmarks/peers.py`` measured (docs/peers.svg)."""

from pathlib import Path

import pandas as pd

from deeptwist.files import write_text
from experiments.plots import Curve, draw

RESULTS, PICTURE = Path("results/peers"), Path("docs/peers.svg")
KEY = ["network", "ratio", "way"]
DISTILLED = "minutes, no labels"
CURVES = [  # a way, a column, how it is called, the colour
    ("deeptwist", "distilled", f"deeptwist, {DISTILLED}", 0),
    ("both", "distilled", f"pruned, then deeptwist, {DISTILLED}", 2),
    ("pruning", "distilled", f"pruning, {DISTILLED}", 1),
    ("deeptwist", "untrained", "deeptwist, no training", 0),
]  # pruning without training is far below


def main() -> None:
    """Draw accuracy over speed from the tables."""
    accuracy = pd.read_csv(RESULTS / "accuracy.csv").groupby(KEY, as_index=False).mean()
    both = accuracy.merge(pd.read_csv(RESULTS / "speed.csv"), on=KEY)
    both = both[both.network == "resnet18"]
    dense = both[both.way == "dense"].iloc[0]
    curves = [
        Curve(label, _points(both[both.way == way], column), color, dashed=column == "untrained")
        for way, column, label, color in CURVES
    ]
    (figure,) = draw(
        "peers",
        "ResNet-18: accuracy over speed, low rank beside structured pruning",
        curves,
        ("dense", dense.untrained),
        x="times as fast as dense (onnxruntime, fp32, one thread)",
        y="ResNet-18 on imagenette224 at 64 pixels: accuracy, %",
    )
    write_text(PICTURE, figure.svg)


def _points(rows: pd.DataFrame, y: str) -> list[tuple[float, float]]:
    return [*rows[["onnxruntime", y]].dropna().sort_values("onnxruntime").itertuples(False, None)]


if __name__ == "__main__":
    main()
