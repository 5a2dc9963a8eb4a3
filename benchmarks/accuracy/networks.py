"""The networks that are compared: a static one of the zoo, and what each method makes of it."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

from torch import nn
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import SqueezeExcitation

import odconv
from odconv.layers import starts

Start: TypeAlias = Literal["settled", "calm", "calm heads", "published"]
STARTS: dict[Start, dict[str, Any]] = {
    "settled": starts.SETTLED["odconv"],
    "calm": {},
    "calm heads": {},  # at the full pace
    "published": {"init": "published"},
}
"""How dynamic layers begin, and the options of ODConv that this means."""

ATTENTIONS = ("channel", "filter", "spatial", "kernel")


@dataclass(frozen=True)
class Method:
    """A method: its name in the report, the prefix of its networks in the zoo, and options of its layers."""

    title: str
    prefix: str = ""
    kernel_num: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def odconv_4x(title: str, **options: Any) -> Method:
    return Method(f"4x, {title}", "od_", 4, options)


METHODS = {
    "static": Method("static"),
    "se": Method("SE"),
    "condconv": Method("CondConv 8x", "cond_", 8),
    "dyconv": Method("DyConv 4x", "dy_", 4),
    "odconv_1x": Method("ODConv 1x", "od_", 1),
    "odconv_4x": Method("ODConv 4x", "od_", 4),
    "kw_1x": Method("KernelWarehouse 1x", "kw_", options={"budget": 1}),
    "kw_4x": Method("KernelWarehouse 4x", "kw_", options={"budget": 4}),
}
ABLATIONS = {
    # without the kernel attention there is one kernel: ODConv 1x is 4x without it
    **{
        f"only_{kind}": Method(f"{kind} attention alone, n = 1", "od_", 1, {"attentions": (kind,)})
        for kind in ATTENTIONS[:-1]
    },
    "only_kernel": odconv_4x("kernel attention alone", attentions=("kernel",)),
    **{
        f"no_{kind}": odconv_4x(f"without {kind}", attentions=tuple(other for other in ATTENTIONS if other != kind))
        for kind in ATTENTIONS[:-1]
    },
    "odconv_2x": Method("ODConv 2x", "od_", 2),
    "odconv_8x": Method("ODConv 8x", "od_", 8),
    "reduction_4": odconv_4x("reduction 1/4", reduction=1 / 4),
    "reduction_8": odconv_4x("reduction 1/8", reduction=1 / 8),
    "reduction_32": odconv_4x("reduction 1/32", reduction=1 / 32),
    "norm_group": odconv_4x("group norm in the attention", norm="group"),
    "norm_layer": odconv_4x("layer norm in the attention", norm="layer"),
    "norm_none": odconv_4x("no norm in the attention", norm="none"),
    "zero_heads": odconv_4x("begun as the static network", warm_start=True),
}


QUARTER = "resnet18_025"


class QuarterResNet18(ResNet):
    """ResNet-18 with a quarter of the channels, for which torchvision has no argument."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(128, num_classes)

    def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 16
        return super()._make_layer(block, planes // 4, *rest, **options)


def build(
    network: str, method: str, stem: str, classes: int, dropout: float = 0.0, start: Start = "settled"
) -> nn.Module:
    """Build a network of the zoo, or resnet18_025, with a method, freshly drawn."""
    if network == QUARTER:
        with patch.object(models, "resnet18", QuarterResNet18):
            return build("resnet18", method, stem, classes, dropout, start)
    chosen, options = (METHODS | ABLATIONS)[method], layer_options(method, start)
    create = {"num_classes": classes, "dropout": dropout, "stem": stem}
    if method == "se":
        return add_squeeze_excitation(odconv.create_model(network, **create))
    if options.pop("warm_start", False):
        model = odconv.create_model(network, **create)
        return odconv.convert(model, kernel_num=chosen.kernel_num, **options)
    paces = dict.fromkeys(starts.PACE, 1.0) if start == "calm heads" else {}
    with patch.dict(starts.PACE, paces):
        return odconv.create_model(chosen.prefix + network, kernel_num=chosen.kernel_num, **create, **options)


def layer_options(method: str, start: Start) -> dict[str, Any]:
    """Return the options of the dynamic layers that a method and a start mean."""
    chosen, begun = (METHODS | ABLATIONS)[method], STARTS[start]
    if start == "settled":
        begun = starts.SETTLED.get({"od_": "odconv", "dy_": "dyconv", "cond_": "condconv"}.get(chosen.prefix, ""), {})
    return (begun if chosen.prefix else {}) | chosen.options


def described(network: str, method: str, start: Start) -> tuple[str, dict[str, Any]]:
    """Return the name of a network in the zoo, resnet18 for resnet18_025, and what options its layers have besides."""
    network = "resnet18" if network == QUARTER else network
    prefix, options = (METHODS | ABLATIONS)[method].prefix, layer_options(method, start)
    options.pop("warm_start", None)  # how it begins, and not what it is
    settled = starts.SETTLED["odconv"]
    if prefix == "od_" and settled.items() <= options.items():
        return f"odl_{network}", {name: value for name, value in options.items() if name not in settled}
    return prefix + network, options


def add_squeeze_excitation(model: nn.Module, reduction: int = 16) -> nn.Module:
    """Add torchvision's squeeze-and-excitation to every block, in place.

    In a residual block it stands before the addition (Hu, Shen, Sun, CVPR 2018); in an inverted one behind the
    depth-wise convolution (MobileNetV3: Howard et al., ICCV 2019).
    """
    for block in [*model.modules()]:
        if isinstance(block, BasicBlock):
            channels = block.bn2.num_features
            block.bn2 = nn.Sequential(block.bn2, SqueezeExcitation(channels, channels // reduction))
        elif isinstance(block, InvertedResidual):
            depthwise = block.conv[-3]  # convolution, norm, activation; then the projection and its norm
            channels = depthwise[0].out_channels
            block.conv[-3] = nn.Sequential(depthwise, SqueezeExcitation(channels, max(1, channels // reduction)))
    return model
