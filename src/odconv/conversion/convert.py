"""Replace the convolutions of any network by dynamic ones, starting from the weights it has."""

import fnmatch
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

import odconv.layers
from odconv.layers import DynamicConv, PerSampleConv
from odconv.layers.starts import SETTLED, WARM_GATES, WARM_ROUTERS, WARM_SHARES, draw_warm
from odconv.layers.warehouse_conv import KWConv, KWConv1d, KWConv2d, KWConv3d
from odconv.system.modules import check_module
from odconv.system.text import first_few, suggest

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Chosen = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""Convolutions of a network: a glob of names, several, or a function of name and module."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FAMILIES: dict[str, list[type[DynamicConv]]] = {
    method.lower(): [
        getattr(odconv.layers, f"{method}{form}{dims}d") for form in ("", "Transpose") for dims in (1, 2, 3)
    ]
    for method in ("ODConv", "CondConv", "DyConv")
}
WAREHOUSE: list[type[KWConv]] = [KWConv1d, KWConv2d, KWConv3d]
WAREHOUSE_OPTIONS = ("budget", "stages", "reduction", "norm", "init")
SHORTCUTS = {"downsample", "shortcut", "skip", "proj"}
"""Parts of the names that torchvision, timm and others give to the projections on their shortcuts."""

SPREAD = 0.1
"""How far the n kernels of a warm start lie from the trained one, as a share of its root mean square."""

HOOKS = [key for key in vars(nn.Module()) if "_hook" in key]
OWN = {"transposed", "output_padding", "_reversed_padding_repeated_twice"}
"""Attributes that only a static convolution has."""


class Decision(NamedTuple):
    """What becomes of a convolution.

    Attributes:
        names: all names that the network has for it.
        module: the convolution, or a layer that is dynamic already.
        layer: class of the dynamic layer that replaces it; None where it is left.
        reason: why it is left; empty where it is replaced.
    """

    names: list[str]
    module: Any
    layer: Any
    reason: str


