"""Dynamic convolution in YOLO networks: blocks with the signature of YOLO's ``Conv``, and ultralytics' own networks.

ultralytics is imported only by the functions that work on its networks.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from odconv.convert import Chosen, dynamic_like, find_convolutions, matcher
from odconv.convert import convert as convert_convolutions
from odconv.fusion import BatchNorm, fold_batch_norm
from odconv.layers import CondConv2d, DyConv2d, DynamicConv, ODConv2d

Size = int | list[int] | tuple[int, int]


def autopad(k: Size, p: Size | None = None, d: int = 1) -> Size:
    """The padding p, or where it is None half of what the kernel spans, which keeps the map at stride 1 for odd k.

    Args:
        k: size of the kernel, an int or two.
        p: padding. Default None.
        d: dilation. Default 1.

    Returns:
        The padding: p, or as many ints as k has.
    """
    if p is not None:
        return p
    return (d * (k - 1) + 1) // 2 if isinstance(k, int) else [(d * (size - 1) + 1) // 2 for size in k]


class DynamicBlock(nn.Module):
    """Dynamic convolution, batch norm and activation, with the signature of YOLO's ``Conv``.

    The submodules are named as there: `conv`, `bn` and `act`. The block itself is for subclasses that say which `layer`
    it has, and it is what :func:`convert` makes of YOLO's own blocks.

    Args:
        c1: channels of the input, C.
        c2: channels of the output, O.
        k: size of the kernel, an int or two. Default 1.
        s: stride. Default 1.
        p: padding. Default None: see :func:`autopad`.
        g: groups. Default 1.
        d: dilation. Default 1.
        act: True for SiLU, a module for another activation, anything else for none. Default True.
        **options: those of the layer: `kernel_num`, `reduction`, `attentions` and so on.

    Input is (B, C, H, W), output (B, O, H', W').
    """

    layer: ClassVar[type[DynamicConv]]
    conv: DynamicConv
    bn: nn.Module

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 1,
        s: Size = 1,
        p: Size | None = None,
        g: int = 1,
        d: int = 1,
        act: bool | nn.Module = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.conv = self.layer(c1, c2, k, s, autopad(k, p, d), groups=g, dilation=d, **options)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each sample with its own kernel, normalise, activate."""
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> None:
        """Fold the batch norm into the convolution, in place; a block that was folded is left as it is."""
        if isinstance(self.bn, BatchNorm):
            fold_batch_norm(self.conv, self.bn)
            self.bn = nn.Identity()


class ODConv(DynamicBlock):
    """YOLO's ``Conv`` with an :class:`odconv.ODConv2d`; the arguments are those of :class:`DynamicBlock`."""

    layer = ODConv2d


class DyConv(DynamicBlock):
    """YOLO's ``Conv`` with an :class:`odconv.DyConv2d`; the arguments are those of :class:`DynamicBlock`."""

    layer = DyConv2d


class CondConv(DynamicBlock):
    """YOLO's ``Conv`` with an :class:`odconv.CondConv2d`; the arguments are those of :class:`DynamicBlock`."""

    layer = CondConv2d


BLOCKS = {block.__name__: block for block in (ODConv, DyConv, CondConv)}


def convert(
    model: nn.Module,
    to: str | type[DynamicConv] = "odconv",
    *,
    include: Chosen | None = None,
    exclude: Chosen | None = None,
    warm_start: bool = True,
    **layer_options: Any,
) -> nn.Module:
    """Convert an ultralytics network, in place, so that its training, validation, fusing and export go on working.

    As :func:`odconv.convert`, but only the convolutions in ultralytics' ``Conv`` and ``DWConv`` blocks are replaced,
    and these blocks become :class:`DynamicBlock`, which ultralytics does not fuse in a way that suits static kernels
    only. The last convolutions of a head and its fixed one (DFL) stay, and so do blocks whose branches ultralytics
    merges into one kernel (``RepConv``, ``RepVGGDW``, ``Conv2``).

    Args:
        model: a network of ultralytics, as ``YOLO("yolo11n.yaml").model``.
        to, include, exclude, warm_start, **layer_options: as in :func:`odconv.convert`; a convolution's name ends in
            ".conv", as in "model.1.conv".

    Returns:
        The model.

    Raises:
        ImportError: ultralytics is not installed.
        ValueError, TypeError: as :func:`odconv.convert`.
    """
    from ultralytics.nn.modules.block import RepVGGDW
    from ultralytics.nn.modules.conv import Conv, DWConv, RepConv

    merged = {part for module in model.modules() if isinstance(module, RepConv | RepVGGDW) for part in module.modules()}
    blocks = [module for module in model.modules() if type(module) in (Conv, DWConv) and module not in merged]
    inside = {block.conv for block in blocks} | {m for m in model.modules() if isinstance(m, DynamicConv)}
    names = [name for places in find_convolutions(model).values() for name in places]
    excluded = matcher("exclude", () if exclude is None else exclude, names)
    convert_convolutions(
        model,
        to,
        include=include,
        exclude=lambda name, conv: conv not in inside or excluded(name, conv),
        warm_start=warm_start,
        **layer_options,
    )
    for block in blocks:
        if isinstance(block.conv, DynamicConv) and hasattr(block, "bn"):
            block.__class__ = DynamicBlock  # keeps its name, hooks and what ultralytics wrote on it
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Fold the batch norm of every :class:`DynamicBlock` in a network into its convolution, in place, for inference.

    Args:
        model: any network; one without such blocks is left as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, DynamicBlock):
            module.fuse()
    return model


def register() -> None:
    """Let ultralytics find ``ODConv``, ``DyConv`` and ``CondConv`` in a network's YAML, wherever ``Conv`` may stand.

    A row has the arguments of ``Conv`` and, last, the options of the layer: ``[-1, 1, ODConv, [128, 3, 2, {kernel_num:
    4}]]``. The call lasts as long as the process; further ones change nothing.

    Raises:
        ImportError: ultralytics is not installed.
    """
    from ultralytics.nn import tasks

    if not isinstance(tasks.parse_model, YamlParser):
        tasks.parse_model = YamlParser(tasks.parse_model)


class YamlParser:
    """ultralytics' ``parse_model``, which knows its own blocks only, made to know ours.

    It counts channels, scales widths and repeats for the rows of its own ``Conv``; so it is given these, and the blocks
    that it builds are made dynamic.

    Args:
        parse_model: ultralytics' function.
    """

    def __init__(self, parse_model: Callable[..., tuple[nn.Sequential, list[int]]]) -> None:
        self.parse_model = parse_model

    def __call__(self, d: dict[str, Any], ch: int, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
        """Build the network that a YAML describes, as ``parse_model`` does."""
        d = copy.deepcopy(d)
        found: dict[int, tuple[type[DynamicBlock], dict[str, Any]]] = {}
        for index, row in enumerate(d["backbone"] + d["head"]):  # from, number, block, arguments
            if row[2] in BLOCKS:
                options = row[3].pop() if isinstance(row[3][-1], dict) else {}
                found[index] = BLOCKS[row[2]], options
                row[2] = "Conv"
        model, save = self.parse_model(d, ch, verbose)
        for index, (kind, options) in found.items():
            part: Any = model[index]
            blocks: Any = part if isinstance(part, nn.Sequential) else [part]
            for block in blocks:
                block.conv = dynamic_like(block.conv, kind.layer, options, block.conv.weight.device)
                block.__class__ = kind
            part.np = sum(parameter.numel() for parameter in part.parameters())
            part.type = f"{kind.__module__}.{kind.__name__}"
        return model, save
