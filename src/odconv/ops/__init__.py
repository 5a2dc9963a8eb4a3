"""The operator of the family: a convolution whose kernel is mixed for each sample, and its transposed form."""

from odconv.ops.dynamic_conv import BACKENDS, dynamic_conv, per_sample_conv
from odconv.ops.mixing import mixed_conv
from odconv.ops.transposed import dynamic_conv_transpose

__all__ = ["BACKENDS", "dynamic_conv", "dynamic_conv_transpose", "mixed_conv", "per_sample_conv"]