def convert(
    model: nn.Module,
    to: str | type[DynamicConv] = "odconv",
    *,
    include: Chosen | None = None,
    exclude: Chosen | None = None,
    warm_start: bool = True,
    **layer_options: Any,
) -> nn.Module:
    """Replace the convolutions of a network by dynamic ones, in place.

    Replaced are ``nn.Conv1d/2d/3d`` and ``nn.ConvTranspose1d/2d/3d``. By default the network's first convolution (the
    stem; first in the order of its modules) stays as it is, and so do the 1x1 convolutions on shortcuts, which have
    "downsample", "shortcut", "skip" or "proj" as a part of their name, as in "layer2.0.downsample.0". `include`
    replaces this choice by another one; ``include="*"`` takes all. A model that is a convolution itself is replaced.

    A new layer keeps geometry, bias, dtype, device, training mode, hooks and further attributes of its convolution;
    kernels and bias stay frozen where they were, and one convolution in several places becomes one layer. Some are left
    as they are, and :func:`odconv.conversion_report` says why: subclasses with a forward of their own, weights that are
    computed (weight norm, spectral norm, pruning) or belong to several layers, and layers that are dynamic already, so
    that converting twice changes nothing. Make optimizers afterwards: the new layers have new parameters.

    With `warm_start` the network computes what it did before, up to rounding, and learns from there: the heads of the
    attentions are zero, ODConv's gates have gain 2 and so are 1, and the n kernels lie around the trained one, which
    is their mixture, by shares times sqrt(n). So that the new attentions do not answer to every step of training at
    once, ODConv's temperature is 5, and CondConv, which has none, has layer norm of a small weight before its router.
    Factors and temperature travel beside the weights, in PyTorch's state dicts and in what :mod:`odconv.checkpoints`
    writes; load others into a network that was converted in the same way, and CondConv's into one with
    ``norm="layer"``.

    With "kernelwarehouse" the layers share the cells of a warehouse, which becomes the network's first module,
    `warehouse_manager`; the options are those of
    :func:`~odconv.conversion.warehouse.convert_to_warehouse`: `budget`, `stages`, `reduction`, `norm` and `init`. With
    `warm_start` the blend is 1, and the network computes exactly what it did; see :func:`odconv.set_blend`.

    Args:
        model: any network.
        to: "odconv", "condconv" or "dyconv", which have a layer for every convolution; or a dynamic layer's class,
            which replaces those of its own dimension; or "kernelwarehouse", see below.
        include: which convolutions to replace, by name: a glob such as "layer4.*", several of them, or a function of
            name and module. Default: all but stem and shortcuts.
        exclude: which of these to leave, likewise. Default none.
        warm_start: start from the trained weights, as above. False for freshly drawn layers, with the options with
            which these learn best (:data:`odconv.layers.starts.SETTLED`) where `to` is a word: layer norm in the
            attention, in ODConv gain 2, in ODConv and DyConv shares times sqrt(n). What you choose goes before, and
            ``init="published"`` takes none of them but the gain of a warm start.
        **layer_options: options of the layers: `kernel_num`, `reduction`, `attentions`, `norm`, `init` and so on.

    Returns:
        The model, or its replacement where the model is a convolution itself.

    Raises:
        ValueError: the network has no convolution, or none that can be replaced; a glob matches none of them (the
            nearest names are listed); a convolution is not initialised yet; the network is scripted, quantised or
            wrapped for distributed training; an option is out of range. The network is left as it was.
        TypeError: an argument of another type, or an option that the layers do not have.
    """
    if to == "kernelwarehouse":
        from odconv.conversion.warehouse import convert_to_warehouse  # which is built on what follows

        check_known(layer_options, WAREHOUSE_OPTIONS, to)
        return convert_to_warehouse(model, include=include, exclude=exclude, warm_start=warm_start, **layer_options)
    if isinstance(attentions := layer_options.get("attentions"), Iterable) and not isinstance(attentions, str):
        layer_options["attentions"] = tuple(attentions)  # which every layer reads
    if not warm_start and isinstance(to, str) and layer_options.get("init") != "published":
        layer_options = SETTLED.get(to, {}) | layer_options
    decisions = decide(model, to, include, exclude, layer_options)
    made: dict[nn.Module, DynamicConv] = {
        decision.module: replacement(decision.module, decision.layer, warm_start, layer_options)
        for decision in decisions
        if decision.layer is not None
    }
    if not made and not any(isinstance(decision.module, PerSampleConv) for decision in decisions):
        left = [f"{decision.names[0] or 'it'}: {decision.reason}" for decision in decisions]
        hint = "" if include is not None or not left else '; include="*" takes all that can be'
        raise ValueError(f"no convolution of the {type(model).__name__} is replaced; {first_few(left, '; ')}{hint}")
    for conv, layer in made.items():
        hand_over(conv, layer)
    replace_parts(model, made)
    return made.get(model, model)


def decide(
    model: nn.Module,
    to: str | type[DynamicConv],
    include: Chosen | None,
    exclude: Chosen | None,
    layer_options: dict[str, Any],
) -> list[Decision]:
    """Return what :func:`convert` does with each convolution, in the order of modules; raise the same."""
    family = find_family(to)
    check_options(family[0], layer_options)
    found = find_convolutions(model)
    names = [name for places in found.values() for name in places]
    included = None if include is None else matcher("include", include, names)
    excluded = matcher("exclude", () if exclude is None else exclude, names)
    stem = next(iter(found))
    tied = tied_parameters(model)
    decisions = []
    for module, places in found.items():
        layer, reason = None, ""
        if isinstance(module, PerSampleConv):
            reason = "dynamic already"
        elif included is not None and not any(included(name, module) for name in places):
            reason = "not included"
        elif any(excluded(name, module) for name in places):
            reason = "excluded"
        elif included is None and module is stem and module is not model:
            reason = "the stem"
        elif included is None and is_shortcut(module, places):
            reason = "a shortcut"
        elif isinstance(module.weight, UninitializedParameter):
            raise ValueError(
                f"{places[0]} is a {type(module).__name__} not initialised yet: run the network once first"
            )
        elif not (reason := obstacle(module, tied)):
            kind = (len(module.kernel_size), module.transposed)
            layer = next((new for new in family if (new.dims, new.transposed) == kind), None)
            reason = "" if layer else f"{family[0].__name__} does not replace a {type(module).__name__}"
        decisions.append(Decision(places, module, layer, reason))
    return decisions


