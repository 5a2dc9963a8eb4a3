"""Structured pruning of dynamic layers: removing whole channels and filters, by hand or by torch-pruning."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odconv.layers import DynamicConv, PerSampleConv
from odconv.layers.fused_attention import FusedAttention
from odconv.system.packages import needed_by


def keep_filters(layer: DynamicConv, kept: Sequence[int]) -> DynamicConv:
    """Remove the output channels of a layer but for some, in place.

    Args:
        layer: a dynamic layer with groups = 1.
        kept: the output channels to keep, in their order.

    Returns:
        The layer, which computes what it did for these channels.

    Raises:
        ValueError: the layer has groups, or a channel is out of range or there twice.
    """
    index = _index("kept", kept, layer.out_channels, layer)
    _keep(layer, "weight", index, 2 if layer.transposed else 1)
    _keep(layer, "bias", index, 0)
    _keep(layer, "kernel_bias", index, 1)
    if "filter" in layer.attention.heads:
        _keep_outputs(layer.attention.filter_fc, index)
        layer.attention.heads["filter"] = (len(index),)
    layer.out_channels = len(index)
    return layer


def keep_channels(layer: DynamicConv, kept: Sequence[int]) -> DynamicConv:
    """Remove the input channels of a layer but for some, in place.

    The attention no longer sees them either, unless it looks at a context of its own.

    Args:
        layer: a dynamic layer with groups = 1.
        kept: the input channels to keep, in their order.

    Returns:
        The layer, which computes what it did where the others were zero.

    Raises:
        ValueError: the layer has groups, or a channel is out of range or there twice.
    """
    index = _index("kept", kept, layer.in_channels, layer)
    _keep(layer, "weight", index, 1 if layer.transposed else 2)
    if "channel" in layer.attention.heads:
        _keep_outputs(layer.attention.channel_fc, index)
        layer.attention.heads["channel"] = (len(index),)
    if layer.context_channels is None:
        heads = [getattr(layer.attention, f"{name}_fc") for name in layer.attention.heads]
        for first in heads if layer.attention.fc is None else [layer.attention.fc]:
            _keep(first, "weight", index, 1)
            first.in_channels = len(index)
        if layer.attention.fc is None and isinstance(norm := layer.attention.bn, nn.GroupNorm):  # of the pooled input
            for name in ("weight", "bias"):
                _keep(norm, name, index, 0)
            norm.num_channels = len(index)
    layer.in_channels = len(index)
    return layer


def pruners() -> dict[type[PerSampleConv], Any]:
    """Return what torch-pruning needs to know of dynamic layers, yours included, for its `customized_pruners`.

    Its `root_module_types` must name :class:`odconv.DynamicConv` beside convolutions and linear layers, or only what
    follows from pruning these is pruned.

    Raises:
        ImportError: torch-pruning is not installed.
    """
    with needed_by("odconv.conversion.pruning.pruners", "torch-pruning"):
        from torch_pruning.pruner.function import BasePruningFunc

    class Pruner(BasePruningFunc):
        def prune_out_channels(self, layer: DynamicConv, idxs: Sequence[int]) -> DynamicConv:
            return keep_filters(layer, sorted({*range(layer.out_channels)} - {*idxs}))

        def prune_in_channels(self, layer: DynamicConv, idxs: Sequence[int]) -> DynamicConv:
            return keep_channels(layer, sorted({*range(layer.in_channels)} - {*idxs}))

        def get_out_channels(self, layer: DynamicConv) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: DynamicConv) -> int:
            return layer.in_channels

    return {kind: Pruner() for kind in PerSampleConv.kinds()}


def _index(name: str, kept: Sequence[int], channels: int, layer: DynamicConv) -> Tensor:
    """Return the channels to keep as a tensor, after seeing that all that has them can be cut."""
    if not isinstance(layer, DynamicConv):
        raise TypeError(
            f"layer must have kernels of its own, got a {type(layer).__name__}, whose cells are other layers' too; "
            "prune the static network and convert it afterwards"
        )
    if isinstance(layer.attention, FusedAttention):
        raise ValueError("a layer of a fused network cannot be pruned; prune before odconv.fuse")
    if layer.groups != 1:
        raise ValueError(
            f"a layer with groups {layer.groups} cannot be pruned; prune the static network and convert it afterwards"
        )
    values = list(kept)
    whole = all(type(value) is int and 0 <= value < channels for value in values)
    if not values or not whole or len(set(values)) < len(values):
        raise ValueError(f"{name} must be different channels of 0 to {channels - 1}, got {values}")
    parts = {"": layer} | {f"attention.{name}": part for name, part in layer.attention.named_children()}
    for place, part in parts.items():
        plain = isinstance(part, DynamicConv) or type(part).__module__.startswith("torch.nn.modules.")
        if not plain or not isinstance(getattr(part, "weight", None), nn.Parameter):
            raise ValueError(
                f"the weight of {place or 'the layer'} is computed, or is another class's: remove its mask or "
                "parametrization, or merge its adapter, before channels are removed"
            )
    return torch.tensor(values, device=layer.weight.device)


def _keep_outputs(head: Any, index: Tensor) -> None:
    _keep(head, "weight", index, 0)
    _keep(head, "bias", index, 0)
    head.out_channels = len(index)


def _keep(module: nn.Module, name: str, index: Tensor, axis: int) -> None:
    old = getattr(module, name)
    if old is None:
        return
    new = nn.Parameter(old.detach().index_select(axis, index), requires_grad=old.requires_grad)
    new.grad = None if old.grad is None else old.grad.index_select(axis, index)
    setattr(module, name, new)
