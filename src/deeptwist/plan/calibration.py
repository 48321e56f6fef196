"""Calibration: the second moment of every layer's inputs, gathered from a few batches."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional

from deeptwist.distributed import world_size
from deeptwist.errors import DeepTwistError, check_int, explaining
from deeptwist.files import check_suffix
from deeptwist.inspection.run import ExampleInput, preserving_state, read_batches
from deeptwist.inspection.usage import inspect_model
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.layers.moments import SecondMoment

_CHUNK_NUMEL = 2**24  # patches that are laid out at once: 64 MB in fp32
_PATCHES_PER_SIDE = 32  # of a batch, for each row of a moment: more tell hardly more
_MIN_PATCHES = 8192
_LEAST, _MOST = 1e-15, 1e15  # whose squares, summed, fp32 holds in full precision
_KEY = "deeptwist_calibration"


@dataclass(frozen=True)
class Calibration:
    """The second moments of the inputs of a model's layers.

    Attributes:
        moments: by layer name.
    """

    moments: Mapping[str, SecondMoment]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, of every moment its upper triangle; `load` reads it."""
        check_suffix(Path(path), ".safetensors")
        shapes = {name: [list(m.kernel_size), m.axes] for name, m in self.moments.items()}
        tensors = {name: m.values[:, *_upper(m.values)].cpu() for name, m in self.moments.items()}
        save_file(tensors, path, metadata={_KEY: json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            DeepTwistError: if the file cannot be read, or holds no calibration.
        """
        # Damaged files surface as a dozen types.
        with (
            explaining(f"cannot read calibration {path}", errors=(Exception,)),
            safe_open(path, framework="pt") as file,
        ):
            shapes = json.loads((file.metadata() or {})[_KEY])
            moments = {
                name: SecondMoment(_whole(file.get_tensor(name)), tuple(size), axes)
                for name, (size, axes) in shapes.items()
            }
        return cls(moments)


def _upper(values: Tensor) -> Tensor:  # (g, n, n) → (2, n·(n + 1) / 2)
    """Return the rows and the columns of what lies on or above the diagonal."""
    return torch.triu_indices(*values.shape[1:], device=values.device)


def _whole(triangle: Tensor) -> Tensor:  # (g, n·(n + 1) / 2) → (g, n, n)
    """Return the symmetric matrices of these upper triangles."""
    side = (math.isqrt(8 * triangle.shape[1] + 1) - 1) // 2
    values = triangle.new_zeros(len(triangle), side, side)
    values[:, *_upper(values)] = triangle
    return values + values.triu(1).mT


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    inputs: Callable[[Any], ExampleInput] | None = None,
    max_side: int = 4608,
) -> Calibration:
    """Gather the second moment of what every layer's lowered kernel multiplies.

    Under torch.distributed every process gives its own batches, as many as the others, and all
    get the moments of all. The model is run in evaluation mode and left as it was. Of a large
    batch a layer sees a sample of its patches: 32 times as many as its moment has rows.

    Args:
        model: any network.
        batches: tensors, dicts of keyword arguments (``label`` and ``labels`` are left out), or
            tuples and lists that begin with one of these, as data loaders give them; labels are
            not needed. All of them are run.
        inputs: a batch → a tensor, the tuple of the model's arguments or a dict of its keyword
            arguments, for anything else.
        max_side: of a layer's moment, which holds its square in fp32: 4,608 (a 3×3 kernel over
            512 channels) is 85 MB. Beyond it, fewer kernel axes are resolved.

    Raises:
        DeepTwistError: if there is no batch, or a layer's inputs are not finite.
    """
    check_int("max_side", max_side)
    device = next(model.parameters()).device
    collectors: dict[str, _Collector] = {}
    with ExitStack() as stack:
        for x in read_batches(batches, inputs, device):
            for layer in () if collectors else inspect_model(model, x)[0]:
                if (weight := layer.weight) is not None:
                    axes = _resolved_axes(weight.geometry, max_side)
                    hook = _Collector(weight.geometry, axes, weight.padding)
                    collectors[layer.names[0]] = hook
                    handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.enter_context(handle)
            with preserving_state(model, x), explaining("the model cannot run on a batch"):
                x.run(model)
    if not collectors:
        raise DeepTwistError(f"there is nothing to calibrate: {type(model).__name__} has no layer")
    moments = {}
    for name, collector in collectors.items():
        if collector.total is None:  # its weight is read by another module, or not in use
            continue
        moments[name] = collector.moment()
        if not moments[name].values.isfinite().all():
            raise DeepTwistError(f"layer {name!r} has inputs that are NaN or infinite")
    return Calibration(moments)


def _resolved_axes(convolution: ConvGeometry, max_side: int) -> int:
    """Return how many of the last kernel axes a moment of bounded size resolves."""
    channels, size = convolution.in_channels // convolution.groups, convolution.kernel_size
    fitting = [
        axes
        for axes in range(convolution.dims + 1)
        if channels * math.prod(size[convolution.dims - axes :]) <= max_side
    ]
    return max(fitting, default=0)


@dataclass(eq=False)
class _Collector:
    """A forward hook that sums p pᵀ over all patches p that a layer sees."""

    convolution: ConvGeometry
    axes: int
    padding: nn.Module | None
    total: Tensor | None = None
    count: int = 0
    dtype: torch.dtype = torch.float32  # of what it sees

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (x,) = *args, *kwargs.values()
        with torch.autocast(x.device.type, enabled=False):
            x, self.dtype = x if self.padding is None else self.padding(x), x.dtype
            # Beyond these, squares leave the range of fp32, or lose their digits.
            is_usual = x.numel() == 0 or _LEAST <= float(x.abs().amax()) <= _MOST
            self._add(x.float() if x.dtype != torch.float64 and is_usual else x.double())

    def _add(self, x: Tensor) -> None:
        convolution, groups = self.convolution, self.convolution.groups
        if convolution.dims == 0:
            self._add_patches(x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1))
            return
        if x.dim() == convolution.dims + 1:
            x = x[None]
        positions = math.prod(convolution.output_size(x.shape[2:]))
        taps = math.prod(convolution.kernel_size[convolution.dims - self.axes :])
        side = x.shape[1] // groups * taps
        limit = max(_MIN_PATCHES, _PATCHES_PER_SIDE * side) // len(x) + 1
        chosen = None
        if positions > limit:  # not always the same, and never a pattern of the image's columns
            generator = torch.Generator().manual_seed(self.count)
            chosen = torch.randperm(positions, generator=generator)[:limit].to(x.device)
            positions = limit
        step = max(1, _CHUNK_NUMEL // max(1, x.shape[1] * taps * positions))
        for chunk in x.split(step):
            for slices in self._slices(chunk):
                flat = [view.flatten(2) for view in slices]
                if chosen is not None:
                    flat = [view.index_select(2, chosen) for view in flat]
                # (n, g, i·taps, positions) → (g, n·positions, i·taps)
                patches = torch.stack(flat, dim=2)
                patches = patches.reshape(len(chunk), groups, -1, patches.shape[-1])
                self._add_patches(patches.permute(1, 0, 3, 2).flatten(1, 2))

    def _add_patches(self, patches: Tensor) -> None:
        if self.total is None:
            side = patches.shape[-1]
            self.total = patches.new_zeros(len(patches), side, side)
        product = patches.mT @ patches
        self.total = self.total.to(torch.promote_types(self.total.dtype, product.dtype))
        self.total += product
        self.count += patches.shape[1]

    def _slices(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Yield, for each tap of the unresolved axes, what the taps of the others see."""
        convolution = self.convolution
        x, size = self._padded(x), convolution.output_size(x.shape[2:])
        taps = [range(k) for k in convolution.kernel_size]
        split = convolution.dims - self.axes
        for outer in product(*taps[:split]):
            slices = []
            for inner in product(*taps[split:]):
                index = [slice(None)] * 2
                for axis, tap in enumerate((*outer, *inner)):
                    stride = convolution.stride[axis]
                    if convolution.transposed:
                        tap, stride = convolution.kernel_size[axis] - 1 - tap, 1
                    start = tap * convolution.dilation[axis]
                    index.append(slice(start, start + (size[axis] - 1) * stride + 1, stride))
                slices.append(x[tuple(index)])
            yield slices

    def _padded(self, x: Tensor) -> Tensor:
        convolution = self.convolution
        margins: list[int] = []
        size = convolution.output_size(x.shape[2:])
        if convolution.transposed:
            x = _spread(x, convolution.stride)
        for axis in range(convolution.dims):
            reach = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1)
            if convolution.padding == "same":
                left, right = reach // 2, reach - reach // 2
            elif convolution.transposed:
                left = reach - convolution.padding[axis]
                right = reach + size[axis] - left - x.shape[axis + 2]
            else:
                left = right = convolution.padding[axis]
            margins = [left, right, *margins]  # `pad` begins with the last axis
        mode = convolution.padding_mode.replace("zeros", "constant")
        return functional.pad(x, margins, mode=mode) if any(margins) else x

    def moment(self) -> SecondMoment:
        """Return the mean over all patches, of all processes."""
        if self.total is None:
            raise DeepTwistError("a layer that was inspected is not called on these batches")
        total = self.total.double()  # of one type in all processes
        count = total.new_tensor(self.count)
        if world_size() > 1:
            distributed.all_reduce(total)
            distributed.all_reduce(count)
        half = (total / count).triu()  # products of matrices are symmetric up to rounding
        values = half + half.triu(1).mT
        if self.dtype != torch.float64 and _LEAST**2 <= float(values.abs().amax()) <= _MOST**2:
            values = values.float()
        return SecondMoment(values, self.convolution.kernel_size, self.axes)


def _spread(x: Tensor, strides: Sequence[int]) -> Tensor:  # (n, c, *size)
    """Put stride − 1 zeros between neighbours of a transposed convolution's input."""
    steps = [slice(None, None, stride) for stride in strides]
    size = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *size)
    spread[:, :, *steps] = x
    return spread
