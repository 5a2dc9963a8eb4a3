"""The layers: ODConv, DyConv and CondConv in one, two and three dimensions, transposed ones too."""

from odconv.layers.attention import Attention, find_temperature, set_temperature, try_temperature
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
from odconv.layers.per_sample import PerSampleConv
from odconv.layers.pooling import PoolingAttention, pool_inside
from odconv.layers.transposed import (
    CondConvTranspose1d,
    CondConvTranspose2d,
    CondConvTranspose3d,
    DyConvTranspose1d,
    DyConvTranspose2d,
    DyConvTranspose3d,
    DynamicConvTranspose,
    ODConvTranspose1d,
    ODConvTranspose2d,
    ODConvTranspose3d,
)
from odconv.ops.contract import Attentions

__all__ = [
    "Attention",
    "Attentions",
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
    "DynamicConvTranspose",
    "ODConv1d",
    "ODConv2d",
    "ODConv3d",
    "ODConvTranspose1d",
    "ODConvTranspose2d",
    "ODConvTranspose3d",
    "PerSampleConv",
    "PoolingAttention",
    "find_temperature",
    "pool_inside",
    "set_temperature",
    "try_temperature",
]
