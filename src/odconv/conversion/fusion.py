"""Folding batch norm and activations into convolutions: what follows the filter attention is a scale and a shift."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from odconv.conversion.convert import CONVOLUTIONS
from odconv.layers import DynamicConv
from odconv.layers.fused_attention import fuse_attentions
from odconv.layers.warehouse_conv import KWConv, KWLinear
from odconv.ops.epilogue import MODULES, Epilogue, finished
from odconv.ops.packing import Packed
from odconv.system.modules import check_module

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
NAMES = {kind: name for name, kind in MODULES.items()}
TWICE = ("relu", "relu6")  # change nothing when they are called twice
PASSED_ON = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""Modules that return their input, or a view of it, in evaluation mode."""


class Tracer(fx.Tracer):
    """Follows a network down to its dynamic layers and PyTorch's own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Say whether a module is not looked into."""
        return isinstance(module, DynamicConv | KWConv | KWLinear | BatchNorm) or super().is_leaf_module(module, name)


class Activated(nn.Module):
    """An activation that a network calls in several places, left out behind layers that have activated already.

    Args:
        activation: a module that changes nothing when it is called twice.
        name: its name in an epilogue.
    """

    def __init__(self, activation: nn.Module, name: str) -> None:
        super().__init__()
        self.activation = activation
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return x activated."""
        return x if finished(x).activation == self.name else self.activation(x)


class Unmarked(nn.Module):
    """Takes the place of a folded activation whose output may be changed in place, and drops the record of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of x, which has no record of what was done to x."""
        return x.view(x.shape)


class Part(NamedTuple):
    """A part of a network that could be traced, and the modules that are called in it, by node."""

    module: nn.Module
    modules: dict[fx.Node, Any]

    def once(self, node: fx.Node) -> bool:
        """Return whether a node is the only call of its module."""
        return sum(module is self.modules[node] for module in self.modules.values()) == 1

    def before(self, node: fx.Node) -> fx.Node | None:
        """Return the call whose output is what a call takes, and alone takes."""
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        return source if isinstance(source, fx.Node) and source in self.modules and len(source.users) == 1 else None

    def put(self, node: fx.Node, module: nn.Module) -> None:
        """Put another module in the place of the one that a node calls."""
        self.module.set_submodule(str(node.target), module)
        self.modules[node] = module


def fuse(model: nn.Module) -> nn.Module:
    """Fold every batch norm, and activations, into the convolution before, in place.

    The network then computes what it did in evaluation mode, up to rounding, for every input. A batch norm is folded
    where it alone takes what the convolution gives, and each of the two is called once; others stay. An identity takes
    its place, or the activation that timm's batch norm holds, so that all other layers keep their names. What follows
    KernelWarehouse's layers stays, since their kernels are made of cells that other layers use too.

    Within attentions, batch norm becomes part of the hidden layer, and the heads become one matrix; those
    with hooks, and of other classes, stay as they are.

    ReLU, ReLU6, Hardswish and SiLU that alone follow a dynamic layer become part of it, too: on the CPU, without
    gradients, it activates what it writes, and leaves the means of its maps for the attention of the next dynamic
    layer. What has hooks stays. A hook that changes maps in place between two such layers is not seen there.

    In bfloat16 and float16 on the CPU, dynamic layers keep their kernels packed, too, beside the weight: as much memory
    again, and no packing at every call.

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
    check_module(model)
    if training := [name for name, part in model.named_modules() if isinstance(part, BatchNorm) and part.training]:
        raise ValueError(f"model must be in evaluation mode, got batch norm in training mode: {training[0]}")
    owners = Counter(child for part in model.modules() for child in part._modules.values())
    for part in list(_traced_parts(model)):
        for node in part.modules:
            _fold_norm(part, node, owners)
        for node in part.modules:
            _fold_activation(part, node, owners)
        for node in part.modules:
            _hand_on_means(part, node)
    fuse_attentions(model)
    for layer in model.modules():
        if isinstance(layer, DynamicConv) and not layer.transposed:
            layer.packed = Packed()
            with torch.no_grad():
                layer.packed.of(layer.weight, layer.groups)  # before the network is compiled
    return model


def _traced_parts(model: nn.Module) -> Iterator[Part]:
    """Yield the network, or those of its parts that can be traced."""
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
            yield from _traced_parts(child)
        return
    yield Part(model, {node: model.get_submodule(str(node.target)) for node in nodes})


