"""What runs a network: PyTorch as it is, compiled, or onnxruntime."""

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from deeptwist.errors import (
    DeepTwistError,
    check_int,
    explaining,
    first_line,
    require_extra,
    unknown_name_error,
)
from deeptwist.inspection.run import ExampleInput, Inputs, of_tensors
from deeptwist.inspection.swap import swap

Runtime = Literal["eager", "compile", "onnxruntime"]
DType = Literal["float32", "bfloat16", "float16"]
Run = Callable[[], object]  # runs a model once
METADATA = "deeptwist"  # the key of an ONNX file's properties that holds ours, as JSON


def dtype_name(dtype: torch.dtype) -> DType:
    """Return how a setting names a type."""
    return cast(DType, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Setting:
    """What a network is run with.

    Attributes:
        batch: examples.
        threads: of the processor.
        dtype: what weights and inputs are turned to.
        runtime: what runs it.

    Raises:
        DeepTwistError: if there is no such runtime, or a number is not positive.
    """

    batch: int
    threads: int
    dtype: DType = "float32"
    runtime: Runtime = "eager"

    def __post_init__(self) -> None:
        check_int("batch", self.batch)
        check_int("threads", self.threads)
        if self.runtime not in get_args(Runtime):
            raise unknown_name_error("runtime", self.runtime, get_args(Runtime))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set the number of threads, and put it back."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def make_runner(model: nn.Module, inputs: ExampleInput, setting: Setting) -> Run:
    """Return a function that runs the model once on the inputs; call it with `setting.applied()`.

    Args:
        model: on the inputs' device; it is copied, and stays as it is.
        inputs: what the model is called with, of the setting's batch.
        setting: images run in channels_last, but in onnxruntime.

    Raises:
        DeepTwistError: if the runtime cannot run this type or device, or cannot compile.
    """
    inputs = Inputs.of(inputs)
    if setting.runtime == "onnxruntime":
        if setting.dtype != "float32" or inputs.tensors[0].is_cuda:
            raise DeepTwistError(
                f"onnxruntime is measured on processors in float32, not {setting.dtype}"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            network, tensors = of_tensors(model, inputs)
            _write_onnx(network, path, tensors)
            return OnnxNetwork(path, setting.threads).make_runner(*tensors)
    dtype = getattr(torch, setting.dtype)
    ready = swap(model, {}).to(dtype).eval()
    typed = inputs.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    if any(x.dim() == 4 for x in typed.tensors):
        ready = ready.to(memory_format=torch.channels_last)
        last = torch.channels_last
        typed = typed.map(lambda x: x.to(memory_format=last) if x.dim() == 4 else x)
    if setting.runtime == "compile":
        return _compiled(ready, typed)

    def run() -> object:
        with torch.inference_mode():
            return typed.run(ready)

    return run


def _write_onnx(model: nn.Module, path: Path, inputs: tuple[Tensor, ...]) -> None:
    """Write a network as it is for these inputs; nothing in it is verified."""
    model = swap(model, {}).eval().requires_grad_(False)
    with require_extra("onnx"):
        import onnxscript  # noqa: F401
    failures = []
    for is_newer in (False, True):  # the older exporter takes a tenth of the time
        try:
            with suppress_output():
                torch.onnx.export(model, inputs, path, dynamo=is_newer)
        except Exception as error:  # a forward may fail to be traced in any way
            failures.append(first_line(error))
        else:
            return
    raise DeepTwistError(f"torch.onnx cannot write {type(model).__name__}: {failures[-1]}")


def _compiled(model: nn.Module, inputs: Inputs) -> Run:
    """Compiled for deployment: batch norm is folded into weights, which are packed once."""
    from torch._inductor import config  # takes seconds

    compiled = torch.compile(model)

    def run() -> object:
        with torch.no_grad():  # weights are not frozen in inference mode
            return inputs.run(compiled)

    advice = "see that a C++ compiler is installed, or measure another runtime"
    with explaining("torch.compile fails", advice, (Exception,)), config.patch(freezing=True):
        run()
    return run


def onnxruntime_session(path: Path, threads: int) -> Any:
    """Open an ONNX file in onnxruntime, on the processor.

    Raises:
        DeepTwistError: if onnxruntime is missing, or cannot load the graph.
    """
    with require_extra("onnx"):
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised too
    with explaining("onnxruntime cannot load the graph", errors=(Exception,)):  # not public types
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feed(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return arrays by the names of an ONNX file's inputs."""
    return {n: x.cpu().contiguous().numpy() for n, x in zip(names, tensors, strict=True)}


class OnnxNetwork(nn.Module):
    """An exported network as a module: onnxruntime computes, on the processor."""

    def __init__(self, path: Path, threads: int):
        """Load a file.

        Args:
            path: what `export_onnx` wrote of a network.
            threads: processor threads.
        """
        super().__init__()
        self._session = onnxruntime_session(path, threads)
        self.reference = nn.Parameter(torch.zeros(()))  # fp32, on the processor

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what `export_onnx` was given to say of the network; nothing of others' files."""
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA, "{}")
        values: dict[str, Any] = json.loads(text)
        return values

    def make_runner(self, *inputs: Tensor) -> Callable[[], list[Any]]:
        """Return a function that runs the network once on the inputs."""
        names = [each.name for each in self._session.get_inputs()]
        arrays = feed(names, inputs)
        return lambda: self._session.run(None, arrays)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the first output for a batch."""
        return torch.from_numpy(self.make_runner(*inputs)()[0])


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Keep torch's exporters from talking; what they only log is looked up in the result."""
    disabled = logging.root.manager.disable
    # Their messages come from a dozen loggers, some with a level of their own.
    logging.disable(logging.CRITICAL)
    stderr = os.dup(2)  # which the older one writes to from C++
    try:
        with (
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logging.disable(disabled)
