"""Out of PyTorch: ONNX, a `torch.export` program, a plain state dict."""

from deeptwist.export.files import Exported, export_onnx, export_program, export_state_dict
from deeptwist.export.signature import BATCHES

__all__ = ["BATCHES", "Exported", "export_onnx", "export_program", "export_state_dict"]
