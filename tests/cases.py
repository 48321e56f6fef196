"""The tables that the tests walk: a new decomposition joins them by one line in `METHODS`."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, DeepTwistError, Layers, SpatialSVD, TiledSVD, Tucker
from deeptwist.decompositions import FactoredLayer, Factors
from deeptwist.layers.geometry import ConvGeometry, kernel_to_weight, weight_to_kernel

# What most tests plan: a network's first convolution and its linear layers too.
EVERY_LAYER = Layers(skip_first_conv=False, linear=True)


def every_layer(**rules: Any) -> Layers:
    """Return the rules of `EVERY_LAYER`, but for these."""
    return replace(EVERY_LAYER, **rules)


METHODS: dict[str, Decomposition] = {  # their ranks are open; `at` sets them
    "svd": SVD(),
    "tiled": TiledSVD(),
    "tiled-rows": TiledSVD(tile=(4, 999)),
    "tiled-ragged": TiledSVD(tile=(3, 7)),
    "tiled-aligned": TiledSVD(tile=(4, 18)),
    "spatial": SpatialSVD(),
    "tucker": Tucker(),
    "cp": CP(),
}
# In a plan: narrow raw tiles over few taps do more MACs than the dense layer, which then stays.
PLANNED_METHODS = METHODS | {"tiled-ragged": TiledSVD(tile=(7, 34))}
LARGEST_RANK = {"cp": 6}  # it has no full rank to speak of, and high ones take long
EXACT = tuple(name for name in METHODS if name != "cp")  # at full rank

# (layer, input shape); the weights are drawn where a test builds the layer
GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 8)),
    "no bias": (lambda: nn.Conv2d(6, 10, 3, bias=False), (2, 6, 7, 8)),
    "more in than out": (lambda: nn.Conv2d(11, 4, 3), (2, 11, 7, 8)),
    "stride": (lambda: nn.Conv2d(6, 10, 3, stride=(2, 3), padding=(1, 2)), (2, 6, 9, 8)),
    "dilation": (lambda: nn.Conv2d(6, 10, 3, dilation=(1, 2), padding=2), (2, 6, 9, 8)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 7, 8)),
    "depth multiplier": (lambda: nn.Conv2d(4, 12, 3, groups=4), (2, 4, 7, 8)),
    "1x1": (lambda: nn.Conv2d(6, 10, 1, stride=2), (2, 6, 7, 8)),
    "1x1 padded": (lambda: nn.Conv2d(6, 10, 1, padding=1), (2, 6, 7, 8)),
    "row": (lambda: nn.Conv2d(6, 10, (1, 3), padding=(0, 1)), (2, 6, 7, 8)),
    "row, strided across": (lambda: nn.Conv2d(6, 10, (1, 3), stride=(2, 1)), (2, 6, 7, 8)),
    "column, padded across": (lambda: nn.Conv2d(6, 10, (3, 1), padding=(1, 1)), (2, 6, 7, 8)),
    "same": (lambda: nn.Conv2d(6, 10, 3, padding="same"), (2, 6, 7, 8)),
    "same, even kernel": (lambda: nn.Conv2d(6, 10, (4, 2), padding="same"), (2, 6, 7, 8)),
    "same, dilated": (
        lambda: nn.Conv2d(6, 10, (2, 3), padding="same", dilation=(3, 2)),
        (2, 6, 9, 8),
    ),
    "valid": (lambda: nn.Conv2d(6, 10, 3, padding="valid"), (2, 6, 7, 8)),
    "reflect": (lambda: nn.Conv2d(6, 10, 3, padding=(2, 1), padding_mode="reflect"), (2, 6, 7, 8)),
    "replicate": (
        lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="replicate"),
        (2, 6, 7, 8),
    ),
    "circular same": (
        lambda: nn.Conv2d(6, 10, (3, 2), padding="same", padding_mode="circular"),
        (2, 6, 7, 8),
    ),
    "one channel": (lambda: nn.Conv2d(1, 5, 5), (2, 1, 7, 8)),
    "linear": (lambda: nn.Linear(9, 14), (3, 9)),
    "linear, tokens": (lambda: nn.Linear(9, 14, bias=False), (3, 5, 9)),
    "1-D": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 9)),
    "1-D groups": (lambda: nn.Conv1d(6, 9, 3, groups=3, padding="same"), (2, 6, 9)),
    "3-D": (lambda: nn.Conv3d(4, 6, (3, 2, 3), stride=(1, 2, 1), padding=1), (2, 4, 5, 6, 5)),
    "3-D groups": (lambda: nn.Conv3d(4, 6, 3, groups=2, padding="same"), (2, 4, 4, 5, 5)),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(6, 10, 3, 2, 1, 1), (2, 6, 7)),
    "transposed 2-D": (
        lambda: nn.ConvTranspose2d(6, 10, 3, (2, 1), (1, 0), (1, 0), bias=False),
        (2, 6, 5, 6),
    ),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(6, 4, (2, 3), 2, groups=2, dilation=(2, 1)),
        (2, 6, 5, 6),
    ),
    "transposed 3-D": (lambda: nn.ConvTranspose3d(4, 6, 2, 2), (2, 4, 3, 4, 3)),
}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Any convolution that torch builds, and an input size that it takes."""
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    size, stride, dilation = each(1, 4), each(1, 3), each(1, 2)
    options = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if draw(st.booleans()):
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        extra = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        layer = kind(*channels, size, stride, each(0, 1), extra, **options)
        return layer, each(5, 8)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    if draw(st.booleans()):
        return kind(*channels, size, padding="same", **options), each(7, 9)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    return kind(*channels, size, stride, each(0, 2), padding_mode=mode, **options), each(7, 9)


