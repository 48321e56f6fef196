"""How long layers take here: timed at a few ranks, interpolated between them."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import numpy
import torch
from torch import Tensor, nn

from deeptwist.decompositions import Decomposition
from deeptwist.layers.cost import LayerCall
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.plan.autotune import at_batch, random_dense, random_factored, random_input
from deeptwist.plan.timing import Samples, time_interleaved

_TIMED = 6  # ranks of each method

Prepare = Callable[[nn.Module, Tensor], Callable[[], object]]
Measure = Callable[[Sequence[Callable[[], object]]], Sequence[Samples]]


class LayerClock:
    """Times layers of random numbers, dense and factored in turn, each geometry once.

    The milliseconds of ranks that are not timed lie on the straight lines, over the MACs, between
    those that are.
    """

    def __init__(
        self,
        reference: Tensor,
        *,
        examples: int,
        batch: int,
        prepare: Prepare | None = None,
        measure: Measure = time_interleaved,
    ) -> None:
        """Keep what is timed.

        Args:
            reference: a tensor of the device and the dtype to time in.
            examples: in the input that the layers' calls were recorded on.
            batch: examples in the batch that they are timed at.
            prepare: returns a call of a module on an input; PyTorch as it is without it.
            measure: returns the milliseconds of such calls.
        """
        self._reference, self._prepare = reference, prepare or _run_eagerly
        self._measure = measure
        self._examples, self._batch = examples, batch
        self._known: dict[object, tuple[float, list[float]]] = {}

    def times(
        self,
        convolution: ConvGeometry,
        calls: tuple[LayerCall, ...],
        forms: Sequence[Decomposition],
    ) -> tuple[float, list[float]]:
        """Return the milliseconds of all calls of the dense layer, and of each form of it.

        Args:
            convolution: of the layer.
            calls: of the layer, in one pass of the network.
            forms: with every rank set, those of one method after one another.
        """
        key = convolution, calls, tuple(forms)
        if key not in self._known:
            parts = [self._time(convolution, call, forms) for call in calls]
            dense = sum(part[0] for part in parts)
            self._known[key] = (
                dense,
                [sum(each) for each in zip(*(p[1] for p in parts), strict=True)],
            )
        return self._known[key]

    def _time(
        self, convolution: ConvGeometry, call: LayerCall, forms: Sequence[Decomposition]
    ) -> tuple[float, list[float]]:
        timed_call = at_batch(call, self._examples, self._batch)
        x = random_input(convolution, timed_call, self._reference)
        macs = [form.macs(convolution, call.size) for form in forms]
        methods = [
            [*group] for _, group in groupby(range(len(forms)), lambda i: forms[i].without_rank())
        ]
        timed = [sorted(group, key=macs.__getitem__) for group in methods]
        timed = [[group[i] for i in _spread(len(group))] for group in timed]
        layers = [random_dense(convolution, self._reference)]
        layers += [
            random_factored(convolution, forms[i], self._reference, None)
            for group in timed
            for i in group
        ]
        with torch.inference_mode():
            samples = self._measure([self._prepare(layer, x) for layer in layers])
        dense, *medians = map(statistics.median, samples)
        known = dict(zip((i for group in timed for i in group), medians, strict=True))
        times = [0.0] * len(forms)
        for group, own in zip(methods, timed, strict=True):
            curve = [macs[i] for i in own], [known[i] for i in own]
            for i in group:
                times[i] = float(numpy.interp(macs[i], *curve))
        return dense, times


def _run_eagerly(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return partial(module, x)


def _spread(count: int) -> list[int]:
    """Return at most so many places of a list, the first and the last among them."""
    return sorted({round(place) for place in numpy.linspace(0, count - 1, min(count, _TIMED))})
