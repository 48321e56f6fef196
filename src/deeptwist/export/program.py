"""A `torch.export` program, a plain state dict, and what every export begins and ends with.

A file takes its name only after it is complete and, where it can be run, verified.
"""

import contextlib
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from deeptwist.errors import DeepTwistError, check_int, first_line
from deeptwist.export.verify import Signature, run_model, verify
from deeptwist.files import atomic_write, check_suffix, explaining_writes
from deeptwist.inspection.run import ExampleInput, Inputs, TensorCall, of_tensors, output_tensors
from deeptwist.inspection.swap import stored_modules, swap
from deeptwist.measure.runtimes import suppress_output
from deeptwist.save import deduplicate


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its verification measured.

    Attributes:
        path: the file.
        bytes: its size.
        opset: the version of ONNX's operators; `None` for other formats.
        batches: the batch sizes at which its outputs were compared with the model's; none of
            them for a state dict, which computes nothing.
        sizes: likewise the spatial sizes of the first input besides the example's, where free.
        worst_difference: the largest ‖y − y′‖ / ‖y‖ of any output at any of these; `None` where
            nothing was compared.
    """

    path: Path
    bytes: int
    opset: int | None = None
    batches: tuple[int, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    worst_difference: float | None = None


def export_program(
    model: nn.Module,
    path: str | Path,
    example_input: ExampleInput,
    *,
    batch: int | None = None,
    dynamic_size: bool = False,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as a `torch.export` program (.pt2), verified before.

    Such a file holds the inputs that it was traced with: they are zeros. Nothing in deeptwist
    reads one, since `torch.export.load` falls back to unpickling: load only files you trust.

    Args:
        model: see `export_onnx`.
        path: the file.
        example_input: see `export_onnx`.
        batch: see `export_onnx`; there is no older exporter for programs.
        dynamic_size: see `export_onnx`.
        tolerance: see `export_onnx`.

    Raises:
        DeepTwistError: if the model cannot be traced with free axes, if the program computes
            something else than the model, or if the file cannot be written.
    """
    plain, signature = prepare(model, example_input, batch, dynamic_size)
    with writing(Path(path), ".pt2") as temporary:
        program = trace(plain, signature)
        with temporary.open("wb") as file, suppress_output():
            torch.export.save(program, file)
        run = program.module()
        sizes, worst = verify(plain, signature, lambda x: output_tensors(run(*x)), tolerance)
    size = Path(path).stat().st_size
    return Exported(Path(path), size, None, signature.batches, sizes, worst)


def prepare(
    model: nn.Module, example_input: ExampleInput, batch: int | None, dynamic_size: bool
) -> tuple[nn.Module, Signature]:
    """Return a copy of a model for use, as a function of tensors, and what a file of it takes.

    For the arguments see `export_onnx`.

    Raises:
        DeepTwistError: if an input has no batch in front, or none has a size that can be free.
    """
    inputs = Inputs.of(example_input).to("cpu")
    plain, example = of_tensors(inference_copy(model), inputs)
    if not example or not all(map(len, example)):
        raise DeepTwistError(
            f"{type(model).__name__} is exported for tensors with a batch in front: "
            "give at least one example"
        )
    if batch is not None:
        check_int("batch", batch)
    signature = Signature(tuple(x.detach() for x in example), batch, dynamic_size)
    if dynamic_size and not any({*axes.values()} - {"batch"} for axes in signature.free_axes):
        raise DeepTwistError("no input has a height and width that could be free")
    return plain, signature


def export_state_dict(model: nn.Module, path: str | Path) -> Exported:
    """Write a model's tensors as safetensors, under the names of its state dict.

    A tensor that the model shares is there under each of its names, so that the file loads
    strictly; a parametrized weight is there as the plain weight that it stands for.

    Args:
        model: any network.
        path: the file.

    Raises:
        DeepTwistError: if the file cannot be written.
    """
    tensors, aliases = deduplicate(inference_copy(model))
    copies = {alias: tensors[name].clone() for alias, name in aliases.items()}
    with writing(Path(path), ".safetensors") as temporary:
        save_file({**tensors, **copies}, temporary)
    return Exported(Path(path), Path(path).stat().st_size)


def trace(plain: nn.Module, signature: Signature) -> ExportedProgram:
    """Return the program that `torch.export` makes of a model.

    Raises:
        DeepTwistError: if the model cannot run on the signature, or be traced.
    """
    # Zeros, because the program keeps them; two, because torch takes a batch of one for fixed.
    batch = signature.batch or 2
    zeros = tuple(x.new_zeros(batch, *x.shape[1:]) for x in signature.example)
    run_model(plain, zeros)  # a wrong input is told plainly here, and by torch.export at length
    axes = signature.free_axes
    dims: dict[str, Any] = {"batch": Dim("batch")}  # torch finds the bounds of the others
    shapes = tuple({a: dims.get(name, Dim.DYNAMIC) for a, name in x.items()} for x in axes)
    try:
        with suppress_output():
            program = torch.export.export(plain, zeros, dynamic_shapes=by_argument(plain, shapes))
    except Exception as error:  # a forward may fail to be traced in any way
        free = " and ".join(sorted({name for x in axes for name in x.values()}))
        raise DeepTwistError(
            f"torch.export cannot trace {type(plain).__name__} with "
            f"{f'a free {free}' if free else 'a fixed batch'}: {reason_of(error)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody's business
    return program


def by_argument(plain: nn.Module, axes: Iterable[Any]) -> tuple[Any, ...]:
    """Return what holds of each tensor as torch.export wants it: by argument of the forward."""
    each = tuple(axes)
    return (each,) if isinstance(plain, TensorCall) else each


def reason_of(error: BaseException) -> str:
    """Return what torch.export objects to: the first point of its list, where it makes one."""
    lines = str(error).splitlines()
    points = [line.strip(" -") for line in lines if line.startswith("  - ")]
    return textwrap.shorten(points[0] if points else first_line(error), 300)


def inference_copy(model: nn.Module) -> nn.Module:
    """Return a copy for use: on the processor, in evaluation mode, its weights plain parameters."""
    # A forward that is compiled, or wrapped, would go on running the model itself.
    plain = swap(model, {}).cpu().eval().requires_grad_(False)
    if stored_modules(plain, {"": model}):
        raise DeepTwistError(
            f"a function stored on this {type(model).__name__} refers to the model and would be "
            "exported in place of the copy: store it after the export"
        )
    for module in filter(parametrize.is_parametrized, plain.modules()):
        # torch's remove_parametrizations would take the weight's property off the class, which
        # the module of the caller's model still uses.
        names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
        weights = {name: getattr(module, name).detach().clone() for name in names}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return plain


@contextlib.contextmanager
def writing(path: Path, suffix: str) -> Iterator[Path]:
    """Yield a temporary neighbour of `path`, renamed to it at the end; named as the format's."""
    check_suffix(path, suffix)
    if path.is_dir() or not path.parent.is_dir():  # said before the work, not after it
        reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise DeepTwistError(f"cannot write {path}: {reason}")
    with explaining_writes(path), atomic_write(path) as temporary:
        yield temporary
