"""Backward passes that save no mixed kernel: they keep x, the weight and the attentions, and mix again.

Autograd by itself would keep every sample's kernel, scaled map or columns until the backward pass, several times what
the static layer keeps. Samples are worked through a few at a time, so that what is mixed fits in :data:`WORKSPACE`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odconv.ops import eager
from odconv.ops.contract import Attentions, Geometry
from odconv.ops.reference import CONVOLUTIONS

WORKSPACE = 128 * 2**20  # bytes of mixed kernels, or of columns, at a time; one sample's where that is more

Backend = Callable[[Tensor, Tensor, Attentions, Geometry], Tensor]
Tensors = Sequence[Any]  # x, weight, and the attentions in their order, which may be None
Gradients = Callable[[Tensor, Tensors, Geometry, Sequence[bool]], list[Tensor | None]]
Convolve = Callable[[Tensor, Tensor, Tensor, Geometry, bool, bool], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """What is computed, and again in the backward pass.

    Attributes:
        run: gives the output, of x, weight, attentions and geometry.
        geometry: stride, padding, dilation and groups.
        numbers: how many numbers one sample takes meanwhile, beside its columns: those of its kernel.
        per_sample: whether weight has one kernel for each sample.
        mix: makes a kernel for each sample of weight and the kernel attention.
        differentiate: gives the gradients of x and of the kernels that `run` convolves with; None for a backend that
            convolves with no such kernels, which autograd goes through.
        gradients: gives the gradients of a chunk's tensors that are needed in a way of its own, which mixes no kernels.
    """

    run: Backend
    geometry: Geometry
    numbers: int
    per_sample: bool = False
    mix: eager.Mix = eager.mix
    differentiate: Convolve | None = None
    gradients: Gradients | None = None


def recomputed(
    run: Backend, x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry, per_sample: bool = False
) -> Tensor:
    """Compute what a backend does, in chunks of samples and with a backward pass that computes it again."""
    differentiate = BACKWARD.get(run)
    numbers = math.prod(weight.shape[1:])
    gradients = None
    if run is eager.shared:  # which mixes no kernels, but n outputs
        numbers = math.prod(weight.shape[:2]) * math.prod(x.shape[2:])
        gradients = scaled_gradients if attentions.kernel is attentions.spatial is None else None
    step = Step(run, geometry, numbers, per_sample, differentiate=differentiate, gradients=gradients)
    return apply(step, x, weight, attentions)


def apply(step: Step, x: Tensor, weight: Tensor, attentions: Attentions) -> Tensor:
    """Compute a step, whose backward pass computes it again."""
    y: Tensor = _Recomputed.apply(step, x, weight, *attentions)
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *tensors: Tensor | None) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        outputs = [step.run(*_arguments(chunk), step.geometry) for chunk in _chunks(step, tensors)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step, tensors, needs = ctx.step, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *differentiable_gradients(grad, tensors, step.geometry, needs, step.mix)
        return None, *_gradients(step, grad, tensors, needs)


def differentiable_gradients(
    grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool], mix: eager.Mix = eager.mix
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again: autograd makes them, of a backend in plain PyTorch."""
    again = [t if t is None else t.view_as(t) for t in tensors]  # not through one of them into another, if they depend
    x, weight, attentions = _arguments([t if t is None else t.to(grad.dtype) for t in again])
    y = eager.grouped(x, mix(weight, attentions.kernel), attentions._replace(kernel=None), geometry)
    return _where_needed(y, again, needs, grad, create_graph=True)