TOLERANCE = {  # of a relative difference
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 6e-3,
    torch.bfloat16: 5e-2,
}


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message with which the call is refused; it is one line."""
    with pytest.raises(DeepTwistError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def at(method: Decomposition, convolution: ConvGeometry, share: float) -> Decomposition:
    """The method at this share of its full rank, and at rank 1 at least."""
    full, most = method.full_rank(convolution), LARGEST_RANK.get(method.method, 10**9)
    if isinstance(full, int):
        rank: Any = max(1, int(share * min(full, most)))
    else:
        rank = tuple(max(1, int(share * each)) for each in full)
    return replace(method, rank=rank).resolve(convolution, None)


def pairs(
    methods: Iterable[str] = tuple(METHODS), geometries: Iterable[str] = tuple(GEOMETRIES)
) -> list[Any]:
    """Every method with every geometry, as pytest parameters."""
    return [
        pytest.param(METHODS[name], geometry, id=f"{name}-{geometry}")
        for name in methods
        for geometry in geometries
    ]


def build(geometry: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A layer of this geometry, and an input for it."""
    make, shape = GEOMETRIES[geometry]
    return make().to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype)


def read(layer: nn.Module) -> tuple[ConvGeometry, Tensor]:
    """A layer's geometry and kernel."""
    convolution = ConvGeometry.from_module(layer)
    return convolution, weight_to_kernel(layer.weight.detach(), convolution)


_FACTORS: dict[object, Factors] = {}


def decompose(decomposition: Decomposition, kernel: Tensor) -> Factors:
    """A kernel's factors, computed once for all laws: that this may be repeated is one of them."""
    numbers = kernel.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    key = decomposition, kernel.dtype, kernel.device, kernel.shape, numbers
    if key not in _FACTORS:
        _FACTORS[key] = decomposition.decompose(kernel)
    return _FACTORS[key]


def factored(layer: nn.Module, decomposition: Decomposition) -> tuple[Factors, FactoredLayer]:
    """A layer's factors, and the layer that holds them."""
    convolution, kernel = read(layer)
    factors = decompose(decomposition, kernel)
    kernels = [part.to(kernel.dtype) for part in factors.kernels()]
    return factors, decomposition.make_layer(convolution, kernels, layer.bias)


def with_kernel(layer: nn.Module, kernel: Tensor) -> nn.Module:
    """The same layer with another kernel (g, o, i, *k)."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.copy_(kernel_to_weight(kernel, ConvGeometry.from_module(layer)))
    return twin


def difference(expected: Tensor, actual: Tensor) -> float:
    """‖y − y′‖ / ‖y‖, of tensors of one shape and type."""
    assert actual.shape == expected.shape
    expected, actual = expected.detach().double(), actual.detach().double()
    scale = expected.abs().max().clamp_min(1e-300)
    norm = torch.linalg.vector_norm(expected / scale)
    away = torch.linalg.vector_norm((expected - actual) / scale)
    return float(away / norm) if norm > 0 else float(away)


JUNK = [
    None, True, False, 0, -1, 1, 2.5, 10**30, -(10**30), float("inf"), float("nan"), "", "same",
    "two\nlines", "../../etc/passwd", "0.weight", [], [0], [-1, -1], [10**9, 10**9], [[3]], ["3"],
    {}, {"method": "svd"}, {"method": "svd", "rank": 10**9}, {"method": "cp", "rank": 10**9},
]  # fmt: skip


@st.composite
def spoiled(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one value, anywhere, replaced, removed or added."""
    document = copy.deepcopy(document)
    place, keys = document, _keys(document)
    key = draw(st.sampled_from(keys))
    while _keys(place[key]) and draw(st.integers(0, 4)):
        place, keys = place[key], _keys(place[key])
        key = draw(st.sampled_from(keys))
    match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
        case "replace":
            place[key] = draw(st.sampled_from(JUNK))
        case "remove":
            del place[key]
        case "add" if isinstance(place, dict):
            place[draw(st.sampled_from(["two\nlines", "extra", "../up"]))] = place[key]
        case "add":
            place.append(draw(st.sampled_from(JUNK)))
    return document


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def works_or_is_refused(call: Callable[[], object]) -> None:
    """Nothing but a `DeepTwistError` of one line may come out of it."""
    message = ""
    try:
        call()
    except DeepTwistError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1, message


# --- how much memory a function takes at its peak, as torch's allocator sees it


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were held at once while a function ran, above those before.

    On a processor every allocation is read from torch's profiler, so that two runs agree to the
    byte, which the process's resident size never does. On CUDA it is the allocator's own peak.

    Args:
        run: the function; it should have run before, so that what is made once is not counted.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler chatters on standard error
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    if not changes:
        return 0
    first = min(changes, key=lambda change: change["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    peak = max(change["args"]["Total Allocated"] for change in changes)
    return max(0, int(peak - before))
