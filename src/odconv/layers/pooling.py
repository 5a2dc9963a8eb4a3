"""What an attention looks at: the mean of each map, or of the part of it that is not padding."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odconv.ops import cpu
from odconv.ops.contract import Attentions, is_exporting, is_traced, is_transformed
from odconv.system.modules import check_module


class PoolingAttention(nn.Module):
    """The base of the attentions that look at the mean of each map, or of the part that :func:`pool_inside` says."""

    dims: int
    extent: Tensor | None = None

    def named(self, found: Any) -> Attentions:
        """Return by name what the module's `forward`, and so its hooks, gave for B samples."""
        raise NotImplementedError

    def range_of(self, kind: str) -> tuple[float, float]:
        """Return between which values the attention of a kind lies: "channel", "filter", "spatial" or "kernel"."""
        raise NotImplementedError


def pool(x: Tensor, extent: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the mean over each map of x, (B, C, *map) -> (B, C), or over the part that `extent` says.

    Args:
        x: the maps.
        extent: share of each axis from its beginning, (B, dims), in 0 .. 1; None for whole maps.
        dtype: of the result.
    """
    if extent is None and has_compiled_kernel(x):
        return cpu.pool(x)
    if extent is None:
        axes = tuple(range(2, x.dim()))
        graph = torch.compiler.is_compiling() or is_exporting() or is_traced() or is_transformed()
        if x.requires_grad and not graph:
            pooled: Tensor = _Mean.apply(x, dtype)
            return pooled
        return x.mean(axes) if x.dtype == dtype else x.mean(axes, dtype=dtype)  # some exporters know the first alone
    z = x.to(dtype)
    for share in reversed(extent.to(dtype).unbind(1)):
        size = z.shape[-1]
        # a position counts where some of it is inside; 1e-3 is for shares that were rounded
        places = torch.arange(size, device=z.device, dtype=dtype)
        inside = (places < (share * size - 1e-3)[:, None]).to(dtype)
        inside = inside / inside.sum(1, keepdim=True).clamp(min=1)
        z = (z.flatten(1, -2) @ inside[:, :, None]).reshape(z.shape[:-1])
    return z


class _Mean(torch.autograd.Function):
    """The mean of each map, whose gradient is a view in the map's dtype; that of autograd would be written as a map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return cpu.pool(x) if has_compiled_kernel(x) else x.mean(tuple(range(2, x.dim())), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        each = (grad / math.prod(ctx.shape[2:])).to(ctx.dtype)
        return each.view(*each.shape, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.mean(tuple(range(2, tangent.dim())), dtype=torch.promote_types(ctx.dtype, torch.float32))


@contextmanager
def pool_inside(model: nn.Module, extent: Tensor) -> Iterator[None]:
    """Let the attentions of a network pool over a part of each map, for batches of padded inputs.

    Without it a global pool sees the padding that makes the inputs of a batch alike, and the attentions of a sample
    depend on its neighbours. For layers of one number of axes; samples must keep their places in the batch.

    Args:
        model: the network.
        extent: share of each axis of its input that is not padding, from the beginning, (B, dims), above 0, at most 1.

    Raises:
        ValueError: extent has another shape, or values out of range.
    """
    check_module(model)
    if extent.dim() != 2 or not bool(((extent > 0) & (extent <= 1)).all()):
        raise ValueError(f"extent must be shares (B, dims) above 0 and at most 1, got {extent.tolist()}")
    if any(part.dims != extent.shape[1] for part in model.modules() if isinstance(part, PoolingAttention)):
        raise ValueError(f"extent must have a share for each axis of the layers' maps, got shape {tuple(extent.shape)}")
    with pooling(model, extent):
        yield


def has_attentions(model: nn.Module) -> bool:
    """Return whether something in a network pools its maps for an attention, and so sees padding."""
    return any(isinstance(part, PoolingAttention) for part in model.modules())


@contextmanager
def pooling(model: nn.Module, extent: Tensor) -> Iterator[None]:
    """Do what :func:`pool_inside` does with an extent that is right, whose values may not be known yet."""
    attentions = [part for part in model.modules() if isinstance(part, PoolingAttention)]
    try:
        for attention in attentions:
            attention.extent = extent
        yield
    finally:
        for attention in attentions:
            attention.extent = None


def has_compiled_kernel(x: Tensor) -> bool:
    """Return whether the compiled kernels for the CPU pool a map and make attentions of it: without gradients."""
    return not (torch.is_grad_enabled() or is_exporting()) and cpu.takes(x)