def depthwise_gradients(
    grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool], differentiate: Convolve
) -> list[Tensor | None]:
    """Return the gradients of a depth-wise mixture, whose kernels are small: they are mixed whole, in few steps.

    Those of the kernels and of the attentions are computed if any of them is needed.

    Args:
        grad: gradient of the output.
        tensors: x, the kernels and the attentions.
        geometry: stride, padding, dilation and groups.
        needs: whose gradients are wanted.
        differentiate: what returns the gradients of x and of a kernel for each sample.
    """
    x, dtype = tensors[0], torch.promote_types(grad.dtype, torch.float32)
    weight = tensors[1].to(dtype)
    kernel, spatial, channel, filter = (None if t is None else t.to(dtype) for t in tensors[2:])
    (batch, channels), taps = x.shape[:2], weight.shape[3:]
    ones = weight.new_ones(1, 1)
    by_tap = (ones if spatial is None else spatial.reshape(len(spatial), -1))[:, None]  # (B or 1, 1, taps)
    by_channel = (ones if channel is None else channel)[:, :, None]
    by_filter = (ones if filter is None else filter)[:, :, None]
    kernels = weight.reshape(len(weight), -1)
    base = (kernels if kernel is None else kernel @ kernels).view(-1, channels, math.prod(taps))
    mixed = (base * by_tap * by_channel * by_filter).expand(batch, -1, -1).reshape(batch, channels, 1, *taps)
    x_grad, mixed_grad = differentiate(grad, x, mixed.to(x.dtype), geometry, needs[0], any(needs[1:]))
    found: list[Tensor | None] = [_as_shaped(x_grad, x) if needs[0] else None]
    if not any(needs[1:]):
        return [*found, *(None for _ in needs[1:])]
    d = mixed_grad.view(batch, channels, -1).to(dtype)
    to_base, to_gates = (d * by_tap * by_channel * by_filter).reshape(batch, -1), d * base
    to_both = (to_gates * by_tap).sum(2)
    to_weight = kernel.t() @ to_base if kernel is not None else to_base.sum(0) if len(weight) == 1 else to_base
    found += [
        to_weight.view_as(weight),
        None if kernel is None else to_base @ kernels.t(),
        None if spatial is None else (to_gates * by_channel * by_filter).sum(1).view_as(spatial),
        None if channel is None else to_both * by_filter[:, :, 0],
        None if filter is None else to_both * by_channel[:, :, 0],
    ]
    return [
        None if one is None or like is None else one.to(like.dtype) for one, like in zip(found, tensors, strict=True)
    ]


