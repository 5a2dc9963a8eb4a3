"""Problems: all that the times of a call's backends depend on but for the device, in words."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from odconv.ops.contract import Attentions, Geometry, is_channels_last


class Call(NamedTuple):
    """A call of the operator, its tensors in the dtype that is computed in."""

    x: Tensor
    weight: Tensor
    attentions: Attentions
    geometry: Geometry
    differentiated: bool
    per_sample: bool


def describe_call(call: Call) -> str:
    """Return which problem a call is."""
    present = [
        name for name, attention in zip(Attentions._fields, call.attentions, strict=True) if attention is not None
    ]
    return describe(call.x, call.weight, present, call.geometry, call.differentiated, call.per_sample)


def describe(
    x: Tensor, weight: Tensor, present: Iterable[str], geometry: Geometry, differentiated: bool, per_sample: bool
) -> str:
    """Return in words all that a choice depends on but for device and versions.

    Args:
        x: input, (B, C, *map), on any device.
        weight: n kernels, or one for each sample.
        present: names of the attentions that are not None, in their order.
        geometry: stride, padding, dilation and groups.
        differentiated: whether autograd wants gradients.
        per_sample: whether weight has one kernel for each sample.
    """
    batch, channels, *size = x.shape
    count, *kernel = weight.shape
    layout = "contiguous" if x.is_contiguous() else "channels-last" if is_channels_last(x) else "strided"
    stride, padding, dilation, groups = geometry
    return (
        f"{str(x.dtype).removeprefix('torch.')} {'training' if differentiated else 'inference'}, "
        f"x {(rounded(batch), channels, *map(rounded, size))} {layout}, "
        f"{'a kernel for each sample' if per_sample else f'{count} kernels'} of {tuple(kernel)}, "
        f"{' '.join(present) or 'no attentions'}, "
        f"stride {stride}, padding {padding}, dilation {dilation}, groups {groups}"
    )


def rounded(size: int) -> int:
    """Return the least power of two that is no smaller."""
    return 1 << (size - 1).bit_length()
