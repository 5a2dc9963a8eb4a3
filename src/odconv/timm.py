"""The zoo in timm: after ``import odconv.timm``, ``timm.create_model("od_resnet50", kernel_num=4)`` builds one of ours.

Only dynamic networks are registered; under the static names, timm has networks of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from odconv.models import BACKBONES, METHODS, create_model, split_name


class Layout(NamedTuple):
    """What timm wants to know of an architecture.

    Attributes:
        head: name of the last layer.
        stages: names of the modules whose outputs are features, with strides 2, 4, 8, 16 and 32.
        flatten: whether these modules are inside another one.
    """

    head: str
    stages: tuple[str, ...]
    flatten: bool


RESNET = Layout("fc", ("relu", "layer1", "layer2", "layer3", "layer4"), flatten=False)
MOBILENETV2 = Layout("classifier.1", tuple(f"features.{index}" for index in (1, 3, 6, 13, 17)), flatten=True)


class Classifier(nn.Module):
    """A network of the zoo with the methods and attributes that timm's networks have; its keys are as published.

    Args:
        name: a dynamic network of :func:`odconv.list_models`.
        num_classes: outputs of the classifier; 0 for none, which leaves the pooled features.
        in_chans: channels of the images.
        drop_rate: share dropped before the classifier.
        global_pool: timm's name of a pooling; "" for none, which leaves the maps and needs num_classes 0.
        kernel_num: as for :func:`odconv.create_model`.
        reduction: as for :func:`odconv.create_model`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        kernel_num: int | None = None,
        reduction: float | None = None,
    ) -> None:
        super().__init__()
        for part, module in create_model(name, kernel_num=kernel_num, reduction=reduction).named_children():
            if part != "avgpool":
                self.add_module(part, module)
        layout = layout_of(name)
        self.body = [part for part in self._modules if part != layout.head.split(".")[0]]
        self.head = layout.head
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        stem: Any = self.get_submodule(stem_of(name))
        if in_chans != stem.in_channels:
            stem.in_channels = in_chans
            stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, in_chans, *stem.kernel_size))
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        head: Any = self.get_classifier()
        self.num_features = self.head_hidden_size = head.in_features
        self.feature_info = [
            {"num_chs": out_channels(self.get_submodule(stage), stem), "reduction": 2**power, "module": stage}
            for power, stage in enumerate(layout.stages, 1)
        ]
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.get_submodule(self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a freshly drawn one.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: another pooling before it; None to keep the one there is.

        Raises:
            ValueError: a classifier without pooling.
        """
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes and self.global_pool.is_identity():
            raise ValueError(f"num_classes must be 0 without global_pool, got {num_classes}")
        self.num_classes = num_classes
        layer: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            width = self.num_features * self.global_pool.feat_mult()
            layer = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.set_submodule(self.head, layer)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last maps of images (B, in_chans, H, W)."""
        for part in self.body:
            x = self.get_submodule(part)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits of the last maps, or with `pre_logits` what the classifier takes."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def layout_of(name: str) -> Layout:
    """The architecture of a network of the zoo."""
    return RESNET if split_name(name)[1].startswith("resnet") else MOBILENETV2


def stem_of(name: str) -> str:
    """The name of its first convolution."""
    return BACKBONES[split_name(name)[1]].stem


def out_channels(stage: nn.Module, stem: nn.Conv2d) -> int:
    """The channels that a stage puts out: those of its last norm; the ReLU after the stem has none."""
    norms = [module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)]
    return norms[-1].num_features if norms else stem.out_channels


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that timm calls to build a network."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        features = {"flatten_sequential": layout_of(name).flatten}
        return build_model_with_cfg(partial(Classifier, name), name, pretrained, feature_cfg=features, **options)

    build.__name__ = name
    return build


NAMES = [f"{method}_{backbone}" for method in METHODS for backbone in BACKBONES]
default_cfgs = generate_default_cfgs({  # timm looks here
    name: {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": stem_of(name),
        "classifier": layout_of(name).head,
    }
    for name in NAMES
})  # fmt: skip
globals().update({name: register_model(builder(name)) for name in NAMES})
