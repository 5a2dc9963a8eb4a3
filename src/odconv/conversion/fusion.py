"""Folding batch norm into convolutions, exactly: what follows the filter attention is a scale and a shift."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from odconv.layers import DynamicConv
from odconv.layers.warehouse_conv import KWConv, KWLinear

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
STATIC = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Tracer(fx.Tracer):
    """Follows a network down to its dynamic layers and PyTorch's own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Say whether a module is not looked into."""
        return isinstance(module, DynamicConv | KWConv | KWLinear | BatchNorm) or super().is_leaf_module(module, name)


def fuse(model: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution before it, dynamic or static, in place.

    The network then computes what it did in evaluation mode, up to rounding, for every input. A batch norm is folded
    where it alone takes what the convolution gives, and each of the two is called once; others stay. An identity takes
    its place, or the activation that timm's batch norm holds, so that all other layers keep their names. Batch norm
    within attentions stays: it is on vectors. So does what follows KernelWarehouse's layers, whose kernels are made of
    cells that other layers use too.

    What comes before what is found by `torch.fx`; where it cannot trace a network, a detector for example, it looks at
    its parts one by one.

    Args:
        model: a network in evaluation mode.

    Returns:
        The network.

    Raises:
        ValueError: it is in training mode; or there is batch norm, and none can be folded since nothing can be traced.
            :func:`odconv.conversion.fusion.fold_batch_norm` folds a pair that you name.
    """
    if training := [name for name, part in model.named_modules() if isinstance(part, BatchNorm) and part.training]:
        raise ValueError(f"model must be in evaluation mode, got batch norm in training mode: {training[0]}")
    owners = Counter(child for part in model.modules() for child in part._modules.values())
    for parent, name, conv, bn in list(_find_pairs(model)):
        rest = besides(bn)
        if owners[conv] == owners[bn] == 1 and bn.running_mean is not None and rest is not None:
            if isinstance(conv, DynamicConv):
                fold_batch_norm(conv, bn)
            else:
                _fold_into_static(conv, bn)
            parent.set_submodule(name, rest)
    return model


def besides(bn: Any) -> nn.Module | None:
    """Return what is left of a batch norm that was folded; None for a class that may do anything else."""
    if type(bn).__module__.startswith("torch.nn."):
        return nn.Identity()
    if type(bn).__name__ == "BatchNormAct2d":  # timm's, with an activation and dropout behind it
        return nn.Sequential(bn.drop, bn.act)
    return None


def _find_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, Any]]:
    """Yield convolutions and the batch norm that alone follows: a part of the network, its name there, and the two."""
    try:
        nodes = [node for node in Tracer().trace(model).nodes if node.op == "call_module"]
    except Exception as error:  # whatever the network does with what is no tensor
        parts = [
            child
            for child in model.children()
            if not isinstance(child, DynamicConv) and any(isinstance(part, BatchNorm) for part in child.modules())
        ]
        if parts and not any(True for child in parts for _ in child.children()):
            raise ValueError(
                f"the {type(model).__name__} cannot be traced ({error}); "
                "odconv.conversion.fusion.fold_batch_norm folds pairs"
            ) from error
        for child in parts:
            yield from _find_pairs(child)
        return
    modules = {node: model.get_submodule(str(node.target)) for node in nodes}
    called = Counter(modules.values())
    for node in nodes:
        before = node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before in modules and len(before.users) == 1:
            conv, bn = modules[before], modules[node]
            kinds = isinstance(bn, BatchNorm) and (isinstance(conv, DynamicConv) or type(conv) in STATIC)
            if kinds and called[conv] == called[bn] == 1:
                yield model, str(node.target), conv, bn


def _fold_into_static(conv: Any, bn: Any) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias, conv.transposed
    )


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
    if isinstance(layer, KWConv):
        raise TypeError(f"a {type(layer).__name__} has no filters of its own to scale: other layers use its cells too")
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
    """Return the kernels of a layer, each of their filters multiplied by its entry of scale, (O)."""
    taps = (1,) * layer.dims
    if not layer.transposed:  # (n, O, C/groups, *kernel_size)
        return layer.weight * scale.view(-1, 1, *taps)
    blocks = layer.weight.unflatten(1, (layer.groups, -1))  # (n, groups, C/groups, O/groups, *kernel_size)
    return (blocks * scale.view(layer.groups, 1, -1, *taps)).flatten(1, 2)
