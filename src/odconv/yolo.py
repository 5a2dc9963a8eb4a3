"""Dynamic convolution in YOLO networks: blocks with the signature of YOLO's ``Conv``, and ultralytics' own networks.

ultralytics is imported only by the functions that work on its networks.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from odconv.conversion.convert import (
    Chosen,
    check_known,
    check_options,
    dynamic_like,
    find_convolutions,
    matcher,
    start_from,
)
from odconv.conversion.convert import convert as convert_convolutions
from odconv.conversion.fusion import BatchNorm, fold_batch_norm
from odconv.layers import CondConv2d, DyConv2d, DynamicConv, ODConv2d
from odconv.profiling.counters import register_thop
from odconv.system.packages import needed_by
from odconv.system.text import first_few

Size = int | list[int] | tuple[int, int]


def autopad(k: Size, p: Size | None = None, d: int = 1) -> Size:
    """Return the padding p, or half of what the kernel spans: it keeps the map at stride 1 for odd k.

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
        geometry: dict[str, Any] = {"kernel_size": k, "stride": s, "padding": autopad(k, p, d), "dilation": d}
        geometry |= {"in_channels": c1, "out_channels": c2, "groups": g}
        known = [name for name in inspect.signature(self.layer).parameters if name not in geometry]
        check_known(options, known, self.layer.__name__)
        self.conv = self.layer(**geometry, **options)
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "ultralytics.nn.tasks" in sys.modules:  # which loads a checkpoint, perhaps to train it further
            register()


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
KEY = "odconv"
"""Under which the YAML of a converted network holds the conversions, each as arguments of :func:`make_dynamic`."""


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

    ultralytics trains a network that it builds anew from the YAML of yours. The conversion becomes a part of that YAML,
    and :func:`register`, which is called here, makes it again there.

    Args:
        model: a network of ultralytics, as ``YOLO("yolo11n.yaml").model``, or the ``YOLO`` itself.
        to, include, exclude, warm_start, **layer_options: as in :func:`odconv.convert`; a convolution's name ends in
            ".conv", as in "model.1.conv".

    Returns:
        The model.

    Raises:
        ImportError: ultralytics is not installed.
        ValueError, TypeError: as :func:`odconv.convert`; and `to` is "kernelwarehouse", or the network has no block of
            ultralytics that could be converted.
    """
    if to == "kernelwarehouse":
        raise ValueError(
            "to must be odconv, condconv, dyconv or a layer's class for ultralytics' networks, got 'kernelwarehouse', "
            "whose layers share their cells: ultralytics builds, fuses and transfers layers one by one"
        )
    with needed_by("odconv.yolo", "ultralytics"):
        from ultralytics.engine.model import Model

    register()
    network: Any = model.model if isinstance(model, Model) else model
    options = {"to": to, "warm_start": warm_start, **layer_options}
    if not issubclass(type(network), nn.Module):  # which leaves it Any to mypy
        raise TypeError(f"model must be a network of ultralytics or a YOLO, got {type(network).__name__}")
    if not static_blocks(network) and not any(isinstance(module, DynamicBlock) for module in network.modules()):
        raise ValueError(f"the {type(network).__name__} has none of ultralytics' Conv blocks; use odconv.convert")
    names = make_dynamic(network, include=include, exclude=exclude, **options)
    if names and isinstance(getattr(network, "yaml", None), dict):
        # a new dictionary: ultralytics lets networks share theirs
        network.yaml = {**network.yaml, KEY: [*network.yaml.get(KEY, []), {**options, "include": names}]}
    return model


def make_dynamic(network: nn.Module, *, exclude: Chosen | None = None, **options: Any) -> list[str]:
    """Convert a network as :func:`convert` does, and return the names of the convolutions that were replaced."""
    before: dict[Any, nn.Module] = {block: block.conv for block in static_blocks(network)}
    inside = {*before.values()} | {module for module in network.modules() if isinstance(module, DynamicConv)}
    names = [name for places in find_convolutions(network).values() for name in places]
    excluded = matcher("exclude", () if exclude is None else exclude, names)
    convert_convolutions(network, exclude=lambda name, conv: conv not in inside or excluded(name, conv), **options)
    for block, conv in before.items():
        if isinstance(block.conv, DynamicConv) and hasattr(block, "bn"):
            block.__class__ = DynamicBlock  # keeps its name, hooks and what ultralytics wrote on it
            norm = block.conv.attention.bn
            if block.conv is not conv and isinstance(norm, nn.BatchNorm2d):  # ultralytics sets all norms alike
                norm.eps, norm.momentum = block.bn.eps, block.bn.momentum
    made = {block.conv for block, conv in before.items() if block.conv is not conv}
    return [name for name, module in network.named_modules() if module in made]


def static_blocks(module: nn.Module) -> list[Any]:
    """List ultralytics' blocks with one convolution in a module, but for those that it merges into one kernel."""
    from ultralytics.nn.modules.block import RepVGGDW
    from ultralytics.nn.modules.conv import Conv, DWConv, RepConv

    merged = {part for whole in module.modules() if isinstance(whole, RepConv | RepVGGDW) for part in whole.modules()}
    return [part for part in module.modules() if type(part) in (Conv, DWConv) and part not in merged]


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
    """Let ultralytics build dynamic networks: from the names of our blocks in a YAML, and again from converted ones.

    ``ODConv``, ``DyConv`` and ``CondConv`` can then stand wherever ``Conv`` can, with its arguments and, last, the
    options of the layer: ``[-1, 1, ODConv, [128, 3, 2, {kernel_num: 4}]]``. Behind the name of another block they make
    its convolutions dynamic, as in ``C2f_ODConv``: those of its bottlenecks where it has any, else all. A network that
    :func:`convert` made is trained as it is, starts from static weights that are loaded into it, and its GFLOPs are
    counted.

    Replaced are ultralytics' ``parse_model``, ``BaseModel.load`` and ``Model.train``, and ``thop.profile``, each by a
    function that calls it. The call lasts as long as the process; further ones change nothing. Loading a checkpoint
    with our blocks makes it too.

    Raises:
        ImportError: ultralytics is not installed.
    """
    with needed_by("odconv.yolo", "ultralytics"):
        from ultralytics.engine.model import Model
        from ultralytics.nn import tasks

    if not isinstance(tasks.parse_model, YamlParser):
        tasks.parse_model = YamlParser(tasks.parse_model)
        tasks.BaseModel.load = loading(tasks.BaseModel.load)
        Model.train = training(Model.train)
        with contextlib.suppress(ImportError):  # ultralytics counts nothing without it
            register_thop()


