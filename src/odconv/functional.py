"""Functions behind the layers, as in ``torch.nn.functional``."""

from odconv.ops import dynamic_conv

__all__ = ["dynamic_conv"]
