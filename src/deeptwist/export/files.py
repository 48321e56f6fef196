"""Write a model to a file.

A file takes its name only after it is complete and, where it can be run, verified.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deeptwist.errors import DeepTwistError, check_int, first_line, require_extra
from deeptwist.export.convert import check_free_axes, convert, told_with, trace
from deeptwist.export.signature import Inputs, make_signature
from deeptwist.export.verify import run_in_onnxruntime, verify
from deeptwist.files import atomic_write
from deeptwist.inspection.run import output_tensors
from deeptwist.inspection.swap import stored_modules, swap
from deeptwist.measure.runtimes import suppress_output
from deeptwist.save import deduplicate

_LARGEST_ONNX = 2**31  # bytes of one protobuf message


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


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Inputs,
    *,
    batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as one ONNX file, verified in onnxruntime.

    Args:
        model: any network; exported in evaluation mode, from a copy on the processor.
        path: the file.
        example_input: a batch of any size, or the tuple of the model's positional inputs. Only
            shapes and types are read, and the rows of integer inputs, which verification repeats.
        batch: the batch size that the file takes, for networks whose outputs have no batch in
            front, as detectors; free if not given. Where torch's exporter cannot convert a
            network, its older one is tried.
        dynamic_size: whether height and width (the length of 1-D inputs) are free too. What the
            model asks of them, as multiples of 32, holds for the file.
        opset: the version of ONNX's operators; torch's choice if not given.
        tolerance: the largest relative difference of an output; the square root of the
            precision of its type if not given, 3.5e-4 in fp32.

    Raises:
        DeepTwistError: if the extra 'onnx' is missing, the model cannot be traced with free axes
            or converted to the opset, is larger than 2 GB, or computes something else in
            onnxruntime; or if the file cannot be written.
    """
    with require_extra("onnx"):
        for package in ("onnx", "onnxruntime", "onnxscript"):
            import_module(package)
    if opset is not None:
        check_int("opset", opset)
    size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    if size >= _LARGEST_ONNX:
        raise DeepTwistError(
            f"the weights take {size / 2**30:.1f} GB and one ONNX file holds less than 2 GB: "
            "export a program or a state dict"
        )
    plain, signature = (
        _inference_copy(model),
        make_signature(model, example_input, batch, dynamic_size),
    )
    with _writing(Path(path)) as temporary:
        proto, reason = convert(plain, signature, opset)
        version = next(entry.version for entry in proto.opset_import if not entry.domain)
        if opset not in (None, version):
            raise DeepTwistError(
                f"opset {opset} cannot be had: an operator of this model has no conversion and "
                f"the exporter stayed at {version}; ask for {version} or another, or for none"
            )
        with told_with(reason, signature):
            check_free_axes(proto, signature)
            temporary.write_bytes(proto.SerializeToString())
            sizes, worst = verify(plain, signature, run_in_onnxruntime(temporary), tolerance)
        bytes_ = temporary.stat().st_size
    return Exported(Path(path), bytes_, version, signature.batches, sizes, worst)


def export_program(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Inputs,
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
    plain, signature = (
        _inference_copy(model),
        make_signature(model, example_input, batch, dynamic_size),
    )
    with _writing(Path(path)) as temporary:
        program = trace(plain, signature)
        traced = program.module()
        with temporary.open("wb") as file, suppress_output():
            torch.export.save(program, file)
        sizes, worst = verify(
            plain, signature, lambda inputs: output_tensors(traced(*inputs)), tolerance
        )
        bytes_ = temporary.stat().st_size
    return Exported(Path(path), bytes_, None, signature.batches, sizes, worst)


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
    tensors, aliases = deduplicate(_inference_copy(model))
    copies = {alias: tensors[name].clone() for alias, name in aliases.items()}
    with _writing(Path(path)) as temporary:
        save_file({**tensors, **copies}, temporary)
        return Exported(Path(path), temporary.stat().st_size)


def _inference_copy(model: nn.Module) -> nn.Module:
    """Return a copy for use: on the processor, in evaluation mode, its weights plain parameters."""
    # A forward that is compiled, or wrapped, would go on running the model itself.
    plain = swap(model, {}).cpu().eval().requires_grad_(False)
    if stored_modules(plain, {"": model}):
        raise DeepTwistError(
            f"a function stored on this {type(model).__name__} refers to the model and would be "
            "exported in place of the copy: store it after the export"
        )
    for module in plain.modules():
        if not parametrize.is_parametrized(module):
            continue
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
def _writing(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path`, renamed to it at the end."""
    if path.is_dir() or not path.parent.is_dir():  # said before the work, not after it
        reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise DeepTwistError(f"cannot write {path}: {reason}")
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DeepTwistError(f"cannot write {path}: {reason}") from error