def scaled_gradients(grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients where one kernel convolves all samples, and their maps are scaled before and behind it."""
    x, weight, _, _, channel, filter = tensors
    (to_x, to_weight, _, _, to_channel, to_filter), kernel = needs, weight[0]
    before = None if channel is None else eager.over_map(channel, x)
    scaled = x if before is None else x * before
    found: list[Tensor | None] = [None] * len(needs)
    if to_filter:
        y = CONVOLUTIONS[x.dim() - 2](scaled, kernel, None, *geometry)
        found[5] = (grad * y).sum(tuple(range(2, x.dim())))
    to_y = grad if filter is None else grad * eager.over_map(filter, grad)
    stride, padding, dilation, groups = geometry
    to_scaled, to_kernel, _ = torch.ops.aten.convolution_backward(
        to_y, scaled, kernel, None, stride, padding, dilation, False, [0] * len(stride), groups,
        [to_x or to_channel, to_weight, False],
    )  # fmt: skip
    if to_x:
        found[0] = to_scaled if before is None else to_scaled * before
    if to_weight:
        found[1] = to_kernel[None]
    if to_channel:
        found[4] = (to_scaled * x).sum(tuple(range(2, x.dim())))
    return found


def _gradients(step: Step, grad: Tensor, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of a step, a few samples at a time."""
    found: list[list[Tensor | None]] = []
    start = 0
    for chunk in _chunks(step, tensors):
        stop = start + chunk[0].shape[0]
        found.append(_gradients_of_chunk(step, grad[start:stop], chunk, needs))
        start = stop
    x, weight, *attentions = zip(*found, strict=True)
    together = _joined if step.per_sample else _summed
    return [_joined(x), together(weight), *map(_joined, attentions)]


def _gradients_of_chunk(step: Step, grad: Tensor, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    if step.gradients is not None:
        return step.gradients(grad, tensors, step.geometry, needs)
    return (_through_backend if step.differentiate is None else _through_kernels)(step, grad, tensors, needs)


def _through_backend(step: Step, grad: Tensor, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return what autograd finds through the backend, run once more."""
    with torch.enable_grad():
        again = _leaves(tensors, needs)
        y = step.run(*_arguments(again), step.geometry)
    return _where_needed(y, again, needs, grad)


def _through_kernels(step: Step, grad: Tensor, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients where only the kernels are mixed again, and the convolution is not repeated."""
    assert step.differentiate is not None
    x = tensors[0]
    with torch.enable_grad():
        again = _leaves(tensors, (False, *needs[1:]))
        mixed = eager.mixed_kernels(*_arguments(again)[1:], step.geometry.groups, step.mix)
        mixed = mixed.expand(x.shape[0], *mixed.shape[1:])
    x_grad, mixed_grad = step.differentiate(grad, x, mixed.detach(), step.geometry, needs[0], any(needs[1:]))
    found: list[Tensor | None] = [None] * len(needs)
    if any(needs[1:]):
        found = _where_needed(mixed, again, (False, *needs[1:]), mixed_grad.view_as(mixed))
    return [_as_shaped(x_grad, x) if needs[0] else None, *found[1:]]


def _as_shaped(grad: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the shape of a tensor; no needless view, to which autograd would add nothing in place."""
    return grad if grad.shape == like.shape else grad.view_as(like)


def grouped_backward(
    grad: Tensor, x: Tensor, mixed: Tensor, geometry: Geometry, to_x: bool, to_mixed: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of a kernel for each sample, by a convolution whose groups are the samples."""
    stride, padding, dilation, groups = geometry
    x_grad, mixed_grad, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]), x.reshape(1, -1, *x.shape[2:]), mixed.flatten(0, 1), None,
        stride, padding, dilation, False, [0] * len(stride), x.shape[0] * groups, [to_x, to_mixed, False],
    )  # fmt: skip
    return x_grad, mixed_grad


def pointwise_backward(
    grad: Tensor, x: Tensor, mixed: Tensor, geometry: Geometry, to_x: bool, to_mixed: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of a kernel of one tap for each sample, without groups, by matrix products."""
    batch, channels, *size = x.shape
    kernels, none = mixed.flatten(2), x.new_empty(0)
    met = x[eager.every(geometry.stride)]
    last = eager.has_channels_last(x)
    x_grad = mixed_grad = none
    # (B, O, positions), or as rows; PyTorch has no rules to batch `flatten` and `unflatten` of a gradient in here
    columns = eager.rows_of(grad) if last else grad.reshape(batch, grad.shape[1], -1)
    if to_x and last:
        x_grad = (columns @ kernels).reshape(batch, *grad.shape[2:], channels).movedim(-1, 1)
    elif to_x:
        x_grad = (kernels.mT @ columns).reshape(batch, channels, *grad.shape[2:])
    if to_x and met.shape != x.shape:
        whole = x_grad.new_zeros(batch, *size, channels).movedim(-1, 1) if last else x_grad.new_zeros(x.shape)
        whole[eager.every(geometry.stride)] = x_grad
        x_grad = whole
    if to_mixed:
        mixed_grad = columns.mT @ eager.rows_of(met) if last else columns @ met.flatten(2).mT
    return x_grad, mixed_grad


BACKWARD: dict[Backend, Convolve] = {
    eager.grouped: grouped_backward,
    eager.pointwise: pointwise_backward,
}
"""What differentiates by x and by the mixed kernels, for the backends that convolve with them."""


def _arguments(tensors: Tensors) -> tuple[Tensor, Tensor, Attentions]:
    x, weight, *attentions = tensors
    return x, weight, Attentions(*attentions)


def _leaves(tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    return [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def _where_needed(
    y: Tensor, tensors: Tensors, needs: Sequence[bool], grad: Tensor, create_graph: bool = False
) -> list[Tensor | None]:
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def _chunks(step: Step, tensors: Tensors) -> list[Tensors]:
    """Return the samples, a few at a time: their mixed kernels or columns are what takes memory."""
    x, weight, attentions = _arguments(tensors)
    count = samples_at_a_time(x, step.numbers, math.prod(weight.shape[3:]))
    if x.shape[0] <= count:
        return [tensors]
    parts = [[None] * -(-x.shape[0] // count) if t is None else t.split(count) for t in (x, *attentions)]
    weights = weight.split(count) if step.per_sample else [weight] * len(parts[0])
    return [list(chunk) for chunk in zip(parts[0], weights, *parts[1:], strict=True)]


def samples_at_a_time(x: Tensor, numbers: int, taps: int) -> int:
    """Return how many samples' kernels, or columns, fit into the workspace; at least one."""
    return max(1, WORKSPACE // (max(numbers, taps * math.prod(x.shape[1:])) * x.element_size()))


def _summed(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    total = found[0] + found[1]  # another tensor, to which the rest is added where it lies
    for part in found[2:]:
        total += part
    return total


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    if len(parts) == 1:  # which torch.cat would copy
        return parts[0]
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
