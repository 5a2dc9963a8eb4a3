"""The public names: those of `import odconv`, which imports this module when the first of them is asked for."""

from odconv import functional
from odconv.acceleration import accelerate, restore_forward
from odconv.checkpoints import load_checkpoint
from odconv.conversion import convert
from odconv.detect import create_detector
from odconv.explanation import explain
from odconv.export import export_onnx
from odconv.freeze import to_static
from odconv.fusion import fuse
from odconv.groups import parameter_groups
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
from odconv.models import create_model
from odconv.profiling import conversion_report, profile
from odconv.zoo import list_models

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
    "ODConv1d",
    "ODConv2d",
    "ODConv3d",
    "ODConvTranspose1d",
    "ODConvTranspose2d",
    "ODConvTranspose3d",
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
    "set_temperature",
    "to_static",
]
