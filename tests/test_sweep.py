"""Networks of other libraries, each in a process of its own: ``pytest -m sweep`` runs them all.

The sample runs in every build, its libraries imported once; the whole sweep takes about an hour on
two cores and is better run by ``python benchmarks/sweep.py``, which resumes.
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
EXPORTED = 1  # of the sample, the first: what leaves as ONNX is test_user_models' subject
SAMPLE = [
    "timm/starnet_s050",
    "timm/convnext_atto",
    "timm/fasternet_t0",
    "timm/mobilevit_xxs",
    "timm/xcit_nano_12_p16_224",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/raft_small",
    "torchvision/ssdlite320_mobilenet_v3_large",
    "transformers/ImageGPTForImageClassification",
    "transformers/SegformerForSemanticSegmentation",
]


def is_installed(network: str) -> bool:
    return importlib.util.find_spec(network.partition("/")[0]) is not None


def measured(*networks: str, exported: int, timeout: int) -> dict[str, dict[str, Any]]:
    """Records by network, each measured in a process of its own that one process forks."""
    words = "-m", "benchmarks.sweep", "--exported", str(exported), *networks
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    records = map(json.loads, done.stdout.splitlines())
    return {record["network"]: record for record in records}


@pytest.fixture(scope="module")
def sample() -> dict[str, dict[str, Any]]:
    return measured(*filter(is_installed, SAMPLE), exported=EXPORTED, timeout=900)


def check(record: dict[str, Any]) -> None:
    assert "failure" not in record, record["failure"]
    assert record["loads_equal"]
    assert 0 < record["output_difference"] < 1e-4
    assert record["stored"] <= record["small_parameters"]


def test_every_network_is_in_the_list_once() -> None:
    assert len(set(NETWORKS)) == len(NETWORKS) >= 150
    assert set(SAMPLE) <= set(NETWORKS)
    assert len(SAMPLE) == 10


@pytest.mark.slow
@pytest.mark.parametrize("network", SAMPLE)
def test_a_sample_of_networks(network: str, sample: dict[str, dict[str, Any]]) -> None:
    if network not in sample:
        pytest.skip("its library is not installed")
    check(sample[network])
    # A fifth of so small an ImageGPT is the table of its tokens.
    assert sample[network]["compressed_share"] > (0.75 if "ImageGPT" in network else 0.9)
    assert sample[network].get("onnx", "free batch") == "free batch"


@pytest.mark.sweep
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network: str) -> None:
    if not is_installed(network):
        pytest.skip("its library is not installed")
    check(measured(network, exported=1, timeout=300)[network])
