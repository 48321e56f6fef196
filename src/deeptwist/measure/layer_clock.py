"""How long layers take here: timed at a few ranks, interpolated between them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import numpy
import torch
from torch import Tensor, nn

from deeptwist.decompositions import CannotDecomposeError, Decomposition, FactoredLayer
from deeptwist.inspection.run import Inputs
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.machine import LatencyCache
from deeptwist.measure.runtimes import Setting
from deeptwist.measure.timing import Clock, time_modules

Layer = TypeVar("Layer", bound=nn.Module)


def at_batch(call: LayerCall, examples: int, batch: int) -> LayerCall:
    """Return a call recorded on so many examples as a batch makes it."""
    return LayerCall(max(1, call.count * batch // examples), call.size)


def random_input(convolution: ConvGeometry, call: LayerCall, reference: Tensor) -> Tensor:
    """Return standard normal numbers of a call's shape; images in channels_last."""
    x = torch.randn(call.count, convolution.in_channels, *call.size).to(reference)
    return x.to(memory_format=torch.channels_last) if convolution.dims == 2 else x


def random_dense(convolution: ConvGeometry, reference: Tensor) -> nn.Module:
    """Return the layer of this geometry with random weights, ready to be timed."""
    kernel = torch.randn(convolution.kernel_shape).to(reference)
    bias = reference.new_zeros(convolution.out_channels)
    return _for_inference(convolution.make_module(kernel, bias), convolution)


def random_kernels(
    convolution: ConvGeometry, decomposition: Decomposition, reference: Tensor
) -> list[Tensor]:
    """Return random kernels of a factored layer, in the reference's type and place."""
    # Scaled so that a whole network of such layers neither overflows nor vanishes.
    return [
        (torch.randn(part.kernel_shape) * math.prod(part.kernel_shape[2:]) ** -0.5).to(reference)
        for part in decomposition.parts(convolution)
    ]


def random_factored(
    convolution: ConvGeometry, decomposition: Decomposition, reference: Tensor
) -> FactoredLayer:
    """Return the factored layer with random weights, ready to be timed."""
    kernels = random_kernels(convolution, decomposition, reference)
    bias = reference.new_zeros(convolution.out_channels)
    return _for_inference(decomposition.make_layer(convolution, kernels, bias), convolution)


def _for_inference(layer: Layer, convolution: ConvGeometry) -> Layer:
    layer = layer.eval().requires_grad_(False)
    return layer.to(memory_format=torch.channels_last) if convolution.dims == 2 else layer


_TIMED = 6  # ranks of each method
_WIDTHS = 16, 8  # of vectors of fp32: AVX-512, AVX2
_STEP_RANK = 32  # after which a step is looked for


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
        setting: Setting,
        clock: Clock = time_modules,
        cache: LatencyCache | None = None,
    ) -> None:
        """Keep what is timed.

        Args:
            reference: a tensor of the device and the dtype to time in.
            examples: in the input that the layers' calls were recorded on.
            setting: the batch that they are timed at, and what runs them.
            clock: returns the milliseconds of modules on the same input.
            cache: keeps them for other plans.
        """
        self._setting, self._clock = setting, clock
        self._reference = reference
        self._examples, self._cache = examples, cache
        self._known: dict[str, list[float]] = {} if cache is None else cache.read()

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
        parts = [self._time(convolution, call, forms) for call in calls]
        forms_times = zip(*(times for _, times in parts), strict=True)
        return sum(dense for dense, _ in parts), [sum(times) for times in forms_times]

    def rank_multiple(
        self, convolution: ConvGeometry, call: LayerCall, method: Decomposition
    ) -> int:
        """Return of which number ranks had best be multiples: the width of vectors, if it shows.

        With vectors of 16 numbers, 33 hidden channels take as long as 48, and 32 a step less.
        """
        try:
            method = method.resolve(convolution, 2)
        except CannotDecomposeError:
            return 1
        full = method.full_rank(convolution)
        count, least = (len(full), min(full)) if isinstance(full, tuple) else (0, full)
        if least < _STEP_RANK + max(_WIDTHS):
            return 1
        added = 0, 1, *sorted(_WIDTHS)
        ranks = [_STEP_RANK + more for more in added]
        forms = [replace(method, rank=(rank,) * count if count else rank) for rank in ranks]
        _, *times = self._milliseconds(convolution, call, forms)
        by_added = dict(zip(added, times, strict=True))
        for width in _WIDTHS:
            whole = by_added[width] - by_added[0]
            # Without steps, one more rank takes 1 / width of the way.
            if whole > 0.02 * by_added[0] and by_added[1] - by_added[0] > whole / 2:
                return width
        return 1

    def _time(
        self, convolution: ConvGeometry, call: LayerCall, forms: Sequence[Decomposition]
    ) -> tuple[float, list[float]]:
        macs = [form.macs(convolution, call.size) for form in forms]
        methods = [
            [*group] for _, group in groupby(range(len(forms)), lambda i: forms[i].without_rank())
        ]
        timed = [sorted(group, key=macs.__getitem__) for group in methods]
        timed = [[group[i] for i in _spread(len(group))] for group in timed]
        places = [i for group in timed for i in group]
        dense, *medians = self._milliseconds(convolution, call, [forms[i] for i in places])
        known = dict(zip(places, medians, strict=True))
        times = [0.0] * len(forms)
        for group, own in zip(methods, timed, strict=True):
            curve = [macs[i] for i in own], [known[i] for i in own]
            for i in group:
                times[i] = float(numpy.interp(macs[i], *curve))
        return dense, times

    def _milliseconds(
        self, convolution: ConvGeometry, call: LayerCall, forms: Sequence[Decomposition]
    ) -> list[float]:
        """Return the medians of the dense layer and of these forms, as timed or known before."""
        reference = self._reference
        call = at_batch(call, self._examples, self._setting.batch)
        what = convolution, call, *forms, reference.dtype, reference.device
        key = "; ".join(map(repr, what))
        if key not in self._known:
            x = random_input(convolution, call, reference)
            layers = [random_dense(convolution, reference)]
            layers += [random_factored(convolution, form, reference) for form in forms]
            samples = self._clock(layers, Inputs.of(x), self._setting)
            self._known[key] = [*map(statistics.median, samples)]
            if self._cache is not None:
                self._cache.add(key, self._known[key])
        return self._known[key]


def _spread(count: int) -> list[int]:
    """Return at most so many places of a list, the first and the last among them."""
    return sorted({round(place) for place in numpy.linspace(0, count - 1, min(count, _TIMED))})