class YamlParser:
    """ultralytics' ``parse_model``, which knows its own blocks only, made to know ours.

    It counts channels, scales widths and repeats for the rows of its own blocks; so it is given these, and their
    convolutions are made dynamic afterwards.

    Args:
        parse_model: ultralytics' function.
    """

    def __init__(self, parse_model: Callable[..., tuple[nn.Sequential, list[int]]]) -> None:
        self.parse_model = parse_model

    def __call__(self, d: dict[str, Any], ch: int, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
        """Build the network that a YAML describes, as ``parse_model`` does.

        Raises:
            ValueError: a row names a block that there is not, or one without a convolution to make dynamic, or has
                options that are not its last argument.
            TypeError: a layer does not have an option.
        """
        d = copy.deepcopy(d)
        rows = d["backbone"] + d["head"]  # from, number, block, arguments
        names = [row[2] for row in rows]
        found: dict[int, tuple[type[DynamicBlock], dict[str, Any]]] = {}
        for index, row in enumerate(rows):
            row[2], kind = split_name(row[2])
            if kind is not None:
                found[index] = kind, options_of_row(names[index], row[3])
                check_options(kind.layer, found[index][1])
        try:
            model, save = self.parse_model(d, ch, verbose)
        except KeyError as error:
            unknown = [name for name, row in zip(names, rows, strict=True) if row[2] in error.args]
            if not unknown:
                raise
            raise ValueError(f"no block is called {unknown[0]!r}; {suggest(unknown[0])}") from error
        for index, (kind, options) in found.items():
            part: Any = model[index]
            blocks = blocks_to_convert(part)
            if not blocks:
                raise ValueError(f"{names[index]}: a {rows[index][2]} has no convolution that could be dynamic")
            for block in blocks:
                block.conv = dynamic_like(block.conv, kind.layer, options, block.conv.weight.device)
                block.__class__ = kind
            whole = rows[index][2] == "Conv"
            part.type = f"{kind.__module__}.{kind.__name__}" if whole else f"{part.type}_{kind.__name__}"
        for options in d.get(KEY, []):
            make_dynamic(nn.ModuleDict({"model": model}), **options)
        for part in model:
            part.np = sum(parameter.numel() for parameter in part.parameters())
        return model, save


def split_name(name: str) -> tuple[str, type[DynamicBlock] | None]:
    """Split a block's name in a YAML into that of ultralytics' block and what its convolutions become, if they do."""
    block, _, method = name.removeprefix(f"{__name__}.").rpartition("_")
    return (block or "Conv", BLOCKS[method]) if method in BLOCKS else (name, None)


def options_of_row(name: str, arguments: list[Any]) -> dict[str, Any]:
    """Take the options of the layers from the end of a row's arguments, where there are some."""
    if any(isinstance(argument, dict) for argument in arguments[:-1]):
        raise ValueError(f"{name}: the options of the layers must be the last argument, got {arguments}")
    return arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}


