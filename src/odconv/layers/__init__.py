"""The layers: ODConv, DyConv and CondConv in one, two and three dimensions."""

from odconv.layers.attention import Attention, set_temperature
from odconv.layers.conv import (
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
)
from odconv.ops.contract import Attentions

__all__ = [
    "Attention",
    "Attentions",
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
    "set_temperature",
]
