"""What an exported file takes, and the proof that it computes what the model computes.

At several batch sizes, and at several image sizes where these are free: torch's own
``verify=True`` runs the input that was traced alone, and logs what differs.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, explaining
from deeptwist.inspection.run import output_tensors

BATCHES = 1, 2, 5  # one, the one that is traced, another
_GROWTHS = 1, 8, 32  # by which a free height is larger, twice that a width, where the model runs
_SPATIAL = {3: {2: "length"}, 4: {2: "height", 3: "width"}, 5: {3: "height", 4: "width"}}

Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors], list[Tensor]]


@dataclass(frozen=True)
class Signature:
    """What a file takes: the example's shapes, with free axes among them."""

    example: Tensors
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

    def inputs(self, batch: int, growth: int = 0) -> Tensors:
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

    def probes(self, plain: nn.Module) -> list[Tensors]:
        """Tensors to compare outputs on: every batch size, and larger sizes that the model takes.

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


def run_model(model: nn.Module, inputs: Tensors) -> list[Tensor]:
    """Return the model's outputs, in order."""
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    with explaining(f"{type(model).__name__} cannot run on inputs {shapes}"), torch.no_grad():
        return output_tensors(model(*inputs))


def verify(
    plain: nn.Module, signature: Signature, run: Run, tolerance: float | None
) -> tuple[tuple[tuple[int, ...], ...], float | None]:
    """Compare a file's outputs with the model's on every probe of its signature.

    Args:
        plain: the model.
        signature: what the file takes.
        run: a call that runs the file.
        tolerance: the largest relative difference; by the outputs' type if `None`.

    Returns:
        The first input's spatial sizes besides the example's, and the largest relative difference;
        `None` where no output held a number.

    Raises:
        DeepTwistError: if a difference is above the tolerance, or if shapes differ.
    """
    probes = signature.probes(plain)
    differences: list[float] = []
    for inputs in probes:
        differences += _differences(run_model(plain, inputs), run(inputs), inputs, tolerance)
    sizes = tuple(tuple(inputs[0].shape[2:]) for inputs in probes[len(signature.batches) :])
    return sizes, max(differences, default=None)


def _differences(
    expected: list[Tensor], outputs: list[Tensor], inputs: Tensors, tolerance: float | None
) -> list[float]:
    """Return the relative difference of every output that holds numbers, none too large."""
    shapes = [[tuple(y.shape) for y in tensors] for tensors in (expected, outputs)]
    place = "inputs " + ", ".join(str(tuple(x.shape)) for x in inputs)
    if shapes[0] != shapes[1]:
        raise DeepTwistError(
            f"the export gives outputs of shapes {shapes[1]} on {place} where the model gives "
            f"{shapes[0]}"
        )
    differences = []
    for y, output in zip(expected, outputs, strict=True):
        if not y.numel():
            continue
        difference, limit = relative_error(y, output), tolerance
        if limit is None:
            limit = torch.finfo(y.dtype).eps ** 0.5 if y.is_floating_point() else 0.0
        if not difference <= limit:  # NaN is not
            raise DeepTwistError(
                f"the export does not compute what the model does: outputs differ by "
                f"{difference:.1e} on {place}, above the tolerance {limit:.1e}"
            )
        differences.append(difference)
    return differences
