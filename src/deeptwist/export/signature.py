"""What an exported file takes: the shapes of an example, with free axes among them."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, check_int
from deeptwist.inspection.run import explaining, output_tensors

BATCHES = 1, 2, 5  # one, the one that is traced, another
_GROWTHS = 1, 8, 32  # by which a free height is larger, twice that a width, where the model runs
_SPATIAL = {3: {2: "length"}, 4: {2: "height", 3: "width"}, 5: {3: "height", 4: "width"}}

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Signature:
    """What a file takes: the example's shapes, with free axes among them."""

    example: Inputs
    batch: int | None  # `None` where it is free
    dynamic_size: bool

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes to compare outputs at."""
        return BATCHES if self.batch is None else (self.batch,)

    @property
    def free_axes(self) -> list[dict[int, str]]:
        """The names of each input's free axes."""
        batch = {0: "batch"} if self.batch is None else {}
        return [{**batch, **self._spatial(x)} for x in self.example]

    def inputs(self, batch: int, growth: int = 0) -> Inputs:
        """Standard normal numbers, the same every time; the example's rows for integers."""
        generator = torch.Generator().manual_seed(0)

        def of(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x[torch.arange(batch) % len(x)]
            shape = [batch, *x.shape[1:]]
            for number, axis in enumerate(self._spatial(x), 1):
                shape[axis] += number * growth
            return torch.randn(shape, generator=generator).to(x.dtype)

        return tuple(of(x) for x in self.example)

    def probes(self, plain: nn.Module) -> list[Inputs]:
        """Inputs to compare outputs on: every batch size, and larger sizes that the model takes.

        Raises:
            DeepTwistError: if sizes are to be free and the model takes none but the example's.
        """
        probes = [self.inputs(batch) for batch in self.batches]
        if not self.dynamic_size:
            return probes
        for growth in _GROWTHS:
            larger = self.inputs(self.batches[0], growth)
            with contextlib.suppress(DeepTwistError):
                run_model(plain, larger)
                probes.append(larger)
        if len(probes) == len(self.batches):
            sizes = ", ".join(f"{growth} and {2 * growth}" for growth in _GROWTHS)
            raise DeepTwistError(
                f"{type(plain).__name__} does not run on inputs larger by {sizes}: its size "
                "cannot be free"
            )
        return probes

    def _spatial(self, x: Tensor) -> dict[int, str]:
        is_image = self.dynamic_size and x.is_floating_point()
        return _SPATIAL.get(x.dim(), {}) if is_image else {}


def make_signature(
    model: nn.Module, example_input: Tensor | Inputs, batch: int | None, dynamic_size: bool
) -> Signature:
    """Return what a file of this model takes; for the arguments see `export_onnx`.

    Raises:
        DeepTwistError: if an input has no batch in front, or none has a size that can be free.
    """
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    if not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) > 0 for x in example):
        raise DeepTwistError(
            f"{type(model).__name__} is exported for tensors with a batch in front: "
            "give a tensor of at least one example, or a tuple of such"
        )
    if batch is not None:
        check_int("batch", batch)
    signature = Signature(tuple(x.detach().cpu() for x in example), batch, dynamic_size)
    if dynamic_size and not any({*axes.values()} - {"batch"} for axes in signature.free_axes):
        raise DeepTwistError("no input has a height and width that could be free")
    return signature


def run_model(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the model's outputs, in order."""
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    with explaining(f"{type(model).__name__} cannot run on inputs {shapes}"), torch.no_grad():
        return output_tensors(model(*inputs))
