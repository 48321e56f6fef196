"""Networks of other libraries, each in a process of its own: ``pytest -m sweep`` runs them all.

The sample runs in every build; the whole sweep takes about an hour on two cores and is better run
by ``python benchmarks/sweep.py``, which resumes and writes the table of docs/networks.md.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NETWORKS = (ROOT / "benchmarks" / "sweep.txt").read_text().split()
SAMPLE = [
    "timm/lcnet_050",
    "timm/convnext_atto",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/raft_small",
    "transformers/SegformerForSemanticSegmentation",
]


def measured(network: str, timeout: int = 300) -> dict[str, Any]:
    library = network.partition("/")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", network],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    record: dict[str, Any] = json.loads(done.stdout)
    assert "failure" not in record, record["failure"]
    return record


def check(record: dict[str, Any]) -> None:
    assert record["loads_equal"]
    assert 0 < record["output_difference"] < 1e-4
    assert record["stored"] <= record["small_parameters"]


def test_every_network_is_in_the_list_once() -> None:
    assert len(set(NETWORKS)) == len(NETWORKS) >= 150
    assert set(SAMPLE) <= set(NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("network", SAMPLE)
def test_a_sample_of_networks(network: str) -> None:
    record = measured(network)
    check(record)
    assert record["compressed_share"] > 0.9
    # RAFT's batch of two images cannot be free in torch.export, dense or not.
    assert record["onnx"] == "free batch" or network == "torchvision/raft_small"


@pytest.mark.sweep
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network: str) -> None:
    check(measured(network))
