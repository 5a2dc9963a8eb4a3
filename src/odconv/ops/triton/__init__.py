"""The Triton backend of the operator, for CUDA: mix the kernels of a few samples, convolve these, and so on.

The convolution is an implicit matrix product on channels-last maps: nothing is unfolded. Only x, the attentions and W
are kept for the backward pass, which mixes again. Triton itself is imported by the first call.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from odconv.ops.contract import Attentions, Geometry, output_size
from odconv.ops.recompute import differentiable_gradients

WORKSPACE = 128 * 2**20  # bytes for the mixed kernels of the samples at work, or their gradients; offsets are 32-bit
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, as tests do; Triton reads it when imported
INSTALLED = importlib.util.find_spec("triton") is not None
ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? kernel, Tensor? spatial, Tensor? channel, Tensor? filter, "
    "int[] stride, int[] padding, int[] dilation, int groups"
)


def takes(x: Tensor) -> bool:
    """Return whether the kernels can compute with this tensor."""
    return INSTALLED and (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.dim() < 5


def triton_conv(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """1-d and 2-d on CUDA: mix and convolve a few samples at a time, under WORKSPACE bytes, into channels-last maps.

    Raises:
        ValueError: there is no Triton, x is not on a CUDA device, or there is no kernel for its dtype or dimensions.
    """
    if not INSTALLED:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"backend 'triton' needs x on a CUDA device, got x on {x.device}")
    if x.dtype not in DTYPES:
        raise ValueError(f"backend 'triton' needs x in one of {DTYPES}, got {x.dtype}")
    if x.dim() == 5:
        raise ValueError(f"backend 'triton' needs a 1-d or 2-d map, got x of shape {tuple(x.shape)}")
    if attentions.kernel is None and weight.shape[0] > 1:
        return convolve_samples_as_groups(x, weight, attentions, geometry)
    (kernel, spatial, channel, filter), groups = attentions, geometry.groups
    if weight.shape[1] == groups == x.shape[1] and filter is not None:  # depth-wise: both scale the same axis
        channel, filter = (filter if channel is None else channel * filter), None
    if x.dim() == 4:
        y: Tensor = conv(x, weight, kernel, spatial, channel, filter, *geometry)
        return y
    x, weight = x.unsqueeze(2), weight.unsqueeze(3)
    spatial = None if spatial is None else spatial.unsqueeze(1)
    stride, padding, dilation = (1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation)
    y = conv(x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups)
    return y.squeeze(2)


def convolve_samples_as_groups(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Convolve each sample with a kernel of its own, (B, O, C/g, *k), as one sample of B * groups groups."""
    _, spatial, channel, filter = attentions
    batch, whole = x.shape[0], geometry._replace(groups=x.shape[0] * geometry.groups)
    weight = weight if spatial is None else weight * spatial[:, None, None]
    scales = (None if scale is None else scale.reshape(1, -1) for scale in (channel, filter))
    y = triton_conv(
        x.reshape(1, -1, *x.shape[2:]), weight.reshape(1, -1, *weight.shape[2:]), Attentions(None, None, *scales), whole
    )
    return y.reshape(batch, -1, *y.shape[2:])


@torch.library.custom_op("odconv::triton_conv", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def conv(
    x: Tensor,
    weight: Tensor,
    kernel: Tensor | None,
    spatial: Tensor | None,
    channel: Tensor | None,
    filter: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolve in 2-d, where depth-wise without filter attention."""
    from odconv.ops.triton import launch

    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    y = new_output(x, weight, stride, padding, dilation)
    launch.forward(x, weight, Attentions(kernel, spatial, channel, filter), geometry, y, WORKSPACE)
    return y


@torch.library.custom_op(
    "odconv::triton_conv_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {ARGUMENTS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel: Tensor | None,
    spatial: Tensor | None,
    channel: Tensor | None,
    filter: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and the attentions; empty where not needed."""
    from odconv.ops.triton import launch

    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    gradients = new_gradients(x, weight, (kernel, spatial, channel, filter), needed)
    attentions = Attentions(kernel, spatial, channel, filter)
    launch.backward(grad, x, weight, attentions, geometry, gradients, WORKSPACE)
    return gradients


@conv.register_fake
def _(x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return new_output(x, weight, stride, padding, dilation)


@conv_backward.register_fake
def _(grad, x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups, needed):  # type: ignore[no-untyped-def]
    return new_gradients(x, weight, (kernel, spatial, channel, filter), needed)


def new_output(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Memory for the output, (B, O, *map), channels-last."""
    size = output_size(x.shape[2:], weight.shape[3:], stride, padding, dilation)
    return torch.empty(
        (x.shape[0], weight.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def new_gradients(
    x: Tensor, weight: Tensor, attentions: tuple[Tensor | None, ...], needed: list[bool]
) -> tuple[Tensor, ...]:
    """Memory for the gradients: x's channels-last, the others contiguous, none where none is needed."""
    formats = (torch.channels_last, *(torch.contiguous_format,) * 5)
    return tuple(
        torch.empty_like(like, memory_format=form) if like is not None and need else x.new_empty(0)
        for like, form, need in zip((x, weight, *attentions), formats, needed, strict=True)
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what backward mixes again: x, W and the attentions."""
    ctx.save_for_backward(*inputs[:6])
    ctx.geometry = inputs[6:]


def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the six tensors that need them; those that are to be differentiated again are plain PyTorch's."""
    needed, tensors = list(ctx.needs_input_grad[:6]), ctx.saved_tensors
    if torch.is_grad_enabled():
        return *differentiable_gradients(grad, tensors, Geometry(*ctx.geometry), needed), None, None, None, None
    gradients = conv_backward(grad, *tensors, *ctx.geometry, needed)
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None, None, None, None


conv.register_autograd(differentiate, setup_context=keep)
