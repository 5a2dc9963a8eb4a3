"""The parts of an attention: which can be read past, and calling them in another dtype, or on one sample."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as everywhere

from odconv.ops.contract import is_traced, positive

Pointwise = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
POINTWISE: dict[int, type[Pointwise]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PLAIN = frozenset((*POINTWISE.values(), *BATCH_NORM.values(), nn.GroupNorm))


def hidden_width(in_channels: int, reduction: float, min_channels: int) -> int:
    """Return the width of an attention's hidden layer; raise a ValueError for a share that is out of range."""
    if not 0 < reduction < math.inf:
        raise ValueError(f"reduction must be above 0, got {reduction!r}")
    if reduction > 1:
        raise ValueError(
            f"reduction must be a share of the channels, at most 1, got {reduction!r}; 1/16 for a sixteenth"
        )
    return max(int(in_channels * reduction), positive("min_channels", min_channels))


def is_plain(module: Any) -> bool:
    """Return whether a module does what its class in torch.nn does, so that its parameters can be read past it.

    Hooks (pruning, old weight norm, adapters), parametrizations and other classes want to be called.
    """
    if type(module) not in PLAIN or is_hooked(module):
        return False
    return not (
        everywhere._global_forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_pre_hooks
        or everywhere._global_backward_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own, or another `forward` than its class."""
    # read as attributes, of which torch.compile does not watch those that are empty
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return "forward" in module.__dict__ or bool(hooks)


def cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a tensor that may be absent in the dtype of another."""
    return None if tensor is None else tensor.to(like.dtype)


def call_in_dtype(module: nn.Module, z: Tensor) -> Tensor:
    """Return ``module(z)``, computed in z's dtype whatever dtype its parameters and buffers have."""
    own = [*module.parameters(), *module.buffers()]
    other = [tensor.dtype for tensor in own if tensor.is_floating_point() and tensor.dtype != z.dtype]
    if not other:
        return module(z)
    if is_traced():  # which knows no calls with other parameters
        return module(z.to(other[0])).to(z.dtype)
    copies = copies_in_dtype(module, z.dtype)
    y = functional_call(module, copies, (z,))
    if module.training:
        for name, buffer in module.named_buffers():
            if name in copies and copies[name] is not buffer:  # statistics, updated in a copy
                buffer.copy_(copies[name])
    return y


def copies_in_dtype(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module that are numbers, by name, in a dtype."""
    own = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.to(dtype) for name, tensor in own if tensor.is_floating_point()}


def normalise_one(bn: BatchNorm, z: Tensor) -> Tensor:
    """Return a training batch of one, (1, C, *ones), normalised by the running statistics, which then move as they do.

    One sample has no variance: what moves the running one is the sample's squared distance from the running mean, as
    in the incremental variance of Welford and West.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("norm without running statistics cannot normalise a training batch of one")
    mean, var = bn.running_mean.to(z.dtype, copy=True), bn.running_var.to(z.dtype, copy=True)
    if is_plain(bn):
        y = F.batch_norm(z, mean, var, cast(bn.weight, z), cast(bn.bias, z), eps=bn.eps)
    else:
        copies = copies_in_dtype(bn, z.dtype)
        bn.training = False  # as if evaluating; hooks, masks and other classes are called
        try:
            y = functional_call(bn, copies | {"running_mean": mean, "running_var": var}, (z,))
        finally:
            bn.training = True
    if bn.track_running_stats:
        with torch.no_grad():
            momentum: Any = bn.momentum
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
                momentum = 1 / bn.num_batches_tracked if momentum is None else momentum
            sample = z.flatten()
            bn.running_mean.copy_(mean + momentum * (sample - mean))
            bn.running_var.copy_((1 - momentum) * (var + momentum * (sample - mean).square()))
    return y
