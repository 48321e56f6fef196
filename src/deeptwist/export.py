"""Out of PyTorch: ONNX, a `torch.export` program, a plain state dict.

A file takes its name only after it is complete and, where it can be run, after it has computed
what the model computes, at several batch sizes.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, check_int, first_line, require_extra
from deeptwist.inspect.modes import output_tensors
from deeptwist.inspect.swap import stored_modules, swap
from deeptwist.serialization import atomic_write, distinct

BATCHES = 1, 2, 5  # one, the one that is traced, another
_LARGEST_ONNX = 2**31  # bytes of one protobuf message

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its verification found.

    Attributes:
        path: the file.
        bytes: its size.
        opset: the version of ONNX's operators; none for other formats.
        batches: the batch sizes at which its outputs were compared with the model's; none of
            them for a state dict, which computes nothing.
        worst_difference: the largest ‖y − y′‖ / ‖y‖ of any output at any of these; none where
            nothing was compared.
    """

    path: Path
    bytes: int
    opset: int | None = None
    batches: tuple[int, ...] = ()
    worst_difference: float | None = None


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Inputs,
    *,
    opset: int | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Writes a model as one ONNX file with a free batch, verified in onnxruntime.

    Args:
        model: any network; exported in evaluation mode, from a copy on the processor.
        path: the file.
        example_input: a batch of any size, or the tuple of the model's positional inputs. Only
            shapes and types are read, and the rows of integer inputs, which verification repeats.
        opset: the version of ONNX's operators; torch's choice if not given.
        tolerance: the largest relative difference of an output; the square root of the
            precision of its type if not given, 3.5e-4 in fp32.

    Raises:
        DeepTwistError: if the extra 'onnx' is missing, the model cannot be traced with a free
            batch or converted to the opset, is larger than 2 GB, or computes something else in
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
    plain, example = _plain(model), _checked(model, example_input)
    with _writing(Path(path)) as temporary:
        proto = _convert(plain, example, opset)
        found = next(entry.version for entry in proto.opset_import if not entry.domain)
        if opset not in (None, found):
            raise DeepTwistError(
                f"opset {opset} cannot be had: an operator of this model has no conversion and "
                f"the exporter stayed at {found}; ask for {found} or another, or for none"
            )
        _check_free_batch(proto)
        temporary.write_bytes(proto.SerializeToString())
        worst = _verify(plain, _onnxruntime(temporary), example, tolerance)
        bytes_ = temporary.stat().st_size
    return Exported(Path(path), bytes_, found, BATCHES, worst)


def export_program(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Inputs,
    *,
    tolerance: float | None = None,
) -> Exported:
    """Writes a model as a `torch.export` program (.pt2) with a free batch, verified before.

    Such a file holds the inputs that it was traced with: they are zeros. Nothing in deeptwist
    reads one, since `torch.export.load` falls back to unpickling: load only files you trust.

    Args:
        model: see `export_onnx`.
        path: the file.
        example_input: see `export_onnx`.
        tolerance: see `export_onnx`.

    Raises:
        DeepTwistError: if the model cannot be traced with a free batch, if the program computes
            something else than the model, or if the file cannot be written.
    """
    plain, example = _plain(model), _checked(model, example_input)
    with _writing(Path(path)) as temporary:
        program = _trace(plain, example)
        traced = program.module()
        worst = _verify(plain, lambda inputs: output_tensors(traced(*inputs)), example, tolerance)
        with temporary.open("wb") as file, quiet():
            torch.export.save(program, file)
        bytes_ = temporary.stat().st_size
    return Exported(Path(path), bytes_, None, BATCHES, worst)


def export_state_dict(model: nn.Module, path: str | Path) -> Exported:
    """Writes a model's tensors as safetensors, under the names of its state dict.

    A tensor that the model shares is there under each of its names, so that the file loads
    strictly; a parametrized weight is there as the plain weight that it stands for.

    Args:
        model: any network.
        path: the file.

    Raises:
        DeepTwistError: if the file cannot be written.
    """
    tensors, aliases = distinct(_plain(model))
    copies = {alias: tensors[name].clone() for alias, name in aliases.items()}
    with _writing(Path(path)) as temporary:
        save_file({**tensors, **copies}, temporary)
        bytes_ = temporary.stat().st_size
    return Exported(Path(path), bytes_)


def _plain(model: nn.Module) -> nn.Module:
    """A copy for use: on the processor, in evaluation mode, its weights plain parameters."""
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