def suggest(name: str) -> str:
    """Say which blocks there are with names like one that there is not."""
    from ultralytics.nn import tasks

    blocks = [key for key, kind in vars(tasks).items() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    known = [*blocks, *BLOCKS, *(f"{block}_{method}" for block in blocks for method in BLOCKS)]
    lower = {key.lower(): key for key in known}
    near = [lower[key] for key in difflib.get_close_matches(name.removeprefix(f"{__name__}.").lower(), lower)]
    ours = f"the dynamic ones are {', '.join(BLOCKS)}, alone or behind another block's name, as in C2f_ODConv"
    return f"did you mean {', '.join(near)}?" if near else ours


def blocks_to_convert(part: nn.Module) -> list[Any]:
    """List the blocks with one convolution in a row of a YAML: those in its bottlenecks where it has any, else all."""
    from ultralytics.nn.modules.block import Bottleneck

    inside = {module for whole in part.modules() if isinstance(whole, Bottleneck) for module in whole.modules()}
    return [block for block in static_blocks(part) if not inside or block in inside]


def loading(load: Callable[..., None]) -> Callable[..., None]:
    """Make of ``BaseModel.load`` one that starts dynamic kernels from static ones, and warns of those it loses."""

    @functools.wraps(load)
    def load_dynamic(self: Any, weights: Any, verbose: bool = True) -> None:
        from ultralytics.utils import LOGGER

        load(self, weights, verbose)
        for options in getattr(self, "yaml", {}).get(KEY, []):  # for another number of classes, the head was replaced
            make_dynamic(self, **options)
        source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
        given: dict[str, Any] = dict(source.named_modules())
        own: dict[str, Any] = dict(self.named_modules())
        started = 0
        for name, block in own.items():
            conv: Any = given.get(f"{name}.conv") if isinstance(block, DynamicBlock) else None
            if type(conv) is nn.Conv2d and conv.weight.shape == block.conv.weight.shape[1:]:
                start_from(block.conv, conv)
                started += 1
        if started and verbose:
            LOGGER.info(f"odconv: {started} dynamic convolutions start from the static ones in the weights")
        lost = [
            name
            for name, module in given.items()
            if isinstance(module, DynamicConv) and not isinstance(own.get(name), DynamicConv)
        ]
        if lost:
            LOGGER.warning(
                f"odconv: {len(lost)} dynamic layers of the weights are lost, since the YAML of the network does not "
                f"have them: {first_few(lost)}. Convert it with odconv.yolo.convert, and it will."
            )

    return load_dynamic


def training(train: Callable[..., Any]) -> Callable[..., Any]:
    """Make of ``Model.train`` one that trains a dynamic network, not what the file says from which it was built."""

    @functools.wraps(train)
    def train_dynamic(self: Any, *arguments: Any, **options: Any) -> Any:
        dynamic = isinstance(self.model, nn.Module) and any(isinstance(m, DynamicConv) for m in self.model.modules())
        if dynamic and not self.ckpt:
            self.ckpt = {"model": self.model}  # makes ultralytics go by the network's own YAML and weights
        return train(self, *arguments, **options)

    return train_dynamic
