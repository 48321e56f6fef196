"""The whole job: as one function over anyone's loop, and as one command with stages."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import every_layer
from tests.test_cli import refused, run
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.app.cli.compress import ImageJob
from deeptwist.app.cli.options import CompressOptions
from deeptwist.app.data import batches, load_data, normalize
from deeptwist.app.folders import read_run
from deeptwist.app.training.evaluation import AugmentedInputs, evaluate
from deeptwist.app.training.recipe import make_recipe
from deeptwist.compress import SMALL, Compressed, Job
from deeptwist.measure.runtimes import OnnxNetwork
from deeptwist.networks.build import build_model
from deeptwist.plan.plan import read_plan
from deeptwist.search import RATIOS, most_scores, search_ratio

DIGITS = load_data("digits")


def network(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Named on the command line as tests.test_compress:network."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, num_classes),
    )


def loader() -> Iterator[tuple[Tensor, Tensor]]:
    shuffle = torch.Generator().manual_seed(0)
    for images, labels in batches(DIGITS.train, 64, generator=shuffle):
        yield normalize(images, DIGITS.mean, DIGITS.std), labels


def fit(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    for x, labels in loader():
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: nn.Module) -> float:
    return evaluate(model, DIGITS.test, DIGITS).accuracy


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = network()
    for _ in range(3):
        fit(model)
    return model.eval()


@pytest.fixture(scope="module")
def weights(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "trained.pt"
    torch.save(trained.state_dict(), path)
    return path


def test_compress_in_one_s_own_loop(trained: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    done = dt.compress(
        trained, loader(), accuracy, ratio=4, train_fn=fit, layers=every_layer(include="re:3|6")
    )
    assert done.before == accuracy(trained) > 0.9
    assert done.after == accuracy(done.model)
    assert done.after > done.before - 0.03
    assert {layer.name for layer in done.plan.compressed} == {"3", "6"}
    assert sum(p.numel() for p in done.model.parameters()) == done.plan.parameters
    assert all(torch.equal(before[name], x) for name, x in trained.state_dict().items())


@pytest.mark.parametrize("find", ["ratio", "weights", "macs"])
def test_a_goal_is_kept_by_a_network_near_the_smallest_that_keeps_it(
    trained: nn.Module, find: str
) -> None:
    goal = accuracy(trained) - 0.05
    options = {"layers": every_layer(include="re:3|6"), "calibration_batches": 4}
    done = dt.compress(trained, loader(), accuracy, goal=goal, find=find, **options)
    assert done.after >= goal
    untrained = [
        dt.compress(trained, loader(), accuracy, **{find: ratio}, **options)
        for ratio in (2, 3, 4, 6, 9)
    ]
    cost = (lambda plan: plan.macs) if find == "macs" else (lambda plan: plan.parameters)
    smaller = [attempt for attempt in untrained if cost(attempt.plan) < 0.9 * cost(done.plan)]
    assert smaller
    assert all(attempt.after < goal for attempt in smaller)


def test_a_goal_that_cannot_be_kept_is_refused(trained: nn.Module, error_of) -> None:  # type: ignore[no-untyped-def]
    message = error_of(dt.compress, trained, loader(), accuracy, goal=1.01)
    assert "no factor of macs from 1.2 on keeps a score of 1.01" in message


def test_nothing_is_done_before_it_is_clear_how_small(trained: nn.Module, error_of) -> None:  # type: ignore[no-untyped-def]
    def never(model: nn.Module) -> float:
        raise AssertionError

    assert "say how small: ratio=4" in error_of(dt.compress, trained, loader(), never)
    answer = error_of(dt.compress, trained, loader(), never, goal=0.9, macs=2)
    assert "leave out macs" in answer
    answer = error_of(dt.compress, trained, loader(), never, goal=0.9, find="mac")
    assert answer == "unknown size to find 'mac': did you mean 'macs'?"
    answer = error_of(dt.compress, trained, loader(), never, ratoi=2)
    assert answer == "unknown option 'ratoi': did you mean 'ratio'?"
    answer = error_of(dt.compress, trained, loader(), print, ratio=2)
    assert answer.startswith("eval_fn gives no number: float() argument must be")
    assert "no batch" in error_of(dt.compress, trained, [], never, ratio=2)


def test_what_came_of_it_prints_as_a_table(trained: nn.Module) -> None:
    plan = dt.plan(trained, dt.SVD(), ratio=4, example_input=next(loader())[0])
    header, score, weights, macs = str(Compressed(trained, plan, 0.95, 0.9375)).splitlines()
    assert header.split() == ["dense", "small"]
    assert score.split() == ["score", "0.9500", "0.9375", "−0.0125"]
    counts = f"{plan.dense_parameters:,}", f"{plan.parameters:,}"
    assert weights.split() == ["weights", *counts, f"{plan.compression_ratio:.2f}×", "fewer"]
    assert macs.split()[:3] == ["MACs", f"{plan.dense_macs:,}", f"{plan.macs:,}"]


def test_what_a_step_made_is_read_by_a_job_that_skips_it(
    trained: nn.Module, tmp_path: Path
) -> None:
    batches = [x for x, _ in islice(loader(), 2)]
    asked: list[float | None] = []

    def make_plan(calibration: dt.Calibration | None, ratio: float | None) -> dt.Plan:
        asked.append(ratio)
        options = {"example_input": batches[0], "calibration": calibration}
        return dt.plan(trained, dt.SpatialSVD(), ratio=ratio or 3, **options)

    def halve(network: nn.Module, learns: bool) -> nn.Module:
        with torch.no_grad():
            network[-1].bias /= 2
        return network

    job = Job(trained, make_plan, lambda: batches, halve, tmp_path)
    told = [job.calibrate(), job.search(lambda _: 1.0, least=0.5), job.choose_plan()]
    small = job.decompose()
    assert json.loads(json.dumps(told)) == told  # plain values
    assert [told[0]["layers"], told[1]["ratio"], asked[-1]] == [4, RATIOS[-1], None]
    assert torch.equal(small[-1].bias, trained[-1].bias / 2)  # recovered, as in the search
    dt.save(small, tmp_path / SMALL)

    again = Job(trained, make_plan, list, folder=tmp_path)
    assert again.plan == job.plan
    assert [*again.calibration.moments] == [*job.calibration.moments]
    x = batches[0]
    assert torch.equal(again.small(x), small.eval()(x))
    assert Job(trained, make_plan, list).calibration is None


@given(st.floats(1.0, 20.0), st.floats(1.0, 8.0), st.booleans())
def test_a_search_meets_a_threshold_from_below(threshold: float, gain: float, learns: bool) -> None:
    """Of a score that falls with the ratio; the oracle is where it falls after all is learned."""
    asked = []

    def score(ratio: float, has_learned: bool) -> float:
        asked.append((ratio, has_learned))
        return float(ratio <= threshold * (gain if has_learned else 1))

    kept, falls_at = search_ratio(score, 1.0, learns=learns), threshold * (gain if learns else 1)
    assert len({*asked}) == len(asked) <= most_scores(learns=learns)
    if falls_at < RATIOS[0]:
        assert kept is None
    else:
        assert kept is not None
        assert kept <= falls_at
        assert kept == RATIOS[-1] or falls_at / kept < 1.07


def test_networks_that_learning_makes_worse_are_found_as_they_are() -> None:
    assert search_ratio(lambda ratio, learns: ratio <= 3 and not learns, 1.0, learns=True) == 2.88


def test_a_score_that_the_least_ratio_does_not_keep_may_be_kept_by_a_larger_one() -> None:
    ratio = search_ratio(
        lambda ratio, learns: float(learns and 1.4 <= ratio <= 5), 1.0, learns=True
    )
    assert ratio is not None
    assert 5 / 1.07 < ratio <= 5


@pytest.mark.parametrize("learns", [False, True])
def test_a_search_leaves_the_plan_and_the_network_that_it_chose(
    trained: nn.Module, learns: bool, tmp_path: Path
) -> None:
    """Of a network that keeps its score up to 2×, and 3.5× where it learns; 5× cannot be met."""
    x = next(iter(loader()))[0]
    dense = sum(p.numel() for p in trained.parameters())

    def make_plan(calibration: dt.Calibration | None, ratio: float | None) -> dt.Plan:
        if ratio is None or ratio > 5:
            raise dt.DeepTwistError("no ranks meet the budgets")
        return dt.plan(trained, "svd", weights=ratio, example_input=x, layers=every_layer())

    def learn(network: nn.Module, learns: bool) -> nn.Module:
        size = dense / sum(p.numel() for p in network.parameters())
        network.register_buffer("size", torch.tensor(size))
        network.register_buffer("most", torch.tensor(3.5 if learns else 2.0))
        return network

    job = Job(trained, make_plan, list, learn, tmp_path)
    job.calibration = None
    found = job.search(lambda network: float(network.size <= network.most), 1.0, learns=learns)
    assert found["kept"]
    assert (3.5 if learns else 2) / 1.07 < found["ratio"] <= (3.5 if learns else 2)
    assert {has_learned for *_, has_learned in found["tried"]} == {False, learns}
    assert max(ratio for ratio, *_ in found["tried"]) < 5
    made = make_plan(None, found["ratio"])
    assert job.plan == made == read_plan(tmp_path / "plan.json")
    assert found["learned"] == learns == (tmp_path / "distilled").is_dir()
    if learns:
        assert job.small.size == pytest.approx(found["ratio"], rel=0.05)


WORDS = ["compress", "tests.test_compress:network", "--data", "digits", "--calibration-images", 128]
FAST = ["--rounds", 2, "--threads", 1, "--batch", 8]
RECIPE: dict[str, object] = {"model": WORDS[1], "data": {"source": "digits"}}


@pytest.fixture(scope="module")
def job(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """A whole job: its command line and its folder."""
    out = tmp_path_factory.mktemp("job")
    goal = ["--goal", "accuracy>=dense-0.03", "--epochs", 1, "--distill-steps", 0, "--int8"]
    words = [*WORDS, *FAST, "--weights", weights, *goal, "--out", out]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    for number in range(1, 12):
        assert f"[{number}/11] " in done.stderr
    assert "[1/11] load: tests.test_compress:network, and the images of digits" in done.stderr
    assert "1,437 images to train on, 180 test images" in done.stderr
    for row in ("accuracy", "weights", "MACs", "ms, eager, batch 8", "bytes, ONNX", "int8", "goal"):
        assert row in done.stdout
    return words, out


def test_a_job_s_table_is_what_its_files_are(
    job: tuple[list[object], Path], trained: nn.Module
) -> None:
    _, out = job
    results = json.loads((out / "compress.json").read_text())["results"]
    small = dt.load(out / "model", model=network)
    others = DIGITS.test.images[1::2], DIGITS.test.labels[1::2]  # not those searched on
    told = type(DIGITS.test)(*others)
    assert results["verify"]["accuracy"] == evaluate(small, told, DIGITS).accuracy
    assert results["plan"]["parameters"] == sum(p.numel() for p in small.parameters())
    exported = evaluate(OnnxNetwork(out / "small.onnx", threads=1), told, DIGITS)
    assert exported.loss == pytest.approx(results["verify"]["loss"], rel=1e-4)
    int8 = evaluate(OnnxNetwork(out / "small-int8.onnx", threads=1), told, DIGITS)
    assert int8.accuracy == results["int8"]["small"]["accuracy"]
    assert results["int8"]["small"]["bytes"] < results["export"]["small"]
    on_search = type(DIGITS.test)(DIGITS.test.images[::2], DIGITS.test.labels[::2])
    dense = evaluate(trained, on_search, DIGITS).accuracy
    assert results["search"]["least"] == pytest.approx(dense - 0.03)  # of the same images
    ratio = results["search"]["ratio"]
    tried = {each: score for each, score, _ in results["search"]["tried"]}
    assert tried[ratio] >= results["search"]["least"]
    assert all(score < results["search"]["least"] for r, score in tried.items() if r > ratio)
    assert read_run(out).summary["steps"] == 22 // 2
    assert "<svg" in (out / "report.html").read_text()
    assert not (out / "calibration.safetensors").exists()


def test_a_ratio_is_judged_by_the_half_of_its_images_that_it_does_worse_on(
    weights: Path, trained: nn.Module, tmp_path: Path
) -> None:
    changes = {"batch_norm_batches": 4, "compression": {"macs": 2}}
    recipe = make_recipe(RECIPE | {"weights": str(weights)} | changes)
    job = ImageJob(recipe, CompressOptions(distill_steps=0), tmp_path, has_goal=True)
    tried = job.search(0.2)["tried"]
    test = DIGITS.test
    halves = [type(test)(test.images[first::4], test.labels[first::4]) for first in (0, 2)]
    before = [evaluate(trained, half, DIGITS).accuracy for half in halves]
    for ratio, score, _ in tried:
        small = job.steps.make_small(job.steps.make_plan(None, ratio))
        after = [evaluate(small, half, DIGITS).accuracy for half in halves]
        changes = [b - a for a, b in zip(before, after, strict=True)]
        assert score == pytest.approx(sum(before) / 2 + min(changes))


def test_resuming_does_what_is_missing_and_nothing_else(job: tuple[list[object], Path]) -> None:
    words, out = job
    assert "holds a job: go on with it (--resume)" in refused(*words)
    assert "holds another job (seed differ)" in refused(*words, "--resume", "--seed", 1)
    record = out / "compress.json"
    before = json.loads(record.read_text())
    cut = {**before, "results": dict(list(before["results"].items())[:6])}
    record.write_text(json.dumps(cut))
    (out / "small.onnx").unlink()
    weights = out / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    done = run(*words, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(done already)") == 6
    assert json.loads(done.stdout)["results"]["verify"] == before["results"]["verify"]
    assert (out / "small.onnx").is_file()
    assert weights.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--goal", "accuracy>=0.9", "--ratio", 4], "leave out ratio"),
        ([], "say how small: --ratio 4"),
        (["--goal", "acc>0.9"], "write 'accuracy>=0.90'"),
        (["--ratio", 4, "--find", "macs"], "--find is a goal's: add --goal"),
        (["--ratio", 4, "--mode", "dense"], "mode dense compresses nothing"),
        (["--ratio", 4, "--int8", "--runtime", "eager"], "--int8 is onnxruntime's"),
        (["--ratio", 4, "--epochs", -1], '"-1" for --epochs'),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    words: list[object], answer: str, tmp_path: Path
) -> None:
    assert answer in refused(*WORDS, "--out", tmp_path / "out", *words)


def test_another_run_s_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: resnet20")
    answer = refused(*WORDS, "--out", tmp_path, "--ratio", 4)
    assert "holds a run of 'deeptwist train': choose another folder" in answer
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_run_s_folder_is_refused_before_its_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: resnet20")
    words = ["train", "resnet20", "--data", "/nowhere/at/all", "--ratio", 4, "--out", tmp_path]
    assert "holds a run: go on with it (--resume)" in refused(*words)
    (tmp_path / "recipe.yaml").rename(tmp_path / "photo.jpg")
    assert "is not empty and holds no run" in refused(*words, "--resume")
    job = [*WORDS, "--out", tmp_path, "--ratio", 4, "--resume"]
    assert "is not empty and holds no job" in refused(*job)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_weights_that_are_not_there_end_the_job_in_one_line(tmp_path: Path) -> None:
    message = refused(*WORDS, "--out", tmp_path, "--ratio", 4, "--weights", "nowhere.pt")
    assert message == "deeptwist: no weights file at 'nowhere.pt'\n"


def test_without_training_or_onnx_the_job_is_short(weights: Path, tmp_path: Path) -> None:
    words = ["--weights", weights, "--ratio", 3, "--epochs", 0, "--runtime", "eager", *FAST]
    words += ["--distill-steps", 0]
    done = run(*WORDS, *words, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert list(values["results"]) == [
        *("dense", "calibrate", "plan", "train", "verify", "time", "report")
    ]
    assert values["results"]["verify"]["accuracy"] > 0.8
    assert not [*tmp_path.glob("*.onnx")]


def test_distilled_in_one_s_own_loop(trained: nn.Module) -> None:
    """Harder pressed than a decomposition bears, so that there is something to recover."""
    options = {"ratio": 8, "layers": every_layer(include="re:3|6")}
    start = dt.compress(trained, loader(), accuracy, **options)
    done = dt.compress(trained, [*loader()], accuracy, distill_steps=60, **options)
    taken = dt.compress(trained, loader(), accuracy, distill_steps=60, **options)
    assert done.plan == start.plan
    assert done.after > start.after + 0.02
    assert taken.after > start.after + 0.02  # of an iterator, whose first batches are taken


def test_the_job_distils_where_nothing_is_trained(weights: Path, tmp_path: Path) -> None:
    words = ["--weights", weights, "--ratio", 8, "--epochs", 0, "--runtime", "eager", *FAST]
    plain = run(*WORDS, *words, "--distill-steps", 0, "--out", tmp_path / "plain", "--json")
    words += ["--distill-steps", 60, "--distill-images", 512, "--out", tmp_path / "small"]
    done = run(*WORDS, *words, "--json")
    assert done.returncode == 0, done.stderr
    before, after = (json.loads(out.stdout)["results"] for out in (plain, done))
    assert after["distill"] == {"steps": 60, "images": 512}
    assert after["verify"]["accuracy"] == after["train"]["accuracy"]
    assert after["verify"]["accuracy"] > before["verify"]["accuracy"]
    assert after["plan"]["parameters"] == before["plan"]["parameters"]
    for folder, name in (("plain", "no training"), ("small", "distilled")):
        page = (tmp_path / folder / "report.html").read_text()
        assert f"{name} (SpatialSVD, 8×): " in page
        assert "untrained, %" not in page
    again = run(*WORDS, *words, "--json", "--resume")
    assert json.loads(again.stdout)["results"] == after


def test_what_the_search_distilled_is_the_small_network(weights: Path, tmp_path: Path) -> None:
    words = ["--weights", weights, "--epochs", 0, "--runtime", "eager", *FAST, "--out", tmp_path]
    words += ["--goal", "accuracy>=dense-0.04", "--find", "weight-budget", "--distill-steps", 30]
    done = run(*WORDS, *words, "--distill-images", 512, "--json")
    assert done.returncode == 0, done.stderr
    assert "in the search, on 512 images" in done.stderr
    results = json.loads(done.stdout)["results"]
    least, tried = results["search"]["least"], results["search"]["tried"]
    untrained = [ratio for ratio, score, learned in tried if score >= least and not learned]
    assert results["search"]["learned"]
    assert results["search"]["ratio"] > max(untrained)
    small, distilled = (dt.load(tmp_path / name, model=network) for name in ("model", "distilled"))
    told = type(DIGITS.test)(DIGITS.test.images[1::2], DIGITS.test.labels[1::2])
    assert results["verify"]["accuracy"] == evaluate(small, told, DIGITS).accuracy
    for a, b in zip(small.parameters(), distilled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_told_after_distilling_and_training_is_of_the_trained_network(
    weights: Path, tmp_path: Path
) -> None:
    words = ["--weights", weights, "--ratio", 8, "--runtime", "onnxruntime", *FAST]
    words += ["--distill-images", 512, "--epochs", 1]
    done = run(*WORDS, *words, "--out", tmp_path, "--json")
    results = json.loads(done.stdout)["results"]
    assert results["distill"]["steps"] == 1437 // 128  # as many as are trained
    assert results["train"]["accuracy"] != results["train"]["untrained"]
    assert results["verify"]["accuracy"] == results["train"]["accuracy"]
    exported = evaluate(OnnxNetwork(tmp_path / "small.onnx", threads=1), DIGITS.test, DIGITS)
    assert exported.loss == pytest.approx(results["verify"]["loss"], rel=1e-4)


def test_a_network_learns_from_the_dense_one_in_the_recipe_s_precision(
    weights: Path, tmp_path: Path
) -> None:
    learned = []
    for precision in ("32-true", "bf16-mixed"):
        changes = {"precision": precision, "compression": {"ratio": 8}}
        recipe = make_recipe(RECIPE | {"weights": str(weights)} | changes)
        options = CompressOptions(distill_steps=2, distill_images=256)
        job = ImageJob(recipe, options, tmp_path, has_goal=False)
        job.steps.choose_plan()
        job.distill()
        learned.append(torch.cat([p.flatten() for p in job.steps.small.parameters()]))
    change = (learned[0] - learned[1]).norm() / learned[0].norm()
    assert 1e-6 < change < 1e-2  # rounding, and of bf16
    assert learned[1].dtype == torch.float32


def test_few_images_are_enough_to_distil_on() -> None:
    few = replace(DIGITS, train=DIGITS.train.subsample(10))
    inputs = AugmentedInputs(few, network(), 2048, seed=0, held_out=2)
    first, second = [*inputs], [*inputs]
    assert [len(x) for x in first] == [2] * 5  # of which two are held out
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[2:], second[2:], strict=True))


@pytest.mark.parametrize(
    "words", [("--distill-steps", -5), ("--distill-images", 0), ("--distill-minutes", 0)]
)
def test_distillation_of_nothing_is_refused_before_the_work(
    words: tuple[object, ...], tmp_path: Path
) -> None:
    message = refused(*WORDS, "--ratio", 3, "--epochs", 0, *words, "--out", tmp_path / "small")
    assert str(words[0]).strip("-").replace("-", "_") in message.replace("-", "_")
    assert not (tmp_path / "small").exists()


def test_what_deeptwist_trains_is_not_distilled(weights: Path, tmp_path: Path) -> None:
    words = ["--weights", weights, "--ratio", 3, "--mode", "deeptwist", "--distill-steps", 5]
    message = refused(*WORDS, *words, "--out", tmp_path / "small")
    assert "mode deeptwist begins from the dense network" in message


def test_a_network_as_it_is_built_can_be_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without weights, by a built-in name: the classes and channels are the data's."""
    words = ["compress", "resnet20", "--data", "digits", "--macs", 3, "--epochs", 0, *FAST]
    words += ["--distill-steps", 0]
    done = run(*words, "--runtime", "eager", "--out", tmp_path, "--json")
    assert "the dense network guesses" in caplog.text
    assert done.returncode == 0, done.stderr
    dense = sum(p.numel() for p in build_model("resnet20", in_channels=1).parameters())
    assert json.loads(done.stdout)["results"]["plan"]["dense_parameters"] == dense