def _checked(model: nn.Module, example_input: Tensor | Inputs) -> Inputs:
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    if not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) > 0 for x in example):
        raise DeepTwistError(
            f"{type(model).__name__} is exported for tensors with a batch in front: "
            "give a tensor of at least one example, or a tuple of such"
        )
    return tuple(x.detach().cpu() for x in example)


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The model's outputs, in order."""
    try:
        with torch.no_grad():
            return output_tensors(model(*inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise DeepTwistError(
            f"{type(model).__name__} cannot run on inputs {shapes}: {first_line(error)}"
        ) from error


def _trace(plain: nn.Module, example: Inputs) -> ExportedProgram:
    # Zeros, because the program keeps them; two, because torch takes a batch of one for fixed.
    zeros = tuple(x.new_zeros(2, *x.shape[1:]) for x in example)
    _run(plain, zeros)  # a wrong input is told plainly here, and by torch.export at length
    batch = Dim("batch")
    try:
        with quiet():
            program = torch.export.export(
                plain, zeros, dynamic_shapes=tuple({0: batch} for _ in zeros)
            )
    except Exception as error:  # a forward may fail to be traced in any way
        raise DeepTwistError(
            f"torch.export cannot trace {type(plain).__name__} with a free batch: {_reason(error)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody's business
    return program


def _convert(plain: nn.Module, example: Inputs, opset: int | None) -> Any:
    """The ONNX model, as protobuf."""
    num_outputs = len(_run(plain, _numbers(example, 2)))
    program = _trace(plain, example)
    try:
        with quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=tuple({0: "batch"} for _ in example),  # the name in the graph
                input_names=_names("input", len(example)),
                output_names=_names("output", num_outputs),
                opset_version=opset,
                verbose=False,
            )
            assert converted is not None
            proto = converted.model_proto
    except Exception as error:
        raise DeepTwistError(
            f"torch.onnx cannot convert {type(plain).__name__}: {_reason(error)}"
        ) from error
    # Stack traces and module names, a fifth of a small network's file.
    del proto.graph.metadata_props[:]
    graph = proto.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
    return proto


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{index}" for index in range(count)]


def _check_free_batch(proto: Any) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in dims)
            raise DeepTwistError(
                f"the ONNX graph has no free batch: {value.name!r} is ({shape}); each input and "
                "output must have the batch in front"
            )


def _onnxruntime(path: Path) -> Callable[[Inputs], list[Tensor]]:
    """A call that runs the file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised too
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its types are not public
        raise DeepTwistError(f"onnxruntime cannot load the graph: {first_line(error)}") from error
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


def _verify(
    plain: nn.Module,
    run: Callable[[Inputs], list[Tensor]],
    example: Inputs,
    tolerance: float | None,
) -> float:
    """The largest relative difference of an output at any batch size.

    Raises:
        DeepTwistError: if it is above the tolerance, or if shapes differ.
    """
    worst = 0.0
    for batch in BATCHES:
        inputs = _numbers(example, batch)
        expected, found = _run(plain, inputs), run(inputs)
        shapes = [[tuple(y.shape) for y in outputs] for outputs in (expected, found)]
        if shapes[0] != shapes[1]:
            raise DeepTwistError(
                f"the export gives outputs of shapes {shapes[1]} at batch {batch} where the "
                f"model gives {shapes[0]}"
            )
        for y, y_found in zip(expected, found, strict=True):
            difference = relative_error(y, y_found)
            limit = _tolerance(y) if tolerance is None else tolerance
            if not difference <= limit:  # NaN is not
                raise DeepTwistError(
                    f"the export does not compute what the model does: outputs differ by "
                    f"{difference:.1e} at batch {batch}, above the tolerance {limit:.1e}"
                )
            worst = max(worst, difference)
    return worst


def _tolerance(y: Tensor) -> float:
    return torch.finfo(y.dtype).eps ** 0.5 if y.is_floating_point() else 0.0


def _numbers(example: Inputs, batch: int) -> Inputs:
    """Standard normal numbers, the same ones every time; the example's rows for integers."""
    generator = torch.Generator().manual_seed(0)

    def of(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.randn(batch, *x.shape[1:], generator=generator).to(x.dtype)
        return x[torch.arange(batch) % len(x)]

    return tuple(of(x) for x in example)


def _reason(error: BaseException) -> str:
    """What torch.export objects to: the first point of its list, where it makes one."""
    points: Sequence[str] = [
        line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")
    ]
    return points[0] if points else first_line(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's exporters from talking: what they only log is looked up in the result."""
    disabled = logging.root.manager.disable
    # Their messages come from a dozen loggers, some with a level of their own.
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path`, renamed to it at the end."""
    if path.is_dir() or not path.parent.is_dir():  # said before the work, not after it
        reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise DeepTwistError(f"cannot write {path}: {reason}")
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DeepTwistError(f"cannot write {path}: {reason}") from None
