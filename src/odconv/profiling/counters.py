"""What thop, ptflops, calflops and torchinfo need to count dynamic layers, with the rules of :func:`odconv.profile`.

These look for modules of classes that they know, or for calls of PyTorch's functions, and find neither in a layer whose
operator is our own.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odconv.layers import PerSampleConv
from odconv.ops import flops
from odconv.profiling.count import Call, count_madds
from odconv.system.packages import needed_by

Hook = Callable[[PerSampleConv, tuple[Any, ...], Tensor], None]


def thop_ops() -> dict[type[PerSampleConv], Hook]:
    """Return what thop wants as ``thop.profile(..., custom_ops=thop_ops())``, for plain thop and for ultralytics'.

    It counts the parameters of what is called, and so none of a warehouse's cells.

    Returns:
        A rule for each class of dynamic layer, those that are yours included.
    """
    return {layer: _hook(total_ops=1) for layer in PerSampleConv.kinds()}


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """Return what ptflops wants as ``get_model_complexity_info(..., custom_modules_hooks=ptflops_hooks())``.

    Returns:
        For its backend "pytorch", a hook for each class of dynamic layer, those that are yours included; for "aten", a
        formula for each operator, those that FlopCounterMode has.
    """
    from torch.utils.flop_counter import flop_registry  # imports Triton where it is installed

    flops.register()
    formulas = {op: functools.partial(_madds, formula) for op, formula in flop_registry.items() if _is_ours(op)}
    return {layer: _hook(__flops__=1) for layer in PerSampleConv.kinds()} | formulas


def calflops_hooks() -> dict[type[PerSampleConv], Hook]:
    """Return what calflops wants: ``calflops.pytorch_ops.MODULE_HOOK_MAPPING.update(calflops_hooks())``.

    Returns:
        A hook for each class of dynamic layer, those that are yours included.
    """
    return {layer: _hook(__macs__=1, __flops__=2) for layer in PerSampleConv.kinds()}


def torchinfo_statistics(statistics: Any) -> Any:
    """Count the dynamic layers in what ``torchinfo.summary`` returns, each shown as one layer with its attention.

    Args:
        statistics: a ``torchinfo.ModelStatistics`` of a network that was run, from ``summary(model, input_size)``.

    Returns:
        A new one, with the right multiply-adds and size of the parameters.

    Raises:
        ValueError: the network was not run: ``summary`` got neither `input_size` nor `input_data`.
    """
    if not statistics.input_size:
        raise ValueError("statistics must be of a network that was run: give summary an input_size")
    rows = statistics.summary_list
    inside = {id(part) for row in rows if isinstance(row.module, PerSampleConv) for part in row.module.modules()}
    kept = [row for row in rows if isinstance(row.module, PerSampleConv) or row.layer_id not in inside]
    for row in kept:
        if isinstance(row.module, PerSampleConv):
            row.is_leaf_layer = True
            row.macs = count_madds(row.module, Call(torch.Size(row.input_size), torch.Size(row.output_size)))
    right = type(statistics)(kept, statistics.input_size, statistics.total_input, statistics.formatting)
    right.total_param_bytes = rows[0].param_bytes  # of the whole network, with the cells of a warehouse in it
    return right


def register_thop() -> None:
    """Let ``thop.profile`` count dynamic layers unasked, for programs that call it themselves, as ultralytics does.

    The call lasts as long as the process; further ones change nothing.

    Raises:
        ImportError: thop is not installed.
    """
    with needed_by("register_thop", "thop"):
        thop: Any = importlib.import_module("thop")
    if not hasattr(thop.profile, "counts_dynamic_layers"):
        thop.profile = _with_thop_ops(thop.profile)


def _with_thop_ops(profile: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(profile)
    def profile_dynamic(model: Any, inputs: Any, custom_ops: dict | None = None, **options: Any) -> Any:
        return profile(model, inputs, custom_ops=thop_ops() | (custom_ops or {}), **options)

    profile_dynamic.counts_dynamic_layers = True  # type: ignore[attr-defined]
    return profile_dynamic


def _is_ours(op: Any) -> bool:
    return str(getattr(op, "_qualified_op_name", "")).startswith("odconv::")


def _madds(formula: Callable[..., int], inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> int:
    return formula(*inputs, out_val=outputs[0]) // 2


def _hook(**counts: int) -> Hook:
    """Return a forward hook that adds a layer's multiply-adds to the layer's attributes, each times a number."""

    def count(layer: PerSampleConv, inputs: tuple[Any, ...], output: Tensor) -> None:
        madds = count_madds(layer, Call(inputs[0].shape, output.shape))
        for name, factor in counts.items():
            setattr(layer, name, getattr(layer, name) + factor * madds)
            for part in [*layer.modules()][1:]:  # a counter may have found these itself; they are counted with it
                if hasattr(part, name):
                    setattr(part, name, 0 * getattr(part, name))

    return count
