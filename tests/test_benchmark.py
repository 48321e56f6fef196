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
from tests.cases import EVERY_LAYER, error_of
from torch import Tensor, nn

from deeptwist import Plan, SpatialSVD, decompose, plan
from deeptwist.app.benchmark.layers import compare_layers
from deeptwist.app.models import build_model
from deeptwist.measure.comparison import compare
from deeptwist.measure.memory import peak_memory
from deeptwist.measure.networks import Setting, measure, measure_memory, settings_of
from deeptwist.measure.runtimes import prepare
from deeptwist.measure.timing import median_ratio, summarize, time_interleaved
from deeptwist.plan.autotune import apply_timings

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
    actual = compare(model, decompose(model, made(model)), X, rounds=2)
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


def test_memory_of_both_networks() -> None:
    model = network()
    actual = measure_memory(model, decompose(model, made(model)), X)
    # A convolution's input and output are held at once: 32 channels each.
    assert actual.dense >= 2 * 4 * 32 * 12 * 12 * 4
    assert actual.decomposed <= 1.2 * actual.dense


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
    measured = compare_layers(planned, X, batch=8, rounds=2)
    assert [layer.name for layer in measured] == [layer.name for layer in planned.compressed]
    assert measured[1].times == measured[2].times
    assert measured[0].times != measured[1].times
    layer = planned.compressed[1]
    promised = layer.convolution.macs((12, 12)) / layer.decomposition.macs(
        layer.convolution, (12, 12)
    )
    assert measured[1].macs_ratio == promised
    assert measured[1].efficiency == pytest.approx(measured[1].times.speedup / promised)


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
    actual = settings_of([1, 16], [1, 2], ["float32"], ["eager", "onnxruntime"])
    assert len(actual) == len(set(actual)) == 8
    assert actual[:2] == [Setting(1, 1), Setting(16, 1)]


def test_a_setting_that_is_not_to_be_had_says_why() -> None:
    model, threads = network().eval(), torch.get_num_threads()
    small = decompose(model, made(model))
    settings = settings_of([2], [1], ["float32", "bfloat16"], ["eager", "onnxruntime"])
    actual = list(measure(model, small, lambda batch: X[:batch], settings, rounds=2))
    assert [each.times is None for each in actual] == [False, False, False, True]
    assert "bfloat16" in (actual[3].reason or "")
    assert torch.get_num_threads() == threads
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "runtime", ["eager", pytest.param("compile", marks=pytest.mark.slow), "onnxruntime"]
)
def test_a_prepared_network_computes_what_the_network_does(runtime: str) -> None:
    model = network().eval()
    actual = prepare(model, X, runtime=runtime, threads=1)()  # type: ignore[arg-type]
    y = actual if isinstance(actual, Tensor) else torch.as_tensor(actual[0])  # type: ignore[index]
    assert torch.allclose(y, model(X), atol=1e-5)


def test_onnxruntime_in_another_type_is_refused() -> None:
    assert "onnxruntime" in error_of(
        prepare, network(), X, runtime="onnxruntime", dtype="float16", threads=1
    )


@pytest.mark.slow
def test_a_compiler_that_is_missing_leaves_the_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled beforehand
    model = nn.Sequential(*network(), nn.Softplus()).eval()  # oneDNN alone would not do
    small = decompose(model, made(model))
    settings = settings_of([2], [1], ["float32"], ["eager", "compile"])
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        actual = list(measure(model, small, lambda batch: X[:batch], settings, rounds=2))
    assert [each.times is None for each in actual] == [False, True]
    assert (actual[1].reason or "").startswith("torch.compile fails (")
    assert "\n" not in (actual[1].reason or "")


def test_the_picture_of_tiles_is_drawn_of_both_networks() -> None:
    root = Path(__file__).parents[1]
    commands = [line for line in (root / "Makefile").read_text().splitlines() if "tiles.py" in line]
    (folder,) = re.findall(r"--vgg runs/trajectories/(\S+)", (root / "Makefile").read_text())
    assert [f"--vgg runs/trajectories/{folder}" in command for command in commands] == [True]
    assert f"--vgg runs/trajectories/{folder}\n" in (root / "benchmarks" / "tiles.py").read_text()
    assert f'"{folder}": ' in (root / "benchmarks" / "trajectories.py").read_text()


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
