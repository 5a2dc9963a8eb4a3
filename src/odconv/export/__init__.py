"""Networks as files for other programs: ONNX, torch.export, AOTInductor."""

from odconv.export.onnx_file import export_onnx
from odconv.export.parity import verify
from odconv.export.torch_file import export_torch
from odconv.export.written import Written

__all__ = ["Written", "export_onnx", "export_torch", "verify"]
