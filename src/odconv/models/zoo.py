"""The names of the zoo's networks, which can be listed without PyTorch."""

import fnmatch
from typing import Any, NamedTuple


class Backbone(NamedTuple):
    """A static network: its builder, torchvision's or `convnext`, its arguments, and the name of its stem."""

    builder: str
    arguments: dict[str, Any]
    stem: str


BACKBONES = {
    **{f"resnet{depth}": Backbone(f"resnet{depth}", {}, "conv1") for depth in (18, 34, 50, 101, 152)},
    **{
        f"mobilenetv2_{percent:03d}": Backbone("mobilenet_v2", {"width_mult": percent / 100}, "features.0.0")
        for percent in (50, 75, 100)
    },
}
CONVNEXTS = {
    "convnext_tiny": Backbone(
        "convnext", {"depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)}, "downsample_layers.0.0"
    ),
}
"""Networks that are there static and of KernelWarehouse alone."""
PREFIXES = ("od", "odl", "dy", "cond")
"""Prefixes of the dynamic networks; :data:`odconv.models.build.METHODS` says what they mean."""
WAREHOUSE = "kw"
"""Prefix of the networks of KernelWarehouse, whose layers share their kernels."""

NAMES = [
    *BACKBONES,
    *CONVNEXTS,
    *(f"{method}_{backbone}" for method in (*PREFIXES, WAREHOUSE) for backbone in BACKBONES),
    *(f"{WAREHOUSE}_{backbone}" for backbone in CONVNEXTS),
]


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that :func:`odconv.create_model` knows.

    Args:
        pattern: a glob, "od_*" for example. Default all.
    """
    return fnmatch.filter(NAMES, pattern)
