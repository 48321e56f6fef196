"""Measuring: the statistics, the settings, single layers, memory."""

import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.cases import EVERY_LAYER, error_of, peak_memory
from torch import Tensor, nn

from deeptwist import Plan, SpatialSVD, decompose, plan
from deeptwist.app.cli.console import layer_rows
from deeptwist.app.cli.options import BenchmarkOptions
from deeptwist.measure.runtimes import Run, Runtime, Setting, make_runner
from deeptwist.measure.timing import (
    Comparison,
    median_ratio,
    summarize,
    time_interleaved,
    time_models,
    time_settings,
)
from deeptwist.networks.build import build_model
from deeptwist.plan.latency import apply_timings, time_plan

X = torch.randn(4, 8, 12, 12)
MILLISECONDS = st.lists(st.floats(0.01, 1e4), min_size=2, max_size=30)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Dropout(0.5),
    )


def made(model: nn.Module) -> Plan:
    return plan(model, SpatialSVD(), ratio=3, example_input=X, layers=EVERY_LAYER)


@given(MILLISECONDS)
def test_a_timing_is_the_median_between_the_quartiles(samples: list[float]) -> None:
    actual = summarize(samples)
    assert actual.median == pytest.approx(statistics.median(samples))
    assert actual.lower <= actual.median <= actual.upper


@given(MILLISECONDS, st.floats(0.1, 10))
def test_drift_that_meets_both_sides_cancels(samples: list[float], factor: float) -> None:
    slowed = [factor * sample for sample in samples]
    assert median_ratio(slowed, samples) == pytest.approx(factor)


def test_functions_are_timed_in_turn() -> None:
    order: list[str] = []
    samples = time_interleaved(
        [lambda: order.append("a"), lambda: order.append("b")],
        rounds=5,
        on_round=lambda: order.append("|"),
    )
    assert [len(own) for own in samples] == [5, 5]
    rounds = "".join(order).split("|")[1:-1]
    assert all(turn.strip("a").strip("b") == "" and turn[0] == "a" for turn in rounds)
    assert all("a" in turn and "b" in turn for turn in rounds)


def test_twice_the_work_takes_about_twice_as_long() -> None:
    a = torch.randn(256, 256)

    def product(times: int) -> None:
        for _ in range(times):
            a @ a

    single, double = time_interleaved([lambda: product(8), lambda: product(16)], rounds=9)
    assert 1.4 < median_ratio(double, single) < 2.8


def test_comparing_leaves_the_models_as_they_were() -> None:
    model = network().train()
    actual = time_models(model, decompose(model, made(model)), X, Setting(4, 1), rounds=2)
    assert model.training
    assert actual.speedup > 0
    assert actual.dense.lower <= actual.dense.median <= actual.dense.upper


