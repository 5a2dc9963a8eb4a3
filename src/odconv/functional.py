"""Functions behind the layers, as in ``torch.nn.functional``."""

from odconv.ops import dynamic_conv, dynamic_conv_transpose, mixed_conv, per_sample_conv

__all__ = ["dynamic_conv", "dynamic_conv_transpose", "mixed_conv", "per_sample_conv"]
