"""A sweep over ratios: its points, its knee, what the command prints and draws."""

import json
import re
from pathlib import Path

import pytest
import torch
from tests.cases import EVERY_LAYER
from tests.test_cli import refused, run
from torch import nn

import deeptwist as dt
from deeptwist.app.cli.sweep import RATIOS, find_knee, sweep

NETWORK = "tests.test_compress:network"


def test_error_and_savings_rise_with_the_ratio() -> None:
    model = nn.Sequential(nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    x = torch.randn(1, 24, 8, 8)
    points = sweep(
        lambda ratio: dt.plan(
            model, dt.SpatialSVD(), ratio=ratio, example_input=x, layers=EVERY_LAYER
        )
    )
    assert [point["ratio"] for point in points] == [*RATIOS]
    for values in zip(*((p["error"], p["weights"], p["macs"]) for p in points), strict=True):
        assert [*values] == sorted(values)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=4, example_input=x, layers=EVERY_LAYER)
    errors = torch.tensor([layer.relative_error for layer in plan.compressed])
    assert points[4]["error"] == pytest.approx(float(errors.square().mean().sqrt()))


@pytest.mark.parametrize("corner", [1, 3, 6])
@pytest.mark.parametrize("has_accuracy", [False, True])
def test_the_knee_is_where_two_straight_lines_meet(corner: int, has_accuracy: bool) -> None:
    losses = [0.01 * step + 0.1 * max(0, step - corner) for step in range(8)]
    points = [
        {"ratio": 2.0**step, "error": loss, "accuracy": 0.9 - loss if has_accuracy else None}
        for step, loss in enumerate(losses)
    ]
    assert find_knee(points, 0.9 if has_accuracy else None) == corner


def test_a_loss_that_does_not_rise_has_its_knee_at_the_end() -> None:
    points = [{"ratio": ratio, "error": 0.0} for ratio in RATIOS]
    assert find_knee(points) == len(RATIOS) - 1


def test_the_command_tells_accuracy_and_draws_a_page(tmp_path: Path) -> None:
    words = ["plan", NETWORK, "--sweep", "--data", "digits", "--calibration-images", 64]
    words += ["--test-images", 50, "--decomposition", "spatial-svd", "--page", tmp_path / "a.html"]
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["knee"] in RATIOS
    assert [point["ratio"] for point in result["points"]] == [*RATIOS]
    assert all(0 <= point["accuracy"] <= 1 for point in result["points"])
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 3
    assert re.search(
        rf">{result['knee']:g}×</th>(\s*<td>[\d.]+[×%]?</td>){{4}}\s*<td>knee</td>", page
    )


def test_the_command_needs_no_data() -> None:
    words = ["plan", NETWORK, "--input", "1x8x8", "--sweep", "--decomposition", "spatial-svd"]
    assert run(*words).stdout.count("knee") == 1
    assert all(p["accuracy"] is None for p in json.loads(run(*words, "--json").stdout)["points"])
    assert "leave out macs" in refused(*words, "--macs", 3)
    assert "add --sweep" in refused("plan", NETWORK, "--ratio", 4, "--page", "a.html")
