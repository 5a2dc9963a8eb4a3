"""The compiled form for maps of few positions: vectors run over samples, which all meet the same n kernels, unmixed.

What samples differ by is put outside: their channels are scaled before, their filters behind, and each tap of each
kernel has a share of its own. Taps that meet padding alone cost nothing, and n kernels cost n products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odconv.ops import cpu
from odconv.ops.contract import Attentions, Geometry
from odconv.ops.eager import over_map
from odconv.ops.recompute import differentiable_gradients

GEOMETRY = "int[] stride, int[] padding, int[] dilation"
cpu.OPERATORS.define(f"conv_samples(Tensor x, Tensor weight, Tensor shares, {GEOMETRY}) -> Tensor")
cpu.OPERATORS.define(
    f"conv_samples_backward(Tensor grad, Tensor x, Tensor weight, Tensor shares, {GEOMETRY}, bool to_samples, "
    "bool to_kernels) -> (Tensor, Tensor, Tensor)"
)


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether this form can compute with a tensor once it has a dtype."""
    return dtype not in cpu.HALF and cpu.takes(x)


def convolve(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Convolve all samples with all n kernels, tap by tap, each by its sample's share."""
    if geometry.groups > 1 or not takes(x, x.dtype):
        raise ValueError(
            "backend 'samples' needs x on the CPU in float32 or float64, at least one sample, no groups, and a C++ "
            f"compiler, got x of shape {tuple(x.shape)} on {x.device} in {x.dtype} and groups {geometry.groups}"
        )
    kernel, spatial, channel, filter = attentions
    shares = x.new_ones(1, 1, 1) if kernel is None else kernel[:, :, None]
    if spatial is not None:
        shares = shares * spatial.flatten(1)[:, None]
    shares = shares.expand(x.shape[0], weight.shape[0], weight[0, 0, 0].numel()).contiguous()
    scaled = x if channel is None else x * over_map(channel, x)
    y: Tensor = torch.ops.odconv.conv_samples(scaled, weight.contiguous(), shares, *geometry[:3])
    return y if filter is None else y * over_map(filter, y)


def mix(weight: Tensor, shares: Tensor | None) -> Tensor:
    """Mix a kernel for each sample, (B, O, C, *k), of shares (B, n, taps): what the form computes, for autograd."""
    assert shares is not None
    return torch.einsum("bnt,noct->boct", shares, weight.flatten(3)).unflatten(3, weight.shape[3:])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, stride, padding, dilation = inputs
    ctx.save_for_backward(*tensors)
    ctx.geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), 1)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, (to_x, to_weight, to_shares) = ctx.saved_tensors, ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        needs = (to_x, to_weight, to_shares, False, False, False)
        found = differentiable_gradients(grad, (*tensors, None, None, None), ctx.geometry, needs, mix)[:3]
    else:
        found = torch.ops.odconv.conv_samples_backward(grad, *tensors, *ctx.geometry[:3], to_x or to_shares, to_weight)
    wanted = zip(found, (to_x, to_weight, to_shares), strict=True)
    return *(tensor if need else None for tensor, need in wanted), None, None, None


def _fake(
    x: Tensor,
    weight: Tensor,
    shares: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return cpu.empty_output(x, weight.shape[1], weight.shape[3:], stride, padding, dilation)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, shares: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, to_samples, to_kernels = rest
    wanted = (to_samples, x), (to_kernels, weight), (to_samples, shares)
    return tuple(torch.empty_like(like) if asked else x.new_empty(0) for asked, like in wanted)


torch.library.register_fake("odconv::conv_samples", _fake)
torch.library.register_fake("odconv::conv_samples_backward", _fake_backward)
torch.library.register_autograd("odconv::conv_samples", _backward, setup_context=_save)
