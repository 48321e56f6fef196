"""ONNX: a network as one file, verified in onnxruntime; and that file in int8."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, check_int, explaining, require_extra
from deeptwist.export.program import Exported, by_argument, prepare, reason_of, trace, writing
from deeptwist.export.verify import Run, Signature, Tensors, run_model, verify
from deeptwist.files import atomic_write, check_suffix
from deeptwist.inspection.run import ExampleInput, read_batches
from deeptwist.measure.runtimes import METADATA, feed, onnxruntime_session, suppress_output

_LARGEST_ONNX = 2**31  # bytes of one protobuf message


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: ExampleInput,
    *,
    batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    tolerance: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model as one ONNX file, verified in onnxruntime.

    Args:
        model: any network; exported in evaluation mode, from a copy on the processor.
        path: the file.
        example_input: a batch of any size, or more arguments, see `deeptwist.plan`. Of tensors only
            shapes and types are read, and the rows of integer ones, which verification repeats;
            they are the file's inputs, in order. Numbers and other arguments are fixed in it.
        batch: the batch size that the file takes, for networks whose outputs have no batch in
            front, as detectors; free if not given. Where torch's exporter cannot convert a
            network, its older one is tried.
        dynamic_size: whether height and width (the length of 1-D inputs) are free too. What the
            model asks of them, as multiples of 32, holds for the file.
        opset: the version of ONNX's operators; torch's choice if not given.
        tolerance: the largest relative difference of an output; the square root of the
            precision of its type if not given, 3.5e-4 in fp32.
        metadata: what else is to be known of the network, see `deeptwist.save`: the file has it
            as JSON, under 'deeptwist' in its `metadata_props`.

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
    plain, signature = prepare(model, example_input, batch, dynamic_size)
    with writing(Path(path), ".onnx") as temporary:
        proto, reason = _convert(plain, signature, opset)
        version = next(entry.version for entry in proto.opset_import if not entry.domain)
        if opset not in (None, version):
            raise DeepTwistError(
                f"opset {opset} cannot be had: an operator of this model has no conversion and "
                f"the exporter stayed at {version}; ask for {version} or another, or for none"
            )
        with explaining(reason, errors=(DeepTwistError,)) if reason else nullcontext():
            _check_free_axes(proto, signature)
            if metadata:
                proto.metadata_props.add(key=METADATA, value=json.dumps(dict(metadata)))
            temporary.write_bytes(proto.SerializeToString())
            sizes, worst = verify(plain, signature, _onnxruntime(temporary), tolerance)
    size = Path(path).stat().st_size
    return Exported(Path(path), size, version, signature.batches, sizes, worst)


def _convert(plain: nn.Module, signature: Signature, opset: int | None) -> tuple[Any, str]:
    """Return the ONNX model, as protobuf, and why it is torch's older exporter's, if it is."""
    outputs = run_model(plain, signature.inputs(signature.batch or 2))
    options: dict[str, Any] = {
        "input_names": _names("input", len(signature.example)),
        "output_names": _names("output", len(outputs)),
        "opset_version": opset,
        "verbose": False,
    }
    reason = ""
    try:
        proto = _convert_program(plain, signature, options)
    except DeepTwistError as error:
        advice = "; a fixed batch may do (batch=1, --batch 1)" if signature.batch is None else ""
        reason = f"{error}{advice}; torch's older exporter"
        with explaining(reason, errors=(DeepTwistError,)):
            proto = _convert_by_script(plain, signature, options)
    # Stack traces and module names, a fifth of a small network's file.
    del proto.graph.metadata_props[:]
    graph = proto.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    return proto, reason


def _convert_program(plain: nn.Module, signature: Signature, options: dict[str, Any]) -> Any:
    """Return the ONNX model by torch's exporter of today."""
    program = trace(plain, signature)
    try:
        with suppress_output():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=by_argument(plain, signature.free_axes),
                **options,
            )
        assert converted is not None
    except Exception as error:
        cause: BaseException = error  # of messages in several lines of advice
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise DeepTwistError(
            f"torch.onnx cannot convert {type(plain).__name__}: {reason_of(cause)}"
        ) from error
    return converted.model_proto


def _convert_by_script(plain: nn.Module, signature: Signature, options: dict[str, Any]) -> Any:
    """Return the ONNX model by torch's older exporter, which records a run on the example.

    What it takes for fixed shows when the file is checked and verified.
    """
    import onnx

    if signature.batch is None:
        # Of branches that hang on numbers it records one; without them, one size can be traced.
        try:
            trace(plain, replace(signature, batch=2, dynamic_size=False))
        except DeepTwistError:
            raise DeepTwistError("not asked, for it would record one branch of several") from None
    options["f"] = file = io.BytesIO()  # which its annotation leaves out
    axes = dict(zip(options["input_names"], signature.free_axes, strict=True))
    example = tuple(x[: signature.batch] for x in signature.example)
    try:
        with suppress_output():
            torch.onnx.export(plain, example, dynamo=False, dynamic_axes=axes, **options)
    except Exception as error:
        raise DeepTwistError(reason_of(error)) from error
    return onnx.load_model_from_string(file.getvalue())


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{index}" for index in range(count)]


def _check_free_axes(proto: Any, signature: Signature) -> None:
    """Check that an ONNX model has the free axes of its signature."""
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


def _onnxruntime(path: Path) -> Run:
    """Return a call that runs the file in onnxruntime."""
    session = onnxruntime_session(path, torch.get_num_threads())
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Tensors) -> list[Tensor]:
        with explaining("onnxruntime cannot run the graph", errors=(Exception,)):
            outputs = session.run(None, feed(names, inputs))
        return [torch.as_tensor(output) for output in outputs]

    return run


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    batches: Iterable[Any],
    *,
    inputs: Callable[[Any], ExampleInput] | None = None,
    **options: Any,
) -> Path:
    """Write an ONNX file in int8, weights (7 bits) by channel, activations by the range they take.

    Args:
        source: what `deeptwist.export.export_onnx` wrote of a network.
        path: the file.
        batches: to learn the ranges from, see `deeptwist.calibrate`.
        inputs: see `deeptwist.calibrate`.
        options: of onnxruntime's `quantize_static`: `calibrate_method`, `nodes_to_exclude`, …

    Returns:
        The path.

    Raises:
        DeepTwistError: if the extra 'onnx' is missing, if there is no batch, or if onnxruntime
            cannot quantise the graph.
    """
    check_suffix(Path(path), ".onnx")
    with require_extra("onnx"):
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [value.name for value in onnxruntime_session(Path(source), 1).get_inputs()]
    read = read_batches(batches, inputs)
    feeds = (feed(names, [x for x in call.tensors if x.dim()]) for call in read)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    # Of signed activations, onnxruntime runs layers beside a residual connection in fp32; unsigned
    # ones overflow with 8-bit weights where a processor has no VNNI: its guide asks for 7 bits.
    defaults = {"activation_type": QuantType.QUInt8, "per_channel": True, "reduce_range": True}
    path = Path(path)
    prepared = path.with_suffix(".prepared.onnx")
    try:
        with (
            explaining(f"onnxruntime cannot quantise {source}", errors=(Exception,)),
            atomic_write(path) as temporary,
            suppress_output(),
        ):
            quant_pre_process(source, prepared)
            quantize_static(prepared, temporary, Reader(), **{**defaults, **options})
    finally:
        prepared.unlink(missing_ok=True)
    return path
