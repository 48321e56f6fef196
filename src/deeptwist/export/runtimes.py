"""What runs a network: PyTorch as it is, compiled, or onnxruntime."""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.export import export_onnx
from deeptwist.export.convert import quiet
from deeptwist.export.verify import onnxruntime_session

Runtime = Literal["eager", "compile", "onnxruntime"]
DType = Literal["float32", "bfloat16", "float16"]


def prepare(
    model: nn.Module,
    x: Tensor,
    *,
    runtime: Runtime,
    dtype: DType = "float32",
    threads: int,
    is_layer: bool = False,
) -> Callable[[], object]:
    """A function that runs the model once on the input.

    Args:
        model: on the input's device; it is copied, and stays as it is.
        x: the input, fp32, in the memory format to measure.
        runtime: what runs it.
        dtype: what weights and input are turned to.
        threads: processor threads.
        is_layer: whether the model is one layer, whose ONNX graph needs no verification.

    Raises:
        DeepTwistError: if the runtime cannot run this type or device, or cannot compile.
    """
    torch.set_num_threads(threads)
    if runtime == "onnxruntime":
        if dtype != "float32" or x.is_cuda:
            raise DeepTwistError(f"onnxruntime is measured on processors in float32, not {dtype}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            if not (is_layer and _write_layer(model, path, x)):
                export_onnx(model, path, x)
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


def _write_layer(layer: nn.Module, path: Path, x: Tensor) -> bool:
    """Write a layer by torch's older exporter, a hundred times as fast; return whether it could."""
    try:
        with quiet():
            torch.onnx.export(layer, (x,), path, dynamo=False)
    except Exception:  # the newer one tells why
        return False
    return True


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
