"""The zoo: torchvision's networks with their convolutions replaced, as rows of data."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from odconv.checkpoints import Weights, find_checkpoint, load_all_but, load_checkpoint, size_limit
from odconv.checkpoints.keys import norm_of
from odconv.conversion.convert import check_known, check_options, convert, warm_options
from odconv.layers import CondConv2d, DyConv2d, DynamicConv, ODConv2d
from odconv.layers.starts import SETTLED
from odconv.models.warehouse import OPTIONS, make_warehouse
from odconv.models.zoo import BACKBONES, CONVNEXTS, NAMES, WAREHOUSE, Backbone
from odconv.system.packages import needed_by
from odconv.system.text import suggest

STATIC = BACKBONES | CONVNEXTS


class Method(NamedTuple):
    """A dynamic method: its layer, the options of its networks, and whether shortcut convolutions are replaced too."""

    layer: type[DynamicConv]
    options: dict[str, Any]
    shortcuts: bool


METHODS = {
    "od": Method(ODConv2d, {"kernel_num": 1}, shortcuts=False),
    "odl": Method(ODConv2d, {"kernel_num": 1, **SETTLED["odconv"]}, shortcuts=False),
    "dy": Method(DyConv2d, {}, shortcuts=True),
    "cond": Method(CondConv2d, {}, shortcuts=False),
}


def create_model(
    name: str,
    *,
    kernel_num: int | None = None,
    reduction: float | None = None,
    num_classes: int = 1000,
    dropout: float = 0.0,
    weights: Weights | None = None,
    stem: str = "standard",
    warm_start: bool = False,
    new_classifier: bool = False,
    **layer_options: Any,
) -> nn.Module:
    """Build a network of the zoo.

    Args:
        name: one of :func:`odconv.list_models`: a ResNet or MobileNetV2, static or with a method's prefix: od_, dy_ and
            cond_ as published; odl_ for ODConv with layer norm in the attention, gates of 1 and shares times sqrt(n),
            which learns best from nothing; kw_ for KernelWarehouse, as published. ConvNeXt-Tiny has kw_ alone.
        kernel_num: number of kernels n of a dynamic network. Default 1 for od_ and odl_, 4 for dy_, 8 for cond_.
        reduction: width of the attention's hidden layer as a share of the channels. Default 1/16 for od_ and odl_, 1/4
            for dy_, 1/16 for kw_ (1/32 for MobileNetV2 at budgets below 1).
        num_classes: outputs of the classifier, at least 1. Default 1000.
        dropout: share dropped before the classifier, at least 0 and below 1. Default 0.
        weights: a checkpoint to load: a path, or the name of a folder of `odconv release` in the folder weights, or
            owner/name or hf://owner/name/file for the Hugging Face Hub, or what
            :func:`odconv.checkpoints.read_checkpoint` read of it; see :func:`odconv.load_checkpoint`.
        stem: "standard", or "small" for images of about 32 pixels: a stem that keeps their size.
        warm_start: `weights` are those of the static network of the same name; the dynamic one starts from them, see
            :func:`odconv.convert`.
        new_classifier: leave the last layer, which tells the classes, out of `weights`: for other classes.
        **layer_options: further options of the dynamic layers: `init`, `norm`, `gain`, `kernel_gain` and so on; of kw_
            `budget`, the numbers in the warehouse for each one of the static kernels, 1 by default; published are 1/4,
            1/2, 1, 2 and 4.

    Returns:
        The network, in training mode; the state dict of od_ has the keys and shapes of the published checkpoints.

    Raises:
        ValueError: an unknown name (the nearest are listed), an option that the network does not take or that is out
            of range, or weights that do not fit.
        TypeError: an option that the layers do not have.
        ImportError: torchvision is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}{suggest(name, NAMES, '; see odconv.list_models()', most=3)}")
    if stem not in ("standard", "small"):
        raise ValueError(f"stem must be 'standard' or 'small', got {stem!r}")
    if stem == "small" and split_name(name)[1] in CONVNEXTS:
        raise ValueError(f"stem must be 'standard' for {name}, whose stem makes patches, got 'small'")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be an int of at least 1, got {num_classes!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
    static = STATIC[split_name(name)[1]]
    model = build_static(static, num_classes, dropout)
    if stem == "small":
        make_stem_small(model, static)
    if warm_start and weights is None:
        raise ValueError("warm_start needs the weights of the static network, got weights=None")
    if new_classifier and weights is None:
        raise ValueError("new_classifier needs weights, those of a network for other classes, got weights=None")
    load = load_all_but_classifier if new_classifier else load_checkpoint
    if weights is not None and warm_start:
        load(model, find_checkpoint(weights))
    make_dynamic(model, name, kernel_num, reduction, warm_start, **layer_options)
    if weights is not None and not warm_start:
        load(model, find_checkpoint(weights))
    return model


def load_all_but_classifier(network: nn.Module, weights: Weights) -> None:
    """Load the weights of a classifier for other classes, whose last layer is left out.

    The file's classifier, of any number of classes, is ignored; it may be absent. All else must fit.

    Args:
        network: a network with one linear layer, its classifier, which stays as it is.
        weights: whatever :func:`create_model` takes: a path, or a name on the Hugging Face Hub.

    Raises:
        FileNotFoundError, ValueError, OSError: as :func:`odconv.load_checkpoint`, naming what does not fit.
        ValueError: the network has no linear layer, or several.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if len(linear) != 1:
        raise ValueError(f"the network must have one linear layer, its classifier, got {len(linear)}")
    load_all_but(network, find_checkpoint(weights), re.compile(rf"{re.escape(linear[0])}\."))


class Undrawn(TorchFunctionMode):
    """Leaves parameters undrawn."""

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        """Call a function, unless it is one that draws."""
        options = options or {}
        if function in (Tensor.normal_, Tensor.uniform_):
            return arguments[0]
        if "tensor" in options and getattr(function, "__module__", "") == "torch.nn.init":
            return options["tensor"]
        return function(*arguments, **options)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Make networks without numbers within the block: on the meta device, where to draw them takes most of the time."""
    with torch.device("meta"), Undrawn():
        yield


def check_described(path: Path, name: str, **options: Any) -> None:
    """See that the network that a file describes fits into the file, before memory is asked for.

    Args:
        path: the file with its weights.
        name: as :func:`create_model`.
        **options: the same.

    Raises:
        ValueError: it has many times as many numbers as the file has bytes, or as :func:`create_model`.
    """
    try:
        with shapes_alone():
            network = create_model(name, **options)
    except (RuntimeError, OverflowError) as error:  # more than can be counted
        raise ValueError(f"{path} cannot hold the network that goes with it: {error}") from error
    numbers = sum(tensor.numel() for tensor in network.state_dict().values())
    if numbers > size_limit(path):
        raise ValueError(f"{path} of {path.stat().st_size:,} bytes cannot hold the {numbers:,} numbers of its {name}")


def make_dynamic(
    model: nn.Module,
    name: str,
    kernel_num: int | None = None,
    reduction: float | None = None,
    warm_start: bool = False,
    **layer_options: Any,
) -> None:
    """Replace the convolutions of a static network of the zoo, in place, to make that of a name; see create_model."""
    method_name, backbone = split_name(name)
    static = STATIC[backbone]
    if method_name == WAREHOUSE:
        if kernel_num is not None:
            raise ValueError(f"kernel_num must be None for {name}, whose cells `budget` counts, got {kernel_num}")
        check_layer_options(name, layer_options)
        make_warehouse(model, static, reduction=reduction, warm_start=warm_start, **layer_options)
    elif method_name is not None:
        method = METHODS[method_name]
        given = {"kernel_num": kernel_num, "reduction": reduction}
        options = method.options | {option: value for option, value in given.items() if value is not None}
        options |= layer_options  # convert checks them
        if reduction is not None and method.layer is CondConv2d:
            raise ValueError(f"reduction must be None for {name}, whose attention has no hidden layer, got {reduction}")

        def chosen(path: str, conv: nn.Module) -> bool:
            return path != static.stem and (method.shortcuts or ".downsample." not in path)

        convert(model, method.layer, include=chosen, warm_start=warm_start, **options)
    elif kernel_num not in (None, 1) or reduction is not None:
        hint = f"; od_{name} is dynamic" if f"od_{name}" in NAMES else ""
        raise ValueError(
            f"{name} is static: kernel_num and reduction must be None, got {kernel_num} and {reduction}{hint}"
        )
    elif warm_start:
        raise ValueError(f"{name} is static: warm_start is for dynamic networks")
    else:
        check_layer_options(name, layer_options)


def with_warm_norm(name: str, layer_options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a network's dynamic layers with the norm that a warm start puts into their attentions.

    The norm has keys of its own: who builds the network again without a warm start, to load its weights, must name it.
    """
    method = METHODS.get(split_name(name)[0] or "")
    chosen = {} if method is None else warm_options(method.layer, layer_options)
    return {key: chosen[key] for key in chosen if key == "norm"} | layer_options


def norm_told(name: str, state: Iterable[str]) -> dict[str, Any]:
    """Return as an option the norm that the keys of a network's file tell: CondConv has layer norm or none."""
    routed = split_name(name)[0] == "cond" and norm_of(state) != "no norm"
    return {"norm": "layer"} if routed else {}


def check_layer_options(name: str, options: dict[str, Any]) -> None:
    """Raise a TypeError for an option that the dynamic layers of a network of the zoo do not have."""
    method, _ = split_name(name)
    if method is None and options:
        raise TypeError(f"{name} is static and has no options of dynamic layers: {', '.join(options)}")
    if method == WAREHOUSE:
        check_known(options, OPTIONS, name)
    elif method is not None:
        check_options(METHODS[method].layer, options)


def split_name(name: str) -> tuple[str | None, str]:
    """Return the method and the static network in a model's name: "od_resnet18" -> ("od", "resnet18")."""
    method, _, backbone = name.partition("_")
    return (method, backbone) if method in METHODS or method == WAREHOUSE else (None, name)


def build_static(backbone: Backbone, num_classes: int, dropout: float) -> Any:
    """Return a static network, torchvision's with the published classifier: dropout, and normal(0, 0.01) weights."""
    with needed_by("odconv.create_model", "'odconv[models]'"):
        from torchvision import models
    arguments = backbone.arguments | {"num_classes": num_classes}
    if backbone.builder == "convnext":
        from odconv.models.convnext import ConvNeXt  # of torchvision's parts

        return ConvNeXt(dropout=dropout, **arguments)
    if backbone.builder == "mobilenet_v2":
        return models.mobilenet_v2(dropout=dropout, **arguments)
    model = getattr(models, backbone.builder)(**arguments)
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    if dropout > 0:  # beside the pooling, so that the keys stay as they are
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(dropout))
    return model


def make_stem_small(model: Any, backbone: Backbone) -> None:
    """Let the stem keep the size of its input: stride 1, and for a ResNet 3x3 without the max-pooling."""
    if backbone.builder == "mobilenet_v2":
        model.features[0][0].stride = (1, 1)
        return
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
