"""The layers in mmcv and mmengine, by name, after ``custom_imports = dict(imports=["odconv.mmcv"])`` in a config.

``conv_cfg=dict(type="ODConv2d", kernel_num=4)`` then makes a ConvModule dynamic, and
``build_upsample_layer(dict(type="ODConvTranspose2d", ...))`` a transposed one.

Registered are subclasses of the layers, under their names in this module too, that mmengine's initialisation does not
take for something else.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from odconv.conversion.convert import FAMILIES
from odconv.layers import DynamicConv
from odconv.system.packages import needed_by

with needed_by("odconv.mmcv", "mmengine"):
    from mmengine.model import weight_init
    from mmengine.registry import MODELS


class MMLayer(DynamicConv):
    """What mmcv and mmengine look for in a convolution."""

    def init_weights(self) -> None:
        """Draw the parameters as the layer's `init` says; ConvModule draws no other ones where there is this."""
        self.reset_parameters()

    def apply(self, fn: Callable[[nn.Module], None]) -> "MMLayer":
        """Apply a function to the layer and its parts; one of mmengine's initialisers to each of the n kernels.

        The parts of the attention have a start of their own, and are 1x1 convolutions in name only: an ``init_cfg`` for
        ``layer="Conv2d"`` is not meant for them. The layer is meant by its own name.
        """
        if getattr(fn, "__module__", None) != weight_init.__name__:
            return super().apply(fn)
        for index in range(self.kernel_num):
            fn(self._one_of(index))
        return self

    def _one_of(self, index: int) -> nn.Module:
        """Return a module of this class that has one of the kernels as its weight, in the same memory."""
        bias = self.bias if self.kernel_bias is None else self.kernel_bias.data[index]
        one = type(self).__new__(type(self))
        vars(one).update(vars(self), weight=self.weight.data[index], bias=bias)
        return one


def register() -> None:
    """Register a layer of every method and dimension in mmengine's MODELS, which mmcv reads; importing calls it.

    Raises:
        KeyError: another package has registered a layer with the name of one of ours.
    """
    for layer in (layer for family in FAMILIES.values() for layer in family):
        own: dict[str, Any] = {"__module__": __name__, "__doc__": layer.__doc__}
        if not layer.transposed:  # these have one already
            own["output_padding"] = (0,) * layer.dims
        globals()[layer.__name__] = MODELS.register_module(module=type(layer.__name__, (MMLayer, layer), own))


register()
