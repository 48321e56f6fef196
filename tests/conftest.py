import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from deeptwist import DeepTwistError

torch.set_num_threads(1)

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

SHARED = Path(os.environ.get("DEEPTWIST_SHARED", Path(__file__).parents[2] / "shared"))


# Files whose tests share what takes seconds to make: each is run whole by one process, and so are
# those together that start processes of their own, from one that has imported what they need.
TOGETHER = {
    "test_clock.py": "test_clock.py",
    "test_compress.py": "test_compress.py",
    "test_distill.py": "processes",
    "test_distributed.py": "processes",
    "test_integrations.py": "processes",
    "test_report.py": "test_report.py",
    "test_resume.py": "processes",
    "test_serving.py": "test_serving.py",
    "test_sweep.py": "test_sweep.py",
}
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "deeptwist.app.training.run",
        "deeptwist.app.cli.commands",
        "sklearn.datasets",
        "tests.test_distributed",
    ]
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal tests out one by one, but for the files in `TOGETHER`."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return TOGETHER.get(Path(file).name, nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def error_of() -> Callable[..., str]:
    """Calls what must refuse, and gives the message, which is one line."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
        with pytest.raises(DeepTwistError) as caught:
            function(*args, **kwargs)
        message = str(caught.value)
        assert message
        assert "\n" not in message
        return message

    return call


@pytest.fixture(scope="session")
def resnet32_weights() -> dict[str, torch.Tensor]:
    """The public ResNet-32 for CIFAR-10, with real, trained weights."""
    path = SHARED / "weights" / "resnet32-cifar10.safetensors"
    if not path.exists():
        pytest.skip(f"no {path}")
    from safetensors.torch import load_file

    return load_file(path)