def find_family(to: str | type[DynamicConv]) -> Sequence[type[Any]]:
    """Return the layers that `to` stands for."""
    if to == "kernelwarehouse":
        return WAREHOUSE
    if isinstance(to, type) and issubclass(to, DynamicConv) and hasattr(to, "dims"):
        return [to]
    if not isinstance(to, str) or to not in FAMILIES:
        raise ValueError(
            f"to must be one of {sorted([*FAMILIES, 'kernelwarehouse'])} or a dynamic layer's class, got {to!r}"
        )
    return FAMILIES[to]


def check_options(layer: type[nn.Module], options: Iterable[str]) -> None:
    """Raise a TypeError for an option that a layer does not have."""
    check_known(options, options_of(layer), layer.__name__.removesuffix("1d"))  # the first of a method's family


def check_known(options: Iterable[str], known: Sequence[str], title: str) -> None:
    """Raise a TypeError for an option that is not among those known of something."""
    for option in options:
        if option not in known:
            hint = suggest(option, known, f"; it has {', '.join(known)}")
            raise TypeError(f"{option!r} is no option of {title}{hint}")


def options_of(layer: type[nn.Module]) -> list[str]:
    """Return the keyword arguments of a layer that a convolution does not have."""
    parameters = inspect.signature(layer).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")]


def find_convolutions(model: nn.Module) -> dict[Any, list[str]]:
    """All convolutions and dynamic layers with their names, or an error where the network cannot be converted."""
    check_module(model)
    found: dict[nn.Module, list[str]] = {}
    for name, module in outside_dynamic(model):
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the model'} is scripted or traced ({kind}): convert the network before that")
        if type(module).__module__.startswith("torch.ao.nn."):
            raise ValueError(f"{name or 'the model'} is quantised ({kind}): convert the network before that")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{name or 'the model'} is wrapped for distributed training: convert the network before that"
            )
        if isinstance(module, (*CONVOLUTIONS, PerSampleConv)):
            found.setdefault(module, []).append(name)
    if not found:
        raise ValueError(f"the {type(model).__name__} has no convolution (nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d)")
    return found


