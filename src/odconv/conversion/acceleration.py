"""Other people's dynamic layers on the operator of this library; their modules, parameters and keys stay."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odconv.conversion.folded_batch import UnfoldedBatch
from odconv.layers import PerSampleConv
from odconv.ops import dynamic_conv
from odconv.ops.cells import cell_conv
from odconv.system.modules import check_module

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""How far, relative to the largest value, the two ways of computing may differ for a layer to be changed."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
GEOMETRY = ("stride", "padding", "dilation", "groups")


class Rule(NamedTuple):
    """A kind of layer that is known.

    Attributes:
        kind: whose it is.
        fits: whether a module looks like one; it raises AttributeError where the module lacks what these have.
        forward: what it computes, by our operator, given the module and its inputs.
        example: inputs for a module.
        alone: makes a copy of a module that has what it needs of others, for the comparison.
        dtype: in which they are compared; not all can compute in float64.
    """

    kind: str
    fits: Callable[[Any], bool]
    forward: Callable[..., Tensor]
    example: Callable[[Any], tuple[Any, ...]]
    alone: Callable[[Any], Any] = copy.deepcopy
    dtype: torch.dtype = torch.float64


class Decision(NamedTuple):
    """What became of a layer.

    Attributes:
        name: its name in the network.
        kind: what it was taken for.
        reason: why it was left as it is; empty where it was accelerated.
    """

    name: str
    kind: str
    reason: str


class Acceleration(NamedTuple):
    """What became of the dynamic layers of a network; ``print`` shows a table.

    Attributes:
        layers: one decision for each layer that looks dynamic.
    """

    layers: list[Decision]

    def __str__(self) -> str:
        """Return a line for each layer."""
        done = sum(not layer.reason for layer in self.layers)
        lines = [f"{done} of {len(self.layers)} dynamic layers accelerated"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for name, kind, reason in self.layers:
            lines.append(f"{name:{width}}  {kind}{f': left, {reason}' if reason else ''}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Let the dynamic layers of another network run on this library's operator, in place.

    Known are timm's `CondConv2d`, EfficientAT's `DynamicConv`, the `ODConv2d` and `Dynamic_conv2d` of the files that
    most repositories copy, KernelWarehouse's layers and FDConv, told by what they have, not by where they come from.
    Each is first compared with its own forward on random inputs, in float64 but for FDConv, which cannot compute in it.
    It keeps its class, its attention, its parameters and its keys; only its forward is replaced, which
    :func:`restore_forward` undoes. What it computes is the same up to rounding.

    Args:
        model: any network.

    Returns:
        What was accelerated, and what was left and why.
    """
    check_module(model)
    decisions = []
    for name, module in model.named_modules():
        rule = find_rule(module)
        if rule is not None:
            reason = why_not(module, rule)
            if not reason:
                module.forward = functools.partial(rule.forward, module)
            decisions.append(Decision(name, rule.kind, reason))
    return Acceleration(decisions)


def restore_forward(model: nn.Module) -> nn.Module:
    """Give the layers that :func:`accelerate` changed their own forward back, in place.

    Args:
        model: any network.

    Returns:
        The model.
    """
    check_module(model)
    for module in model.modules():
        if is_accelerated(module):
            del module.forward
    return model


def is_accelerated(module: nn.Module) -> bool:
    """Return whether a module runs on our operator by :func:`accelerate`."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in [rule.forward for rule in RULES]


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for a module, None where it looks like none of those known."""
    if isinstance(module, PerSampleConv):
        return None
    for rule in RULES:
        try:
            if rule.fits(module):
                return rule
        except AttributeError:
            continue
    return None


def why_not(module: Any, rule: Rule) -> str:
    """Return why a module cannot be accelerated by a rule; empty where it can."""
    if is_accelerated(module):
        return "accelerated already"
    if "forward" in vars(module):
        return "its forward was replaced by something else"
    if any(parameter.is_meta for parameter in module.parameters()):
        return "it is on the meta device"
    return compare(module, rule)


