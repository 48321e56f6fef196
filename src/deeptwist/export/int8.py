"""int8: onnxruntime's static quantisation of an exported network, calibrated on real inputs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from deeptwist.errors import DeepTwistError, first_line, require_extra
from deeptwist.files import atomic_write
from deeptwist.measure.runtimes import suppress_output


def quantize_onnx(source: str | Path, path: str | Path, batches: Iterable[Tensor]) -> Path:
    """Write an ONNX file in int8, weights by channel and activations by the range they take.

    Args:
        source: what `deeptwist.export.export_onnx` wrote of a network of one input.
        path: the file.
        batches: inputs as the network gets them, to learn the ranges from.

    Returns:
        The path.

    Raises:
        DeepTwistError: if the extra 'onnx' is missing, or onnxruntime cannot quantise the graph.
    """
    with require_extra("onnx"):
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> Any:
            batch = next(self._batches, None)
            return None if batch is None else {"input": batch.cpu().contiguous().numpy()}

    path = Path(path)
    prepared = path.with_suffix(".prepared.onnx")
    try:
        with atomic_write(path) as temporary, suppress_output():
            quant_pre_process(source, prepared)
            quantize_static(prepared, temporary, Reader(), per_channel=True)
    except Exception as error:  # its types are not public
        reason = first_line(error)
        raise DeepTwistError(f"onnxruntime cannot quantise {source}: {reason}") from error
    finally:
        prepared.unlink(missing_ok=True)
    return path
