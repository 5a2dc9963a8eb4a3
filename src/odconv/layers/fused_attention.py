"""Attentions with fewer parts that compute the same, for inference."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from odconv.layers.attention import Attention, fill_in_temperature, fitting, take_factors
from odconv.layers.conv import DynamicConv
from odconv.layers.parts import BatchNorm, cast, is_hooked, is_plain
from odconv.layers.pooling import PoolingAttention
from odconv.ops.cpu import Layers

SETTINGS = ("dims", "heads", "norm", "kernel_gate", "init", "initial_temperature", "gain", "kernel_gain", "takes_means")


class FusedAttention(Attention):
    """An attention whose batch norm is part of its hidden layer, and whose heads are the rows of one matrix.

    It computes what the attention did in evaluation mode, and can be trained no less, but has other keys. It has no
    parts, of which torch.compile would watch every one.

    Args:
        attention: one for which :func:`can_be_fused` is true.

    Attributes:
        hidden_weight, hidden_bias: of the hidden layer, (h, C) and (h), or None.
        norm_weight, norm_bias: of its group norm, or of that of the pooled input, (h) or (C), or None.
        heads_weight, heads_bias: of all heads below each other, (outputs, h) and (outputs).
    """

    hidden_weight: nn.Parameter | None
    hidden_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    heads_weight: nn.Parameter
    heads_bias: nn.Parameter

    def __init__(self, attention: Attention) -> None:
        PoolingAttention.__init__(self)
        for name in SETTINGS:
            setattr(self, name, getattr(attention, name))
        self.register_buffer("temperature", attention.temperature)
        self.register_load_state_dict_pre_hook(fill_in_temperature)
        self.register_buffer("factors", attention.factors)
        self.register_load_state_dict_pre_hook(take_factors)
        fc, norm, heads = attention.fc, attention.bn, attention.head_layers()
        weight, bias = (None, None) if fc is None else (fc.weight, fc.bias)
        self.groups, self.eps = 1, 0.0
        if isinstance(norm, BatchNorm):
            weight, bias = folded(weight, norm)
        elif isinstance(norm, nn.GroupNorm):
            self.groups, self.eps = norm.num_groups, norm.eps
        self._place("hidden", weight, bias)
        self._place("norm", *((norm.weight, norm.bias) if isinstance(norm, nn.GroupNorm) else (None, None)))
        self._place("heads", torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads]))
        self.requires_grad_(heads[0].weight.requires_grad).train(attention.training)

    def reset_parameters(self) -> None:
        """Refuse to draw anew what others were made of."""
        raise ValueError("a fused attention cannot be drawn anew; draw the network, then call odconv.fuse")

    def _place(self, name: str, weight: Tensor | None, bias: Tensor | None) -> None:
        for kind, tensor in (("weight", weight), ("bias", bias)):
            own = None
            if tensor is not None:  # a 1x1 convolution becomes a matrix
                own = nn.Parameter((tensor.flatten(1) if tensor.dim() > 1 else tensor).detach().clone())
            self.register_parameter(f"{name}_{kind}", own)

    def _logits(self, z: Tensor) -> tuple[Tensor, ...]:
        if self.hidden_weight is not None:
            z = F.linear(z, self.hidden_weight.to(z.dtype), cast(self.hidden_bias, z))
        if self.norm_weight is not None:
            z = F.group_norm(z, self.groups, cast(self.norm_weight, z), cast(self.norm_bias, z), self.eps)
        if self.hidden_weight is not None:
            z = z.relu()
        logits = F.linear(z, self.heads_weight.to(z.dtype), cast(self.heads_bias, z))
        return logits.split([math.prod(shape) for shape in self.heads.values()], 1)

    def plain_layers(self, dtype: torch.dtype) -> Layers | None:
        """Return the numbers as the compiled kernel takes them; None where it does not."""
        after = [one for one in (self.hidden_bias, self.norm_weight, self.norm_bias) if one is not None]
        layers = Layers(self.hidden_weight, [*after], self.groups, self.eps, [self.heads_weight], [self.heads_bias])
        return fitting(layers, dtype)


def can_be_fused(attention: Any) -> bool:
    """Return whether an attention is one as this library makes them, in evaluation mode, and nobody looks into it."""
    if type(attention) is not Attention or not attention.heads or is_hooked(attention):
        return False
    if not all(map(is_plain, attention.children())):
        return False
    norm: Any = attention.bn
    return not isinstance(norm, BatchNorm) or not (norm.training or norm.running_mean is None or norm.weight is None)


def fuse_attentions(model: nn.Module) -> None:
    """Put fused attentions in the place of those that can be, in place."""
    for layer in model.modules():
        if isinstance(layer, DynamicConv) and can_be_fused(layer.attention):
            layer.attention = FusedAttention(layer.attention)


def folded(weight: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a hidden layer that does what batch norm does after it."""
    numbers: list[Any] = [weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias]
    exact = torch.promote_types(weight.dtype, torch.float32)
    numbers = [one.to(exact) if isinstance(one, Tensor) else one for one in numbers]
    found = fuse_conv_bn_weights(*numbers)
    return found[0].to(weight.dtype), found[1].to(weight.dtype)
