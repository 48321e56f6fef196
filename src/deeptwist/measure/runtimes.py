"""What runs a network: PyTorch as it is, compiled, or onnxruntime."""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, first_line, require_extra

Runtime = Literal["eager", "compile", "onnxruntime"]
DType = Literal["float32", "bfloat16", "float16"]


def prepare(
    model: nn.Module,
    x: Tensor,
    *,
    runtime: Runtime,
    dtype: DType = "float32",
    threads: int,
) -> Callable[[], object]:
    """A function that runs the model once on the input.

    Args:
        model: on the input's device; it is copied, and stays as it is.
        x: the input, fp32, in the memory format to measure.
        runtime: what runs it.
        dtype: what weights and input are turned to.
        threads: processor threads.

    Raises:
        DeepTwistError: if the runtime cannot run this type or device, or cannot compile.
    """
    torch.set_num_threads(threads)
    if runtime == "onnxruntime":
        if dtype != "float32" or x.is_cuda:
            raise DeepTwistError(f"onnxruntime is measured on processors in float32, not {dtype}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            _write_onnx(model, path, x)
            return OnnxNetwork(path, threads).prepare(x)
    x = x.to(getattr(torch, dtype))
    ready = deepcopy(model).to(x.dtype).eval()
    if x.dim() == 4:
        ready = ready.to(memory_format=torch.channels_last)
    if runtime == "compile":
        return _compiled(ready, x)

    def run() -> object:
        with torch.inference_mode():
            return ready(x)

    return run


def _write_onnx(model: nn.Module, path: Path, x: Tensor) -> None:
    """Write a network of one input as it is for this input; nothing in it is verified."""
    model = deepcopy(model).eval().requires_grad_(False)
    with require_extra("onnx"):
        import onnxscript  # noqa: F401
    failures = []
    for is_newer in (False, True):  # the older exporter takes a tenth of the time
        try:
            with suppress_output():
                torch.onnx.export(model, (x,), path, dynamo=is_newer)
        except Exception as error:  # a forward may fail to be traced in any way
            failures.append(first_line(error))
        else:
            return
    raise DeepTwistError(f"torch.onnx cannot write {type(model).__name__}: {failures[-1]}")


def _compiled(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Compiled for deployment: batch norm is folded into weights, which are packed once."""
    from torch._inductor import config  # takes seconds

    compiled = torch.compile(model)

    def run() -> object:
        with torch.no_grad():  # weights are not frozen in inference mode
            return compiled(x)

    try:
        with config.patch(freezing=True):
            run()
    except Exception as error:  # no C++ compiler, an operator it does not know: a dozen types
        raise DeepTwistError(
            f"torch.compile fails ({type(error).__name__}: {first_line(error)}): see that a C++ "
            "compiler is installed, or measure another runtime"
        ) from error
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
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its types are not public
        raise DeepTwistError(f"onnxruntime cannot load the graph: {first_line(error)}") from error


class OnnxNetwork(nn.Module):
    """An exported network as a module: onnxruntime computes, on the processor."""

    def __init__(self, path: Path, threads: int):
        """Load a file.

        Args:
            path: what `export_onnx` wrote of a network of one input and one output.
            threads: processor threads.
        """
        super().__init__()
        self._session = onnxruntime_session(path, threads)
        self.reference = nn.Parameter(torch.zeros(()))  # fp32, on the processor

    def prepare(self, x: Tensor) -> Callable[[], list[Any]]:
        """Return a function that runs the network once on the input."""
        feed = {self._session.get_inputs()[0].name: x.cpu().contiguous().numpy()}
        return lambda: self._session.run(None, feed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        return torch.from_numpy(self.prepare(x)()[0])


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