def _fold_norm(part: Part, node: fx.Node, owners: Counter[Any]) -> None:
    """Fold a batch norm into the convolution before it, if it is one and can be."""
    bn, source = part.modules[node], part.before(node)
    if source is None or not isinstance(bn, BatchNorm) or bn.running_mean is None:
        return
    conv, rest = part.modules[source], besides(bn)
    if rest is None or not (isinstance(conv, DynamicConv) or type(conv) in CONVOLUTIONS):
        return
    if part.once(node) and part.once(source) and owners[conv] == owners[bn] == 1:
        if isinstance(conv, DynamicConv):
            if conv.epilogue.activation is not None:
                return
            fold_batch_norm(conv, bn)
        else:
            _fold_into_static(conv, bn)
        part.put(node, rest)


def besides(bn: Any) -> nn.Module | None:
    """Return what is left of a batch norm that was folded; None for a class that may do anything else."""
    if type(bn).__module__.startswith("torch.nn."):
        return nn.Identity()
    if type(bn).__name__ == "BatchNormAct2d":  # timm's, with an activation and dropout behind it
        return bn.act if type(bn.drop) is nn.Identity else nn.Sequential(bn.drop, bn.act)
    return None


def _fold_activation(part: Part, node: fx.Node, owners: Counter[Any]) -> None:
    """Make an activation part of the dynamic layer before it, if it is one and can be."""
    activation, source = part.modules[node], _layer_before(part, node)
    name = activation.name if isinstance(activation, Activated) else NAMES.get(type(activation))
    if name is None or source is None or not part.once(source):
        return
    layer = part.modules[source]
    hooked = layer._forward_hooks or activation._forward_hooks or activation._forward_pre_hooks  # which want to see it
    if owners[layer] != 1 or layer.epilogue.activation is not None or hooked:
        return
    if part.once(node) and owners[activation] == 1:
        part.put(node, nn.Identity() if name not in TWICE or _is_kept(part, node) else Unmarked())
    elif name in TWICE and _is_kept(part, node):  # called in other places, or by other names, too
        every = [other for other, module in part.modules.items() if module is activation]
        kept = activation if isinstance(activation, Activated) else Activated(activation, name)
        for other in every:
            part.put(other, kept)
    else:
        return
    layer.epilogue = Epilogue(name)


def _is_kept(part: Part, node: fx.Node) -> bool:
    """Return whether nothing changes a call's output in place, after which its record would still say "activated"."""

    def keeps(user: fx.Node) -> bool:
        module = part.modules.get(user)
        if module is None:  # torch.fx does not tell y += z from y + z
            operands = (*user.args[:1], *user.kwargs.values())
            return user.op in ("call_function", "call_method") and node not in operands
        if isinstance(module, PASSED_ON):
            return _is_kept(part, user)
        return not isinstance(module, Activated) and not getattr(module, "inplace", False)

    return all(map(keeps, node.users))


def _hand_on_means(part: Part, node: fx.Node) -> None:
    """Let a dynamic layer take the means of its input's maps from the layer that writes them, if that can tell."""
    layer = part.modules[node]
    if isinstance(layer, DynamicConv) and layer.context_channels is None and (source := _layer_before(part, node)):
        before = part.modules[source]
        if before.epilogue.activation is not None and not before.transposed and not layer.attention.takes_means:
            before.epilogue = before.epilogue._replace(means=True)
            layer.attention.takes_means = True


def _layer_before(part: Part, node: fx.Node) -> fx.Node | None:
    """Return the call of a dynamic layer whose output, unchanged but for its epilogue, is what a call takes."""
    source, activations = part.before(node), set()
    while source is not None and type(between := part.modules[source]) in (nn.Identity, Activated):
        if isinstance(between, Activated):
            activations.add(between.name)
        source = part.before(source)
    layer = None if source is None else part.modules[source]
    return source if isinstance(layer, DynamicConv) and activations <= {layer.epilogue.activation} else None


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
        ValueError: bn has another number of channels, or no running statistics; or the layer activates what it gives.
    """
    if isinstance(layer, KWConv):
        raise TypeError(f"a {type(layer).__name__} has no filters of its own to scale: other layers use its cells too")
    if not isinstance(layer, DynamicConv):
        raise TypeError(f"layer must be a dynamic layer, got {type(layer).__name__}")
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn must be a batch norm, got {type(bn).__name__}")
    if layer.epilogue.activation is not None:
        raise ValueError(f"layer must not activate what it gives, got one with {layer.epilogue.activation}")
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