def compare(module: Any, rule: Rule) -> str:
    """Return how our operator and a module's own forward differ on random inputs; empty where they do not.

    The parameters are random, too: two ways of computing may agree on those of a new layer by chance.
    """
    try:
        exact = rule.alone(module).cpu().to(rule.dtype)
    except Exception as error:
        return f"it cannot be copied for a comparison: {error}"
    for part in exact.modules():
        for hooks in HOOKS:
            getattr(part, hooks).clear()
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in exact.parameters():
            parameter.normal_()
        for buffer in exact.buffers():
            if buffer.is_floating_point():  # variances, temperatures and the like are positive
                buffer.uniform_(0.5, 2)
        inputs = rule.example(exact)
        for training in (False, True):
            try:
                wanted = computed(copy.deepcopy(exact).train(training), inputs)
            except Exception as error:
                return f"its own forward fails on a small input: {error}"
            try:
                ours = functools.partial(rule.forward, copy.deepcopy(exact).train(training))
                found = computed(ours, inputs)
            except Exception as error:
                return f"our operator does not take it: {error}"
            if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
                return "it computes something else"
            largest = wanted.abs().max()
            if not 0 < largest < math.inf or (found - wanted).abs().max() > TOLERANCE[rule.dtype] * largest:
                return "it computes something else"
    return ""