def outside_dynamic(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name, under each of their names, but not those inside dynamic layers."""
    yield name, module
    if not isinstance(module, PerSampleConv):
        for key, child in module._modules.items():
            if child is not None:
                yield from outside_dynamic(child, f"{name}.{key}" if name else key)


def matcher(argument: str, chosen: Chosen, names: list[str]) -> Callable[[str, nn.Module], bool]:
    """`chosen` as a function of name and module; a ValueError for a glob that matches none of the names."""
    if callable(chosen):
        return chosen
    globs = [chosen] if isinstance(chosen, str) else list(chosen) if isinstance(chosen, Iterable) else [chosen]
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{argument} must be a glob, several of them or a function, got {chosen!r}")
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            hint = suggest(glob, names, f"; the names are {first_few(names)}", most=3, cutoff=0.4)
            raise ValueError(f"{argument}: no convolution has a name that matches {glob!r}{hint}")
    return lambda name, module: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def is_shortcut(conv: Convolution, names: list[str]) -> bool:
    """Return whether a convolution is 1x1 and one of its names says that it is on a shortcut."""
    return set(conv.kernel_size) == {1} and any(SHORTCUTS & {*name.split(".")} for name in names)


def tied_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that several modules have as their own."""
    own = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    return {parameter for parameter, count in Counter(own).items() if count > 1}


def obstacle(conv: Convolution, tied: set[nn.Parameter]) -> str:
    """Why a convolution cannot be replaced; empty where it can."""
    plain = next(kind for kind in CONVOLUTIONS if isinstance(conv, kind))
    steps = ("forward", "_conv_forward", "_output_padding")
    if any(getattr(type(conv), step, None) is not getattr(plain, step, None) or step in vars(conv) for step in steps):
        return f"{type(conv).__name__} has a forward of its own"
    if not {"weight", "bias"} <= conv._parameters.keys():
        return "its weight is computed: weight norm, spectral norm, pruning or another parametrization"
    if len(conv._parameters) > 2 or conv._buffers or conv._modules:
        return "it holds more than a weight and a bias"
    if tied & {*conv.parameters()}:
        return "its weight or bias belongs to another layer too"
    if type(conv.weight) is not nn.Parameter or not conv.weight.is_floating_point():
        return f"its weight is a {type(conv.weight).__name__} of {conv.weight.dtype}"
    return ""


def replacement(conv: Convolution, layer: type[DynamicConv], warm_start: bool, options: dict[str, Any]) -> DynamicConv:
    """Return the layer that takes a convolution's place, trained as far, and frozen where it is."""
    if warm_start:
        options = warm_options(layer, options)
    new = dynamic_like(conv, layer, options, conv.weight.device)
    if warm_start:
        start_from(new, conv)
    new.weight.requires_grad_(conv.weight.requires_grad)
    for bias in (new.bias, new.kernel_bias):
        if bias is not None and conv.bias is not None:
            bias.requires_grad_(conv.bias.requires_grad)
    return new


def warm_options(layer: type[DynamicConv], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a layer that begins at a trained kernel: the best ones, but for what was chosen."""
    known = options_of(layer)
    best = dict(WARM_SHARES)
    if options.get("init") == "published":
        best = {"gain": WARM_GATES["gain"]}
    elif "gain" in known and options.get("attentions") != ("kernel",):
        best |= WARM_GATES
    elif issubclass(layer, tuple(FAMILIES["condconv"])):
        best |= WARM_ROUTERS
    return {name: value for name, value in best.items() if name in known} | options


def dynamic_like(
    conv: Convolution, layer: type[DynamicConv], options: dict[str, Any], device: torch.device | str
) -> DynamicConv:
    """Return a freshly drawn dynamic layer with the geometry, bias, dtype and mode of a convolution."""
    if layer.transposed:
        options = {"output_padding": conv.output_padding} | options
    return layer(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=device,
        dtype=conv.weight.dtype,
        **options,
    ).train(conv.training)


@torch.no_grad()
def start_from(layer: DynamicConv, conv: Convolution) -> None:
    """Let a freshly drawn layer compute what a convolution does.

    The kernels are divided by what the gates are, gain/2, and by what their shares sum to. What they deviate by from
    the trained kernel is drawn at random and sums to zero: kernels that are alike would stay alike, and the kernel head
    get no gradient.
    """
    attention, n = layer.attention, layer.kernel_num
    shares = draw_warm(attention, n)
    gates = (attention.gain / 2) ** len(attention.heads.keys() - {"kernel"})
    trained = conv.weight.to(torch.promote_types(conv.weight.dtype, torch.float32))
    kernels = trained[None]
    if n > 1:
        drawn = layer.weight.to(trained.dtype)
        size, drawn_size = (values.square().mean().sqrt() for values in (trained, drawn))
        scale = SPREAD * torch.where(size > 0, size / drawn_size, 1.0)  # kernels of zeros have no size of their own
        kernels = trained + scale * (drawn - drawn.mean(0))
    layer.weight.copy_(kernels / (shares * gates))
    for bias, divisor in ((layer.bias, 1.0), (layer.kernel_bias, shares)):
        if bias is not None and conv.bias is not None:
            bias.copy_(conv.bias / divisor)


def replace_parts(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of parts of a network, wherever they are in it; the network itself stays."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])


def hand_over(conv: nn.Module, layer: nn.Module) -> None:
    """Give a layer the hooks of the convolution that it replaces, and whatever else was attached to it."""
    for key in HOOKS:
        vars(layer)[key] = vars(conv)[key]  # the same dictionaries, so that handles still remove their hooks
    hooks: Any = layer._load_state_dict_pre_hooks
    for hook in hooks.values():
        if hook.with_module:  # refers to the convolution, weakly
            hook.module = weakref.ref(layer)
    for key in vars(conv).keys() - vars(layer).keys() - OWN:
        vars(layer)[key] = vars(conv)[key]