def test_peak_memory_of_a_known_function() -> None:
    def run() -> Tensor:
        first = torch.zeros(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB
        del first
        return second * 2  # 8 MB

    run()
    assert peak_memory(run) == pytest.approx(8e6, rel=1e-3)
    assert peak_memory(lambda: None) == 0


def test_decomposing_takes_less_than_one_and_a_half_times_the_network() -> None:
    """Its largest layers hold a tenth of it, as those of ResNet-34 do."""
    model = nn.Sequential(*(nn.Conv2d(192, 192, 3, padding=1) for _ in range(10)))
    planned = plan(
        model, SpatialSVD(), ratio=4, example_input=torch.zeros(1, 192, 4, 4), layers=EVERY_LAYER
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert peak_memory(lambda: decompose(model, planned)) < 1.5 * size


def test_layers_are_measured_by_name_and_equal_ones_once() -> None:
    planned = made(network())
    times = time_plan(planned, X, Setting(8, 1), rounds=2)
    measured = layer_rows(planned, times)
    assert [layer["name"] for layer in measured] == [layer.name for layer in planned.compressed]
    assert measured[1]["times"] == measured[2]["times"]
    assert measured[0]["times"] != measured[1]["times"]
    layer = planned.compressed[1]
    promised = layer.convolution.macs((12, 12)) / layer.decomposition.macs(
        layer.convolution, (12, 12)
    )
    assert measured[1]["macs_ratio"] == promised
    speedup = measured[1]["times"]["speedup"]
    assert measured[1]["efficiency"] == pytest.approx(speedup / promised)


def test_slow_layers_are_kept_with_the_measured_reason() -> None:
    model = network()
    planned = made(model)
    thinned = apply_timings(planned, {"0": 0.8, "2": 1.5, "3": 1.04}, 1.05)
    assert [layer.name for layer in thinned.compressed] == ["2"]
    assert thinned.kept[0].reason == "not worth it: measured 0.80× as fast, below 1.05×"
    assert thinned.compressed[0] == planned.compressed[1]
    assert Plan.from_json(thinned.to_json()) == thinned
    assert decompose(model, thinned)(X).shape == model(X).shape


def test_settings_are_all_combinations() -> None:
    options = BenchmarkOptions(batch=(1, 16), threads=(1, 2), runtime=("eager", "onnxruntime"))
    actual = options.settings()
    assert len(actual) == len(set(actual)) == 8
    assert actual[:2] == [Setting(1, 1), Setting(16, 1)]


def measure(
    model: nn.Module, small: nn.Module, *settings: Setting
) -> list[tuple[Setting, Comparison | str]]:
    def make_runners(setting: Setting) -> list[Run]:
        return [make_runner(each, X[: setting.batch], setting) for each in (model, small)]

    return [*time_settings(make_runners, settings, rounds=2)]


def test_a_setting_that_is_not_to_be_had_says_why() -> None:
    model, threads = network().eval(), torch.get_num_threads()
    small = decompose(model, made(model))
    settings = BenchmarkOptions(
        batch=(2,), threads=(1,), dtype=("float32", "bfloat16"), runtime=("eager", "onnxruntime")
    ).settings()
    actual = [times for _, times in measure(model, small, *settings)]
    assert [isinstance(times, str) for times in actual] == [False, False, False, True]
    assert "bfloat16" in actual[3]
    assert torch.get_num_threads() == threads
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "runtime", ["eager", pytest.param("compile", marks=pytest.mark.slow), "onnxruntime"]
)
def test_a_runner_computes_what_the_network_does(runtime: Runtime) -> None:
    model = network().eval()
    actual = make_runner(model, X, Setting(4, 1, runtime=runtime))()
    y = actual if isinstance(actual, Tensor) else torch.as_tensor(actual[0])
    assert torch.allclose(y, model(X), atol=1e-5)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_networks_of_several_inputs_are_run_too(runtime: Runtime) -> None:
    actual = make_runner(Sum(), (X, X + 1), Setting(4, 1, runtime=runtime))()
    y = actual if isinstance(actual, Tensor) else torch.as_tensor(actual[0])
    assert torch.allclose(y, Sum()(X, X + 1))


def test_onnxruntime_in_another_type_is_refused() -> None:
    setting = Setting(4, 1, "float16", "onnxruntime")
    assert "onnxruntime" in error_of(make_runner, network(), X, setting)


@pytest.mark.slow
def test_a_compiler_that_is_missing_leaves_the_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled beforehand
    model = nn.Sequential(*network(), nn.Softplus()).eval()  # oneDNN alone would not do
    small = decompose(model, made(model))
    settings = Setting(2, 1), Setting(2, 1, runtime="compile")
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        actual = [times for _, times in measure(model, small, *settings)]
    assert [isinstance(times, str) for times in actual] == [False, True]
    assert actual[1].startswith("torch.compile fails: ")
    assert "\n" not in actual[1]


def test_the_picture_of_tiles_is_drawn_of_both_networks() -> None:
    root = Path(__file__).parents[1]
    commands = [line for line in (root / "Makefile").read_text().splitlines() if "tiles.py" in line]
    (folder,) = re.findall(r"--vgg runs/trajectories/(\S+)", (root / "Makefile").read_text())
    assert [f"--vgg runs/trajectories/{folder}" in command for command in commands] == [True]
    assert f"--vgg runs/trajectories/{folder}\n" in (root / "benchmarks" / "tiles.py").read_text()
    assert f'"{folder}": ' in (root / "benchmarks" / "distortion.py").read_text()


@pytest.mark.slow
def test_one_network_s_tiles_are_printed_and_replace_no_picture(tmp_path: Path) -> None:
    picture, weights = tmp_path / "tiles.svg", tmp_path / "weights.safetensors"
    picture.write_text("of both networks")
    save_file(build_model("resnet32").state_dict(), weights)
    script = Path(__file__).parents[1] / "benchmarks" / "tiles.py"
    words = ["--weights", weights, "--out", picture, "--rounds", 2, "--threads", 1]
    command = [sys.executable, script, *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert "| 64 × 64 channels |" in done.stdout
    assert picture.read_text() == "of both networks"
