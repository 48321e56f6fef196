"""Out of PyTorch: ONNX, a `torch.export` program, a plain state dict."""

from deeptwist.export.onnx import export_onnx, quantize_onnx
from deeptwist.export.program import Exported, export_program, export_state_dict
from deeptwist.export.verify import BATCHES

__all__ = [
    "BATCHES",
    "Exported",
    "export_onnx",
    "export_program",
    "export_state_dict",
    "quantize_onnx",
]
