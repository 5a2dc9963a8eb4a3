"""Folding batch norm into dynamic layers, exactly: what follows the filter attention is a scale and a shift."""

import torch
from torch import Tensor, nn

from odconv.layers import DynamicConv

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


@torch.no_grad()
def fold_batch_norm(layer: DynamicConv, bn: BatchNorm) -> DynamicConv:
    """Fold the batch norm that follows a dynamic layer into it, in place.

    The layer then computes what both computed in evaluation mode, up to rounding, for every input. Batch norm's scale
    goes into the same filter of every kernel, where it commutes with the attentions, and into both biases; its shift
    into the static bias, which no attention weights. A layer with a mixed bias gets a static one beside it.

    Args:
        layer: any dynamic layer, transposed ones too.
        bn: batch norm over the layer's output channels, O, with running statistics.

    Returns:
        The layer.

    Raises:
        TypeError: layer is not dynamic, or bn is not a batch norm.
        ValueError: bn has another number of channels, or no running statistics.
    """
    if not isinstance(layer, DynamicConv):
        raise TypeError(f"layer must be a dynamic layer, got {type(layer).__name__}")
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn must be a batch norm, got {type(bn).__name__}")
    if bn.num_features != layer.out_channels:
        raise ValueError(f"bn must have the layer's {layer.out_channels} output channels, got {bn.num_features}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn must have running statistics, got one with track_running_stats=False")
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    scale = (bn.running_var.to(dtype) + bn.eps).rsqrt()
    scale = scale if bn.weight is None else scale * bn.weight.to(dtype)
    shift = -bn.running_mean.to(dtype) * scale
    shift = shift if bn.bias is None else shift + bn.bias.to(dtype)
    layer.weight.copy_(scale_filters(layer, scale))
    if layer.kernel_bias is not None:
        layer.kernel_bias.copy_(layer.kernel_bias * scale)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(layer.bias * scale + shift)
    return layer


def scale_filters(layer: DynamicConv, scale: Tensor) -> Tensor:
    """The kernels of a layer, each of their filters multiplied by its entry of scale, (O)."""
    taps = (1,) * layer.dims
    if not layer.transposed:  # (n, O, C/groups, *kernel_size)
        return layer.weight * scale.view(-1, 1, *taps)
    blocks = layer.weight.unflatten(1, (layer.groups, -1))  # (n, groups, C/groups, O/groups, *kernel_size)
    return (blocks * scale.view(layer.groups, 1, -1, *taps)).flatten(1, 2)
