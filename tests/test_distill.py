"""Distillation: what it minimises, what it leaves alone, when it gives up."""

import copy
import math
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from deeptwist import SpatialSVD, decompose, distill, plan
from deeptwist.decompose import recalibrate_batch_norm
from deeptwist.distill import (
    block_names,
    divergence_from,
    kullback_leibler,
    one_cycle,
    squared_error,
)
from deeptwist.plan.layers import Layers


class Block(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.second(self.norm(self.first(x)).relu()))


class Network(nn.Module):
    """A convolution, two blocks and logits; or whatever `head` makes of the last features."""

    def __init__(self, head: Callable[[Tensor], object] | None = None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.classifier = nn.Linear(16, 5)
        self._head = head

    def forward(self, x: Tensor) -> object:
        x = self.blocks(self.stem(x))
        return self.classifier(x.mean((2, 3))) if self._head is None else self._head(x)


def pair(head: Callable[[Tensor], object] | None = None) -> tuple[nn.Module, nn.Module]:
    """A dense network, and what is left of it at an eighth of the weights."""
    dense = Network(head).eval()
    made = plan(dense, SpatialSVD(), ratio=8, example_input=batches(1)[0])
    return dense, decompose(dense, made)


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 12, 12, generator=generator) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_images_that_nobody_learned_from_are_seen_more_like_the_dense_network() -> None:
    dense, small = pair()
    unseen = [(x,) for x in batches(4, seed=1)]
    learned = distill(small, dense, batches(10), steps=60)
    before, after = (divergence_from(dense, model, unseen) for model in (small, learned))
    assert after < before / 3


def test_a_network_without_factors_learns_the_outputs_alone() -> None:
    dense, _ = pair()
    narrow = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    unseen = [(x,) for x in batches(4, seed=1)]
    learned = distill(narrow, dense, batches(10), steps=60, lr=4e-3)
    before, after = (divergence_from(dense, model, unseen) for model in (narrow, learned))
    assert after < before / 2


def test_both_networks_are_left_as_they_are_and_modes_are_kept() -> None:
    dense, small = pair()
    small.train()
    dense.blocks[0].train()
    modes = [module.training for module in dense.modules()]
    before = state(dense), state(small)
    learned = distill(small, dense, batches(4), steps=3)
    assert equal(state(dense), before[0])
    assert equal(state(small), before[1])
    assert [module.training for module in dense.modules()] == modes
    assert all(module.training for module in learned.modules())
    hooks = [m._forward_hooks for model in (dense, small, learned) for m in model.modules()]
    assert not any(hooks)


def test_the_same_batches_give_the_same_network_whatever_random_numbers_were_drawn() -> None:
    dense, small = pair()
    first = distill(small, dense, batches(4), steps=5)
    torch.manual_seed(99)  # which dropout would draw from
    second = distill(small, dense, batches(4), steps=5)
    assert equal(state(first), state(second))
    assert not equal(state(first), state(small))


def test_a_result_that_is_worse_on_the_batches_held_out_is_not_taken() -> None:
    dense, small = pair()
    kept = distill(small, dense, batches(4), steps=5, lr=1e3)
    assert kept is not small
    assert equal(state(kept), state(small))
    taken = distill(small, dense, batches(4), steps=5, lr=1e3, held_out=0)
    assert not equal(state(taken), state(small))


def test_batch_norm_taken_anew_is_kept_where_nothing_else_was_learned() -> None:
    dense, _ = pair()
    x = [5 * batch + 3 for batch in batches(5)]
    dense = recalibrate_batch_norm(dense, x)
    small = decompose(dense, plan(dense, SpatialSVD(), ratio=8, example_input=x[0]))
    kept = distill(small, dense, x, steps=3, lr=1e3)
    assert equal(state(kept), state(recalibrate_batch_norm(small, x[2:])))
    before, after = (divergence_from(dense, model, x[:2]) for model in (small, kept))
    assert after < before


def test_an_autocast_that_is_held_open_learns_too() -> None:
    dense, small = pair()
    with torch.autocast("cpu", torch.bfloat16):
        learned = distill(small, dense, batches(10), steps=60)
    unseen = batches(4, seed=1)
    before, after = (divergence_from(dense, model, unseen) for model in (small, learned))
    assert after < before / 3


def test_the_rate_is_lower_where_no_blocks_are_compared() -> None:
    dense, small = pair()
    narrow = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    for network, lr in ((small, 4e-3), (narrow, 1e-3)):
        default, given = (
            state(distill(network, dense, batches(4), steps=3, held_out=0, lr=rate))
            for rate in (None, lr)
        )
        assert equal(default, given)


def test_labels_are_not_read_and_a_generator_is_gone_through_again() -> None:
    dense, small = pair()
    expected = distill(small, dense, batches(4), steps=7)
    labelled = ((x, "no label") for x in batches(4))
    assert equal(state(distill(small, dense, labelled, steps=7)), state(expected))


def test_a_loader_is_asked_anew_in_each_round_so_that_it_can_augment() -> None:
    class Augmented:
        rounds = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.rounds += 1
            return iter(batches(4, seed=self.rounds))

    dense, small = pair()
    loader = Augmented()
    distill(small, dense, loader, steps=7)  # after two that are held out: two, two, two, one
    assert loader.rounds == 4


@pytest.mark.parametrize(
    "head",
    [
        lambda x: {"features": [x, x.mean((2, 3, 1))], "count": 3},
        lambda x: x.flatten(1).argsort(),  # no numbers to learn from: the blocks' outputs are left
        lambda x: x[x > 0],  # as many as there are
    ],
    ids=["a dictionary", "integers", "as many as there are"],
)
def test_any_output_will_do(head: Callable[[Tensor], object]) -> None:
    dense, small = pair(head)
    unseen = [(x,) for x in batches(2, seed=1)]
    learned = distill(small, dense, batches(6), steps=40)
    before, after = (divergence_from(dense, model, unseen) for model in (small, learned))
    assert after < before


