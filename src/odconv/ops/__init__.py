"""The operator of the family: a convolution whose kernel is mixed for each sample, and its transposed form."""

from odconv.ops.dynamic_conv import BACKENDS, dynamic_conv
from odconv.ops.transposed import dynamic_conv_transpose

__all__ = ["BACKENDS", "dynamic_conv", "dynamic_conv_transpose"]
