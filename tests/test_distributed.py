"""Distortions shared out among real processes, against those of one process alone."""

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.cases import EVERY_LAYER, PLANNED_METHODS, difference, every_layer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deeptwist import SVD, Decomposition, DeepTwist, DeepTwistError, SpatialSVD, TiledSVD, plan
from deeptwist.distributed import broadcast, process_rank, run_on_all_ranks, world_size

X = torch.randn(12, 8, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 10
LAYERS = ["0", "3", "5", "8"]
Failing = Callable[[], object]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    return model.to(dtype)


def twisted(method: Decomposition, model: nn.Module | None = None, **options: Any) -> DeepTwist:
    model = network() if model is None else model
    example = X.to(next(model.parameters()).dtype)
    options = {"ratio": 1.6, "example_input": example, "layers": EVERY_LAYER, **options}
    return DeepTwist(model, plan(model, method, **options), 1)


def nudge(model: nn.Module, seed: int) -> None:
    """A training step's worth of movement, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.01 * noise.to(parameter))


def steps(twist: DeepTwist, count: int = 3) -> DeepTwist:
    for number in range(count):
        nudge(twist.model, number)
        twist.step()
    return twist


def state(twist: DeepTwist) -> dict[str, Any]:
    """All that must be equal everywhere."""
    return {"model": copy.deepcopy(twist.model.state_dict()), "twist": twist.state_dict()}


def failure(call: Failing) -> tuple[str, str]:
    """The kind of error that a call ends in, and its message."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# --- what every process does; each is called in all of them at once


def every_method() -> dict[str, Any]:
    return {name: state(steps(twisted(method), 2)) for name, method in PLANNED_METHODS.items()}


def exact() -> dict[str, Any]:
    return state(steps(twisted(SpatialSVD()), 1))


def finished() -> dict[str, Any]:
    twist = steps(twisted(TiledSVD(tile=(3, 7))))
    small = twist.finish()
    return {**state(twist), "small": small.state_dict(), "y": small(X)}


def narrow() -> dict[str, Any]:
    return state(steps(twisted(SVD(), network(torch.bfloat16))))


def other_layouts() -> dict[str, Any]:
    model = network()
    if process_rank():
        model.to(memory_format=torch.channels_last)
    return state(steps(twisted(SVD(), model)))


def one_layer() -> dict[str, Any]:
    return state(steps(twisted(SVD(), layers=every_layer(include=["3"]))))


def not_a_number() -> dict[str, Any]:
    """In the last process alone, in each layer: whoever would have factored it."""
    outcome = {}
    for name in LAYERS:
        for call in (DeepTwist.step, DeepTwist.distort, DeepTwist.finish):
            twist = steps(twisted(SVD()))
            if process_rank() == world_size() - 1:
                with torch.no_grad():
                    twist.model.get_submodule(name).weight.view(-1)[-1] = float("nan")
            before = state(twist)
            error = failure(lambda call=call, twist=twist: call(twist))
            if call is DeepTwist.step:
                before["twist"]["steps"] += 1
            outcome[name, call.__name__] = (*error, alike(before, state(twist)))
    return outcome  # type: ignore[return-value]


def kept_not_a_number() -> tuple[str, str, bool]:
    twist = steps(twisted(SVD(), layers=every_layer(exclude=["5"])))
    if process_rank() == 1:
        with torch.no_grad():
            twist.model[5].weight[0] = float("nan")
    before = state(twist)
    return *failure(twist.finish), alike(before, state(twist))


def losses() -> tuple[list[float], list[float | None]]:
    """The closure gives each process another loss."""
    twist, seen = twisted(SVD()), []

    def loss() -> Tensor:
        share = X[process_rank() :: world_size()]
        seen.append(float(twist.model.eval()(share).square().mean()))
        return torch.tensor(seen[-1])

    twist.step(loss)
    return seen, [record.loss_increase for record in twist.history]


def loss_that_fails() -> tuple[str, str, bool]:
    twist = twisted(SVD())
    before = state(twist)

    def loss() -> float:
        if process_rank() == 1:
            raise ZeroDivisionError("nothing\nto divide by")
        return 1.0

    error = failure(lambda: twist.distort(loss))
    return *error, alike(before, state(twist))


def other_network() -> tuple[str, str, bool]:
    twist = twisted(SVD())
    if process_rank() == 1:
        with torch.no_grad():
            twist.model[3].weight.mul_(1.01)
    before = state(twist)
    return *failure(twist.distort), alike(before, state(twist))


def other_steps() -> tuple[str, str]:
    twist = twisted(SVD())
    twist.steps = 5 if process_rank() else 4
    return failure(twist.step)


def other_plan() -> tuple[str, str]:
    return failure(twisted(SVD(), ratio=1.5 + process_rank()).step)


def resumed() -> dict[str, Any]:
    """From the state that the last process keeps: all hold everything."""
    twist = steps(twisted(TiledSVD(tile=(3, 7))), 2)
    saved = [state(twist) if process_rank() == world_size() - 1 else None]
    dist.broadcast_object_list(saved, world_size() - 1)
    again = twisted(TiledSVD(tile=(3, 7)))
    again.model.load_state_dict(saved[0]["model"])
    again.load_state_dict(saved[0]["twist"])
    for each in (twist, again):
        nudge(each.model, 9)
        each.step()
    return {"through": state(twist), "resumed": state(again)}


def trained() -> dict[str, Any]:
    return train(process_rank(), world_size())


def train(place: int, count: int) -> dict[str, Any]:
    """Ten steps of SGD on one global batch, of which every process has its part."""
    model = network().double()
    model[1].eval()  # its statistics are of a process's own batch
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    twist = DeepTwist(model, twisted(SVD(), model).plan, 3)
    outer = DistributedDataParallel(model) if count > 1 else model
    for _ in range(10):
        x, y = X.double()[place::count], Y[place::count]
        nn.functional.cross_entropy(outer(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        twist.step()
    small = twist.finish()
    return {**state(twist), "small": small.state_dict()}


def sent() -> list[Tensor]:
    """Tensors of several types, layouts and sizes, from each."""
    outcome = []
    for source in range(world_size()):
        torch.manual_seed(process_rank())
        tensors = [
            torch.randn(4, 5, 6).permute(2, 0, 1),
            torch.randn(3, 2).double(),
            torch.randn(2**20 + 1),
            torch.randn(7).to(torch.bfloat16),
            torch.randn(()),
            torch.empty(0, 3),
            torch.randn(8, 6)[::2, ::3],
        ]
        broadcast(tensors, source)
        outcome += [tensor if tensor.numel() < 100 else tensor[-3:].clone() for tensor in tensors]
    return outcome


def said() -> tuple[int, list[str]]:
    return run_on_all_ranks(lambda: process_rank() * 10, lambda number: f"process {number // 10}")


SCENES: list[Callable[[], Any]] = [
    every_method, exact, finished, narrow, other_layouts, one_layer, not_a_number,
    kept_not_a_number, losses, loss_that_fails, other_network, other_steps, other_plan, resumed,
    trained, sent, said,
]  # fmt: skip


def worker(number: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=number,
        world_size=count,
        timeout=datetime.timedelta(seconds=120),
    )
    outcome = {scene.__name__: scene() for scene in SCENES}
    torch.save(outcome, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every scene came to, in each of so many processes."""
    folder = tmp_path_factory.mktemp("job")
    mp.start_processes(worker, (request.param, folder), request.param, start_method="forkserver")  # type: ignore[attr-defined]
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in range(request.param)]


def alike(first: Any, second: Any) -> bool:
    """Equality bit by bit, NaN included."""
    if isinstance(first, Tensor):
        bits = [x.detach().contiguous().flatten().view(torch.uint8) for x in (first, second)]
        return first.dtype == second.dtype and torch.equal(*bits)
    if isinstance(first, dict):
        return list(first) == list(second) and all(alike(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    return bool(first == second)


def weights(outcome: dict[str, Any]) -> dict[str, Tensor]:
    return {name: outcome["model"][f"{name}.weight"] for name in LAYERS}


# --- the result


@pytest.mark.parametrize(
    "scene",
    [every_method, exact, finished, narrow, other_layouts, one_layer, resumed, sent],
    ids=lambda scene: scene.__name__,
)
def test_everything_is_the_same_in_all_processes_to_the_bit(
    job: list[Any], scene: Callable[[], Any]
) -> None:
    for other in job[1:]:
        assert alike(job[0][scene.__name__], other[scene.__name__])


def test_exact_distortions_are_those_of_one_process_to_the_bit(job: list[Any]) -> None:
    assert alike(job[0]["exact"], exact())


@pytest.mark.parametrize("name", PLANNED_METHODS)
def test_followed_distortions_are_those_of_one_process(job: list[Any], name: str) -> None:
    outcome, alone = job[0]["every_method"][name], state(steps(twisted(PLANNED_METHODS[name]), 2))
    for layer, weight in weights(alone).items():
        assert difference(weight, weights(outcome)[layer]) < 0.03
    for record, expected in zip(
        outcome["twist"]["history"], alone["twist"]["history"], strict=True
    ):
        assert record["weight_shift"] == pytest.approx(expected["weight_shift"], rel=0.01)
        assert list(record["layer_shifts"]) == LAYERS


@pytest.mark.parametrize("scene", [narrow, one_layer, other_layouts], ids=lambda s: s.__name__)
def test_types_layouts_and_processes_with_nothing_to_do(
    job: list[Any], scene: Callable[[], Any]
) -> None:
    outcome, alone = job[0][scene.__name__], scene()
    for layer, weight in weights(alone).items():
        assert difference(weight, weights(outcome)[layer]) < 0.03


def test_finish_gives_all_the_network_that_one_process_would(job: list[Any]) -> None:
    alone = finished()
    for outcome in (job[0]["finished"], job[-1]["finished"]):
        assert outcome["small"].keys() == alone["small"].keys()
        assert difference(alone["y"], outcome["y"]) < 0.03


def test_training_is_that_of_one_process_on_the_same_global_batch(job: list[Any]) -> None:
    alone = train(0, 1)
    for outcome in job:
        outcome = outcome["trained"]
        assert alike(outcome["small"], job[0]["trained"]["small"])
        assert alike(outcome["model"], job[0]["trained"]["model"])
        assert [r["step"] for r in outcome["twist"]["history"]] == [3, 6, 9, 10]
        for name, weight in weights(alone).items():
            assert difference(weight, weights(outcome)[name]) < 1e-2


def test_every_process_can_resume(job: list[Any]) -> None:
    for outcome in job:
        assert alike(outcome["resumed"]["through"], outcome["resumed"]["resumed"])


def test_the_state_of_a_job_serves_one_process(job: list[Any]) -> None:
    saved = job[-1]["every_method"]["tiled"]
    twist = twisted(PLANNED_METHODS["tiled"])
    twist.model.load_state_dict(saved["model"])
    twist.load_state_dict(saved["twist"])
    nudge(twist.model, 9)
    assert twist.step() is not None
    assert len(twist.history) == 3


def test_the_loss_is_that_of_all_examples(job: list[Any]) -> None:
    before, after = (sum(outcome["losses"][0][n] for outcome in job) / len(job) for n in (0, 1))
    for outcome in job:
        assert outcome["losses"][1] == [pytest.approx((after - before) / before)]
        assert outcome["losses"][1] == job[0]["losses"][1]


# --- nothing at all, where something is wrong


def test_what_is_not_finite_in_one_process_stops_all_and_changes_nothing(job: list[Any]) -> None:
    for outcome in job:
        assert len(outcome["not_a_number"]) == 3 * len(LAYERS)
        for (name, _), (kind, message, unchanged) in outcome["not_a_number"].items():
            assert kind == "DeepTwistError"
            assert f"'{name}'" in message
            assert f"process {len(job) - 1} of {len(job)}" in message
            assert unchanged
        kind, message, unchanged = outcome["kept_not_a_number"]
        assert (kind, unchanged) == ("DeepTwistError", True)
        assert "'5'" in message
        assert "process 1" in message


def test_another_kind_of_failure_is_raised_where_it_happened_and_told_to_the_rest(
    job: list[Any],
) -> None:
    for number, outcome in enumerate(job):
        kind, message, unchanged = outcome["loss_that_fails"]
        assert unchanged
        assert kind == ("ZeroDivisionError" if number == 1 else "DeepTwistError")
        assert "nothing" in message
        assert number == 1 or len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("scene", "word"),
    [(other_network, "layer '3'"), (other_steps, "6 steps"), (other_plan, "plan")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_processes_that_train_different_networks_are_refused(
    job: list[Any], scene: Callable[[], Any], word: str
) -> None:
    for outcome in job:
        kind, message, *unchanged = outcome[scene.__name__]
        assert kind == "DeepTwistError"
        assert word in message
        assert "process 1" in message
        assert all(unchanged)


# --- what is said and sent


def test_what_processes_tell_each_other(job: list[Any]) -> None:
    for number, outcome in enumerate(job):
        assert outcome["said"] == (10 * number, [f"process {n}" for n in range(len(job))])


def test_one_process_is_a_job_of_one() -> None:
    assert (world_size(), process_rank()) == (1, 0)
    assert run_on_all_ranks(lambda: 3, str) == (3, ["3"])
    with pytest.raises(DeepTwistError, match=r"^as it is$"):
        run_on_all_ranks(lambda: (_ for _ in ()).throw(DeepTwistError("as it is")), str)
    tensor = torch.ones(3)
    broadcast([tensor], 0)