def test_a_loss_of_ones_own_takes_the_place_of_the_outputs_own() -> None:
    dense, small = pair()
    seen: list[tuple[int, ...]] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        seen.append(tuple(y.shape))
        return functional.l1_loss(x, y)

    distill(small, dense, batches(4), steps=3, loss=loss)
    assert seen == [(16, 5)] * (3 + 2 * 3)  # the steps, and two batches held out by three networks


def test_blocks_are_what_factored_layers_stand_in() -> None:
    _, small = pair()
    assert block_names(small) == ["stem.1", "blocks.0", "blocks.1"]
    flat = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    made = plan(flat, SpatialSVD(), ratio=2, example_input=batches(1)[0])
    assert block_names(decompose(flat, made)) == ["1", "2"]


def test_a_minute_is_a_budget_too() -> None:
    dense, small = pair()
    steps: list[int] = []
    distill(small, dense, batches(4), steps=None, minutes=0.005, on_step=lambda: steps.append(1))
    assert steps
    steps.clear()
    distill(small, dense, batches(4), steps=2, minutes=60, on_step=lambda: steps.append(1))
    assert len(steps) == 2


def test_what_was_cut_ends_bit_for_bit_as_if_it_had_not_been(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    dense, small = pair()
    file, steps = tmp_path / "distilling.pt", 0

    def cut() -> None:
        nonlocal steps
        steps += 1
        if steps == 130:
            raise KeyboardInterrupt

    whole = distill(small, dense, batches(5), steps=150)
    with pytest.raises(KeyboardInterrupt):
        distill(small, dense, batches(5), steps=150, on_step=cut, checkpoint=file)
    assert file.exists()
    steps = -1000
    again = distill(small, dense, batches(5), steps=150, on_step=cut, checkpoint=file)
    assert steps == -1000 + 150  # those that were done are told too
    assert equal(state(again), state(whole))
    assert not file.exists()
    file.write_bytes(b"no checkpoint")
    told = error_of(distill, small, dense, batches(5), steps=150, checkpoint=file)
    assert f"cannot go on from '{file}'" in told


def distill_in_a_group(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense, small = pair()
    if rank > 0:  # a start of its own, and time: the first one's counts
        nn.init.zeros_(small.blocks[0].second[0].weight)
    if world > 1:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    same, own = (
        state(distill(small, dense, batches(4, seed), steps=steps, minutes=60))
        for seed, steps in ((0, 5), (rank, 6))
    )
    torch.save({"same": same, "own": own}, folder / f"{rank}.pt")


def test_processes_learn_one_network(tmp_path: Path) -> None:
    """From the same batches the one that a single process learns, from others one nearer to all."""
    context = multiprocessing.get_context("forkserver")
    group = [
        context.Process(target=distill_in_a_group, args=(rank, 2, tmp_path)) for rank in range(2)
    ]
    for process in group:
        process.start()
    torch.manual_seed(0)
    dense, small = pair()
    alone = state(distill(small, dense, batches(4), steps=5))
    for process in group:
        process.join()
    assert [process.exitcode for process in group] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert equal(first["same"], second["same"])
    assert equal(first["own"], second["own"])
    for name, tensor in alone.items():
        torch.testing.assert_close(first["same"][name], tensor, rtol=1e-5, atol=1e-6)


def test_the_losses_are_what_they_say() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p, q = y.softmax(1), x.softmax(1)
    expected = (p * (p / q).log()).sum() / len(x)
    torch.testing.assert_close(kullback_leibler(x, y).double(), expected, rtol=1e-5, atol=1e-6)
    error = torch.linalg.vector_norm(x - y) ** 2 / torch.linalg.vector_norm(y) ** 2
    torch.testing.assert_close(squared_error(x, y).double(), error, rtol=1e-5, atol=1e-6)
    assert float(squared_error(torch.zeros(3), torch.zeros(3))) == 0


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [one_cycle(step / 100) for step in range(101)]
    top = rates.index(max(rates))
    assert math.isclose(rates[0], 0.04)
    assert math.isclose(rates[top], 1)
    assert math.isclose(rates[-1], 0, abs_tol=1e-12)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_what_cannot_be_done_is_one_line(error_of: Callable[..., str]) -> None:
    dense, small = pair()
    assert "2 batches leave none" in error_of(distill, small, dense, batches(2), steps=1)
    assert "0 batches leave none" in error_of(distill, small, dense, [], steps=1)
    assert "give steps or minutes" in error_of(distill, small, dense, batches(3), steps=None)
    assert "minutes=0" in error_of(distill, small, dense, batches(3), minutes=0)
    other = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert "small is not made of this dense" in error_of(distill, small, other, batches(3), steps=1)
    frozen = copy.deepcopy(small).requires_grad_(False)
    assert "distill(small, dense, batches)" in error_of(distill, dense, small, batches(3))
    assert "all is frozen" in error_of(distill, frozen, dense, batches(3), steps=1)


def test_linear_layers_alone_are_distilled_too() -> None:
    dense = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    x = [torch.randn(64, 32) for _ in range(8)]
    made = plan(dense, "svd", ratio=4, example_input=x[0], layers=Layers(linear=True))
    small = decompose(dense, made)
    learned = distill(small, dense, x, steps=80)
    unseen = [(torch.randn(64, 32),)]
    assert divergence_from(dense, learned, unseen) < divergence_from(dense, small, unseen)
