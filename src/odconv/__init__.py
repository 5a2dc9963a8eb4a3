"""odconv: dynamic convolution for PyTorch that costs what its multiply-adds say."""

from odconv import functional
from odconv.checkpoints import load_checkpoint
from odconv.layers import (
    CondConv1d,
    CondConv2d,
    CondConv3d,
    DyConv1d,
    DyConv2d,
    DyConv3d,
    DynamicConv,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    set_temperature,
)
from odconv.models import create_model, list_models
from odconv.profile import profile

__version__ = "0.1.0"

__all__ = [
    "CondConv1d",
    "CondConv2d",
    "CondConv3d",
    "DyConv1d",
    "DyConv2d",
    "DyConv3d",
    "DynamicConv",
    "ODConv1d",
    "ODConv2d",
    "ODConv3d",
    "create_model",
    "functional",
    "list_models",
    "load_checkpoint",
    "profile",
    "set_temperature",
]
