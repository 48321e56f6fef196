"""The proof that an exported file computes what the model computes.

At several batch sizes, and at several image sizes where these are free: torch's own
``verify=True`` runs the input that was traced alone, and logs what differs.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.export.signature import Inputs, Signature, run_model
from deeptwist.measure.runtimes import onnxruntime_session

Run = Callable[[Inputs], list[Tensor]]


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
    differences = [_difference(plain, run, inputs, tolerance) for inputs in probes]
    sizes = [tuple(inputs[0].shape[2:]) for inputs in probes[len(signature.batches) :]]
    return tuple(sizes), max((x for x in differences if x is not None), default=None)


def _difference(
    plain: nn.Module,
    run: Run,
    inputs: Inputs,
    tolerance: float | None,
) -> float | None:
    """Return the largest relative difference of an output; `None` where there are no numbers."""
    expected, outputs = run_model(plain, inputs), run(inputs)
    shapes = [[tuple(y.shape) for y in tensors] for tensors in (expected, outputs)]
    place = "inputs " + ", ".join(str(tuple(x.shape)) for x in inputs)
    if shapes[0] != shapes[1]:
        raise DeepTwistError(
            f"the export gives outputs of shapes {shapes[1]} on {place} where the model gives "
            f"{shapes[0]}"
        )
    worst = None
    for y, output in zip(expected, outputs, strict=True):
        if not y.numel():
            continue
        difference = relative_error(y, output)
        limit = _tolerance(y) if tolerance is None else tolerance
        if not difference <= limit:  # NaN is not
            raise DeepTwistError(
                f"the export does not compute what the model does: outputs differ by "
                f"{difference:.1e} on {place}, above the tolerance {limit:.1e}"
            )
        worst = max(worst or 0.0, difference)
    return worst


def _tolerance(y: Tensor) -> float:
    return torch.finfo(y.dtype).eps ** 0.5 if y.is_floating_point() else 0.0


def run_in_onnxruntime(path: Path) -> Run:
    """Return a call that runs the file in onnxruntime."""
    session = onnxruntime_session(path, torch.get_num_threads())
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        try:
            arrays = [x.numpy() for x in inputs]
            outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        except Exception as error:
            raise DeepTwistError(
                f"onnxruntime cannot run the graph: {first_line(error)}"
            ) from error
        return [torch.as_tensor(output) for output in outputs]

    return run
