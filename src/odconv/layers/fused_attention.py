"""Attentions with fewer parts that compute the same, for inference."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from odconv.layers.attention import (
    POINTWISE,
    Attention,
    BatchNorm,
    Pointwise,
    PoolingAttention,
    fill_in_temperature,
    is_plain,
    take_factors,
)

SETTINGS = ("dims", "heads", "norm", "kernel_gate", "init", "initial_temperature", "gain", "kernel_gain", "takes_means")


class FusedAttention(Attention):
    """An attention whose batch norm is part of its hidden layer, and whose heads are the rows of one matrix.

    It computes what the attention did in evaluation mode, and can be trained no less, but has other keys.

    Args:
        attention: one for which :func:`can_be_fused` is true. What it has is copied, or taken over.
    """

    def __init__(self, attention: Attention) -> None:
        PoolingAttention.__init__(self)
        for name in SETTINGS:
            setattr(self, name, getattr(attention, name))
        self.register_buffer("temperature", attention.temperature)
        self.register_load_state_dict_pre_hook(fill_in_temperature)
        self.register_buffer("factors", attention.factors)
        self.register_load_state_dict_pre_hook(take_factors)
        self.fc, self.bn = attention.fc, attention.bn
        if isinstance(attention.bn, BatchNorm) and attention.fc is not None:
            self.fc, self.bn = folded(attention.fc, attention.bn), None
        heads = attention.head_layers()
        self.heads_fc = pointwise(
            torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads]), heads[0]
        )
        self.train(attention.training)

    def head_layers(self) -> list[Any]:
        """Return the one last layer, of all heads."""
        return [self.heads_fc]

    def _logits(self, z: Tensor) -> tuple[Tensor, ...]:
        sizes = [math.prod(shape) for shape in self.heads.values()]
        return self._project(self.heads_fc, z).split(sizes, 1)


def can_be_fused(attention: Any) -> bool:
    """Return whether an attention is one as this library makes them, in evaluation mode, and nobody looks into it."""
    if type(attention) is not Attention or not attention.heads or attention._forward_hooks:
        return False
    if attention._forward_pre_hooks or not all(map(is_plain, attention.children())):
        return False
    norm: Any = attention.bn
    return not isinstance(norm, BatchNorm) or not (norm.training or norm.running_mean is None or norm.weight is None)


def fuse_attentions(model: nn.Module) -> None:
    """Put fused attentions in the place of those that can be, in place."""
    for layer in model.modules():
        attention: Any = getattr(layer, "attention", None)
        if can_be_fused(attention):
            layer.attention = FusedAttention(attention)


def folded(fc: Pointwise, norm: Any) -> Pointwise:
    """Return a hidden layer that does what batch norm does after it, computed in at least float32."""
    numbers: list[Any] = [fc.weight, fc.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias]
    dtype = torch.promote_types(fc.weight.dtype, torch.float32)
    numbers = [one.to(dtype) if isinstance(one, Tensor) else one for one in numbers]
    weight, bias = fuse_conv_bn_weights(*numbers)
    return pointwise(weight, bias, fc)


def pointwise(weight: Tensor, bias: Tensor, like: Pointwise) -> Pointwise:
    """Return a 1x1 convolution with a weight and a bias, in the dtype of another and trained where that is."""
    outputs, inputs = weight.shape[:2]
    layer = POINTWISE[weight.dim() - 2](inputs, outputs, 1, device=like.weight.device, dtype=like.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)  # type: ignore[union-attr]
    return layer.requires_grad_(like.weight.requires_grad)
