"""From a model to a traced program, and to ONNX."""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.export.signature import Signature, run_model
from deeptwist.measure.runtimes import suppress_output


def trace(plain: nn.Module, signature: Signature) -> ExportedProgram:
    """Return the program that `torch.export` makes of a model.

    Raises:
        DeepTwistError: if the model cannot run on the signature, or be traced.
    """
    # Zeros, because the program keeps them; two, because torch takes a batch of one for fixed.
    batch = signature.batch or 2
    zeros = tuple(x.new_zeros(batch, *x.shape[1:]) for x in signature.example)
    run_model(plain, zeros)  # a wrong input is told plainly here, and by torch.export at length
    dims: dict[str, Any] = {"batch": Dim("batch")}  # torch finds the bounds of the others
    shapes = [
        {a: dims.get(name, Dim.DYNAMIC) for a, name in x.items()} for x in signature.free_axes
    ]
    try:
        with suppress_output():
            program = torch.export.export(plain, zeros, dynamic_shapes=tuple(shapes))
    except Exception as error:  # a forward may fail to be traced in any way
        raise DeepTwistError(
            f"torch.export cannot trace {type(plain).__name__} with {_described(signature)}: "
            f"{_reason(error)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody's business
    return program


def _described(signature: Signature) -> str:
    free = sorted({name for axes in signature.free_axes for name in axes.values()})
    return f"a free {' and '.join(free)}" if free else "a fixed batch"


def convert(
    plain: nn.Module, signature: Signature, opset: int | None
) -> tuple[Any, DeepTwistError | None]:
    """Return the ONNX model, as protobuf, and why it is torch's older exporter's, if it is.

    That one records a run on the example: what it takes for fixed shows when the file is checked
    and verified, `told_with` the reason.

    Raises:
        DeepTwistError: if it cannot be traced or converted.
    """
    num_outputs = len(run_model(plain, signature.inputs(signature.batch or 2)))
    names: dict[str, Any] = {
        "input_names": _names("input", len(signature.example)),
        "output_names": _names("output", num_outputs),
        "opset_version": opset,
        "verbose": False,
    }
    reason: DeepTwistError | None = None
    try:
        proto = _convert_program(plain, signature, names)
    except DeepTwistError as error:
        reason = error
        with told_with(reason, signature):
            proto = _convert_by_script(plain, signature, names)
    # Stack traces and module names, a fifth of a small network's file.
    del proto.graph.metadata_props[:]
    graph = proto.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    return proto, reason


@contextlib.contextmanager
def told_with(reason: DeepTwistError | None, signature: Signature) -> Iterator[None]:
    """Put before an error of torch's older exporter why that was asked at all."""
    try:
        yield
    except DeepTwistError as error:
        if reason is None:
            raise
        advice = "; a fixed batch may do (batch=1, --batch 1)" if signature.batch is None else ""
        raise DeepTwistError(f"{reason}; torch's older exporter: {error}{advice}") from error


def _convert_program(plain: nn.Module, signature: Signature, names: dict[str, Any]) -> Any:
    """Return the ONNX model by torch's exporter of today."""
    program = trace(plain, signature)
    try:
        with suppress_output():
            converted = torch.onnx.export(
                program, dynamo=True, dynamic_shapes=tuple(signature.free_axes), **names
            )
        assert converted is not None
    except Exception as error:
        cause: BaseException = error  # of messages in several lines of advice
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise DeepTwistError(
            f"torch.onnx cannot convert {type(plain).__name__}: {_reason(cause)}"
        ) from error
    return converted.model_proto


def _convert_by_script(plain: nn.Module, signature: Signature, names: dict[str, Any]) -> Any:
    """Return the ONNX model by torch's older exporter."""
    import onnx

    if signature.batch is None:
        # Of branches that hang on numbers it records one; without them, one size can be traced.
        try:
            trace(plain, replace(signature, batch=2, dynamic_size=False))
        except DeepTwistError:
            raise DeepTwistError("not asked, for it would record one branch of several") from None
    names["f"] = file = io.BytesIO()  # which its annotation leaves out
    axes = dict(zip(names["input_names"], signature.free_axes, strict=True))
    example = tuple(x[: signature.batch] for x in signature.example)
    try:
        with suppress_output():
            torch.onnx.export(plain, example, dynamo=False, dynamic_axes=axes, **names)
    except Exception as error:
        raise DeepTwistError(_reason(error)) from error
    return onnx.load_model_from_string(file.getvalue())


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{index}" for index in range(count)]


def check_free_axes(proto: Any, signature: Signature) -> None:
    """Check that an ONNX model has the free axes of its signature.

    Raises:
        DeepTwistError: if one is fixed in it, naming the input or output.
    """
    outputs = [{0: "batch"}] * len(proto.graph.output) if signature.batch is None else []
    expected = [*signature.free_axes, *outputs]
    for value, axes in zip((*proto.graph.input, *proto.graph.output), expected, strict=False):
        dims = value.type.tensor_type.shape.dim
        for axis, name in axes.items():
            if axis >= len(dims) or not dims[axis].dim_param:
                shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in dims)
                advice = "each input and output must have the batch in front, or give batch=1"
                raise DeepTwistError(
                    f"the ONNX graph has no free {name}: {value.name!r} is ({shape})"
                    + (f"; {advice}" if name == "batch" else "")
                )


def _reason(error: BaseException) -> str:
    """Return what torch.export objects to: the first point of its list, where it makes one."""
    points: Sequence[str] = [
        line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")
    ]
    return textwrap.shorten(points[0] if points else first_line(error), 300)
