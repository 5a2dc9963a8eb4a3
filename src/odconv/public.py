"""The public names: those of `import odconv`, which imports this module when the first of them is asked for."""

from odconv import functional
from odconv.checkpoints import load_checkpoint
from odconv.conversion.acceleration import accelerate, restore_forward
from odconv.conversion.convert import convert
from odconv.conversion.fusion import fuse
from odconv.conversion.static import to_static
from odconv.export import export_onnx
from odconv.layers import (
    CondConv1d,
    CondConv2d,
    CondConv3d,
    CondConvTranspose1d,
    CondConvTranspose2d,
    CondConvTranspose3d,
    DyConv1d,
    DyConv2d,
    DyConv3d,
    DyConvTranspose1d,
    DyConvTranspose2d,
    DyConvTranspose3d,
    DynamicConv,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    ODConvTranspose1d,
    ODConvTranspose2d,
    ODConvTranspose3d,
    set_temperature,
)
from odconv.layers.parameter_groups import parameter_groups
from odconv.layers.progress import set_progress
from odconv.layers.warehouse import Warehouse
from odconv.layers.warehouse_attention import set_blend
from odconv.layers.warehouse_conv import KWConv1d, KWConv2d, KWConv3d, KWLinear
from odconv.models.build import create_model
from odconv.models.detectors.builder import create_detector
from odconv.models.zoo import list_models
from odconv.profiling import conversion_report, explain, profile, tune

__all__ = [
    "CondConv1d",
    "CondConv2d",
    "CondConv3d",
    "CondConvTranspose1d",
    "CondConvTranspose2d",
    "CondConvTranspose3d",
    "DyConv1d",
    "DyConv2d",
    "DyConv3d",
    "DyConvTranspose1d",
    "DyConvTranspose2d",
    "DyConvTranspose3d",
    "DynamicConv",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLinear",
    "ODConv1d",
    "ODConv2d",
    "ODConv3d",
    "ODConvTranspose1d",
    "ODConvTranspose2d",
    "ODConvTranspose3d",
    "Warehouse",
    "accelerate",
    "conversion_report",
    "convert",
    "create_detector",
    "create_model",
    "explain",
    "export_onnx",
    "functional",
    "fuse",
    "list_models",
    "load_checkpoint",
    "parameter_groups",
    "profile",
    "restore_forward",
    "set_blend",
    "set_progress",
    "set_temperature",
    "to_static",
    "tune",
]
