"""Replace the convolutions of any network by dynamic ones."""

from collections.abc import Callable
from typing import Any

from torch import nn

from odconv.layers import DynamicConv

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def replace_convolutions(
    model: nn.Module,
    make: Callable[[Convolution], nn.Module],
    chosen: Callable[[str, Convolution], bool],
) -> list[str]:
    """Replace every chosen convolution inside a network, in place.

    A convolution used in several places is replaced by one layer in all of them. Dynamic layers are left as they are,
    the 1x1 convolutions of their attentions included.

    Args:
        model: the network.
        make: builds the replacement of a convolution.
        chosen: whether to replace the convolution of this name.

    Returns:
        The names of the convolutions that were replaced.
    """
    replaced: list[str] = []
    made: dict[Convolution, nn.Module] = {}

    def enter(parent: nn.Module, prefix: str) -> None:
        for child_name, child in parent.named_children():
            name = prefix + child_name
            if isinstance(child, CONVOLUTIONS) and chosen(name, child):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, child_name, made[child])
                replaced.append(name)
            elif not isinstance(child, DynamicConv):
                enter(child, f"{name}.")

    enter(model, "")
    return replaced


def dynamic_like(conv: Convolution, layer: type[DynamicConv], **options: Any) -> DynamicConv:
    """A freshly drawn dynamic layer with the geometry, bias, device, dtype and mode of a convolution.

    Args:
        conv: the convolution to imitate.
        layer: class of the dynamic layer, of as many dimensions.
        **options: its further arguments, `kernel_num` for example.
    """
    return layer(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **options,
    ).train(conv.training)
