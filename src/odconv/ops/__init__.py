"""The operator of the family: a convolution whose kernel is mixed for each sample."""

from odconv.ops.dynamic_conv import BACKENDS, dynamic_conv

__all__ = ["BACKENDS", "dynamic_conv"]
