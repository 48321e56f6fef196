"""A whole benchmark: every layer by itself, both networks in every setting, peak memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deeptwist.app.benchmark.layers import LayerComparison, compare_layers
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.networks import (
    Measurement,
    PeakMemory,
    Setting,
    measure,
    measure_memory,
)
from deeptwist.plan.plan import Plan


@dataclass(frozen=True)
class BenchmarkResult:
    """The measurements of a network, dense and decomposed.

    Attributes:
        machine: in one line.
        parameters_before: of the dense network.
        parameters: of the decomposed one.
        macs_before: for one example, of the dense network.
        macs: for one example.
        networks: both networks in each setting.
        layers: each layer by itself; empty where they were left out.
        peak_memory: of both networks, in the first setting's batch.
    """

    machine: str
    parameters_before: int
    parameters: int
    macs_before: int
    macs: int
    networks: tuple[Measurement, ...]
    layers: tuple[LayerComparison, ...]
    peak_memory: PeakMemory

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        layers = [{**asdict(layer), "efficiency": layer.efficiency} for layer in self.layers]
        return {**asdict(self), "layers": layers}


def benchmark(
    dense: nn.Module,
    decomposed: nn.Module,
    plan: Plan,
    example_input: Callable[[int], Tensor],
    settings: Sequence[Setting],
    *,
    rounds: int = 15,
    layers: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> BenchmarkResult:
    """Time a network dense and decomposed, in turn, in one process.

    Args:
        dense: one network.
        decomposed: the other, of the plan.
        plan: of the dense network.
        example_input: gives an input of so many examples.
        settings: to time in; each layer by itself and the memory take the first.
        rounds: samples of each network in each setting, two at least.
        layers: whether each layer is timed by itself too.
        on_step: called after every layer and after every round.
    """
    first = settings[0]
    torch.set_num_threads(first.threads)
    compared: list[LayerComparison] = []
    if layers:
        reference = next(dense.parameters()).to(getattr(torch, first.dtype))
        compared = compare_layers(
            plan, reference, batch=first.batch, rounds=rounds, on_layer=on_step
        )
    networks = measure(dense, decomposed, example_input, settings, rounds=rounds, on_round=on_step)
    return BenchmarkResult(
        machine=describe_machine(),
        parameters_before=sum(p.numel() for p in dense.parameters()),
        parameters=sum(p.numel() for p in decomposed.parameters()),
        macs_before=plan.dense_macs,
        macs=plan.macs,
        networks=tuple(networks),
        layers=tuple(compared),
        peak_memory=measure_memory(dense, decomposed, example_input(first.batch)),
    )