def computed(forward: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Return what a forward gives with the random numbers, of dropout for example, that the other one gets."""
    torch.manual_seed(1)
    return forward(*inputs)


def some_map(layer: Any, channels: int, taps: tuple[int, ...]) -> Tensor:
    """Return two random maps large enough for a layer's kernel."""
    dilation = layer.dilation if isinstance(layer.dilation, int) else max(layer.dilation)
    extent = dilation * (max(taps) - 1) + 8
    return torch.randn(2, channels, extent, extent + 1, dtype=layer.weight.dtype, device=layer.weight.device)


def geometry_of(layer: Any) -> dict[str, Any]:
    """Return the arguments of a layer's convolution."""
    return {name: getattr(layer, name) for name in GEOMETRY}


def is_condconv(layer: Any) -> bool:
    """Return whether a module is like timm's CondConv2d: flat experts, and shares from outside."""
    return layer.weight.shape == (layer.num_experts, math.prod(layer.weight_shape)) and layer.dynamic_padding in (0, 1)


def condconv(layer: Any, x: Tensor, routing_weights: Tensor) -> Tensor:
    """Compute timm's CondConv2d."""
    weight, geometry = layer.weight.view(-1, *layer.weight_shape), geometry_of(layer)
    if layer.dynamic_padding:  # to as many positions as the stride leaves, the odd zero at the end
        sides = []
        for extent, k, s, d in zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
            total = max((-(-extent // s) - 1) * s + (k - 1) * d + 1 - extent, 0)
            sides += [total - total // 2, total // 2]
        x, geometry["padding"] = F.pad(x, sides[::-1]), 0
    return dynamic_conv(x, weight, kernel=routing_weights, bias=layer.bias, **geometry)


def condconv_example(layer: Any) -> tuple[Any, ...]:
    """Return inputs for timm's CondConv2d."""
    x = some_map(layer, layer.in_channels, layer.kernel_size)
    return x, torch.rand(2, layer.num_experts, dtype=x.dtype, device=x.device)


def is_contextual(layer: Any) -> bool:
    """Return whether a module is like EfficientAT's DynamicConv: a softmax over k kernels from a context vector."""
    one = layer.att_groups == 1 and layer.weight.dim() == 4 and layer.weight.shape[:3] == (1, 1, layer.k)
    return one and isinstance(layer.residuals, nn.Module) and layer.temperature > 0


def contextual(layer: Any, x: Tensor, g: Any = None) -> Tensor:
    """Compute EfficientAT's DynamicConv; the context vector is the first of `g`."""
    shares = (layer.residuals(g[0].flatten(1)) / layer.temperature).softmax(1)
    size = layer.kernel_size
    weight = layer.weight.view(layer.k, layer.out_channels, layer.in_channels // layer.groups, size, size)
    return dynamic_conv(x, weight, kernel=shares, bias=layer.bias, **geometry_of(layer))


def contextual_example(layer: Any) -> tuple[Any, ...]:
    """Return inputs for EfficientAT's DynamicConv."""
    width = next(part.in_features for part in layer.residuals.modules() if isinstance(part, nn.Linear))
    x = some_map(layer, layer.in_channels, (layer.kernel_size,))
    return x, (torch.randn(2, width, 1, 1, dtype=x.dtype, device=x.device),)


def attention_of(layer: Any) -> nn.Module:
    """Return the attention of a copied layer."""
    return layer.attention if hasattr(layer, "attention") else layer.attn


def is_copied(layer: Any) -> bool:
    """Return whether a module is like the published ODConv2d or the usual Dynamic_conv2d: kernels and an attention."""
    shape = layer.weight.shape
    return len(shape) == 5 and isinstance(attention_of(layer), nn.Module) and bool(geometry_of(layer))


def copied(layer: Any, x: Tensor) -> Tensor:
    """Compute a copied layer, whose attention gives the kernels' shares or what the published ODConv's does."""
    found: Any = attention_of(layer)(x)
    given: dict[str, Any] = {}
    if isinstance(found, Tensor):
        given["kernel"] = found.flatten(1)
    else:  # each a tensor with axes of one, or the number 1
        for name, attention in zip(("channel", "filter", "spatial", "kernel"), found, strict=True):
            if isinstance(attention, Tensor):
                given[name] = attention.flatten(1)
    if "spatial" in given:
        given["spatial"] = given["spatial"].unflatten(1, layer.weight.shape[3:])
    bias = getattr(layer, "bias", None)
    return dynamic_conv(x, layer.weight, bias=bias if isinstance(bias, Tensor) else None, **given, **geometry_of(layer))


def copied_example(layer: Any) -> tuple[Any, ...]:
    """Return inputs for a copied layer."""
    shape = layer.weight.shape
    return (some_map(layer, shape[2] * layer.groups, tuple(shape[3:])),)


def is_warehoused(layer: Any) -> bool:
    """Return whether a module is like KernelWarehouse's: shares of cells, which a manager in a list of one gives."""
    managers = layer.warehouse_manager
    if not isinstance(managers, list) or len(managers) != 1:  # a network has its manager by the same name
        return False
    cells = managers[0].take_cell(layer.warehouse_id)
    return isinstance(layer.attention, nn.Module) and cells.dim() == len(layer.kernel_size) + 3


def warehoused(layer: Any, x: Tensor) -> Tensor:
    """Compute a layer of KernelWarehouse, whose attention gives a row of shares for each piece of each kernel."""
    cells = layer.warehouse_manager[0].take_cell(layer.warehouse_id)
    shape = (layer.out_planes, layer.in_planes // layer.groups, *layer.kernel_size)
    pieces = math.prod(shape) // math.prod(cells.shape[1:])
    shares = layer.attention(x).reshape(x.shape[0], pieces, -1)
    return cell_conv(x, cells, shares, shape, bias=layer.bias, **geometry_of(layer))


def warehoused_example(layer: Any) -> tuple[Any, ...]:
    """Return inputs for a layer of KernelWarehouse."""
    extents = (
        d * (k - 1) + 4 + axis for axis, (d, k) in enumerate(zip(layer.dilation, layer.kernel_size, strict=True))
    )
    parameter = next(layer.parameters())
    return (torch.randn(2, layer.in_planes, *extents, dtype=parameter.dtype, device=parameter.device),)


class Cells(nn.Module):
    """The cells of one layer in the place of the whole network's manager."""

    def __init__(self, cells: Tensor) -> None:
        super().__init__()
        self.cells = nn.Parameter(cells.detach().clone())

    def take_cell(self, _: Any) -> Tensor:
        """Return the cells, whichever are asked for."""
        return self.cells


def with_own_cells(layer: Any) -> Any:
    """Return a copy of a layer of KernelWarehouse that has its cells as parameters of its own."""
    (manager,) = layer.warehouse_manager
    own = Cells(manager.take_cell(layer.warehouse_id))
    copied = copy.deepcopy(layer, {id(manager): own})
    copied.add_module("own_cells", own)
    return copied


def is_frequency(layer: Any) -> bool:
    """Return whether a module is like FDConv: kernels of Fourier coefficients, some for each of several frequencies."""
    return isinstance(layer.KSM_Global, nn.Module) and len(layer.indices) > 0 and layer.kernel_num > 0


def frequency(layer: Any, x: Tensor) -> Tensor:
    """Compute FDConv by its own forward, whose convolution alone is ours."""
    with UnfoldedBatch(x.shape[0]):
        return type(layer).forward(layer, x)


def frequency_example(layer: Any) -> tuple[Any, ...]:
    """Return inputs for FDConv."""
    extent = max(layer.dilation) * (max(layer.kernel_size) - 1) + 8
    return (torch.randn(2, layer.in_channels, extent, extent + 1),)


RULES = (
    Rule("timm's CondConv2d", is_condconv, condconv, condconv_example),
    Rule("EfficientAT's DynamicConv", is_contextual, contextual, contextual_example),
    Rule("copied ODConv2d or Dynamic_conv2d", is_copied, copied, copied_example),
    Rule("KernelWarehouse's layer", is_warehoused, warehoused, warehoused_example, with_own_cells),
    Rule("FDConv", is_frequency, frequency, frequency_example, dtype=torch.float32),
)
