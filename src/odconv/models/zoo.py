"""The names of the zoo's networks, which can be listed without PyTorch."""

import fnmatch
from typing import Any, NamedTuple


class Backbone(NamedTuple):
    """A static network: torchvision's builder, its arguments, and the name of its stem."""

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
METHODS = ("od", "odl", "dy", "cond")
"""Prefixes of the dynamic networks; :data:`odconv.models.build.METHODS` says what they mean."""
WAREHOUSE = "kw"
"""Prefix of the networks of KernelWarehouse, whose layers share their kernels."""

NAMES = [*BACKBONES, *(f"{method}_{backbone}" for method in (*METHODS, WAREHOUSE) for backbone in BACKBONES)]


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that :func:`odconv.create_model` knows.

    Args:
        pattern: a glob, "od_*" for example. Default all.
    """
    return fnmatch.filter(NAMES, pattern)
