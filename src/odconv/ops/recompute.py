"""Backward passes that save no mixed kernel: they keep x, the weight and the attentions, and mix again.

Autograd by itself would keep every sample's kernel, scaled map or columns until the backward pass, several times what
the static layer keeps. Samples are worked through a few at a time, so that what is mixed fits in :data:`WORKSPACE`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from odconv.ops import eager
from odconv.ops.contract import Attentions, Geometry

WORKSPACE = 128 * 2**20  # bytes of mixed kernels, or of columns, at a time; one sample's where that is more

Form = Callable[[Tensor, Tensor, Attentions, Geometry], Tensor]
Tensors = Sequence[Any]  # x, weight, and the attentions in their order, which may be None


def recomputed(form: Form, x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """What a form computes, in chunks of samples and with a backward pass that computes it again."""
    y: Tensor = _Recomputed.apply(form, geometry, x, weight, *attentions)
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, geometry: Geometry, *tensors: Tensor | None) -> Tensor:
        ctx.form, ctx.geometry = form, geometry
        ctx.save_for_backward(*tensors)
        outputs = [form(*_arguments(chunk), geometry) for chunk in _chunks(tensors)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *differentiable_gradients(grad, tensors, ctx.geometry, needs)
        differentiate = _grouped_gradients if ctx.form is eager.grouped else _gradients
        found: list[list[Tensor | None]] = []
        start = 0
        for chunk in _chunks(tensors):
            stop = start + chunk[0].shape[0]
            found.append(differentiate(ctx.form, grad[start:stop], chunk, ctx.geometry, needs))
            start = stop
        x, weight, *attentions = zip(*found, strict=True)
        sums = [sum(weight[1:], start=weight[0])] if needs[1] else [None]
        return None, None, _joined(x), *sums, *map(_joined, attentions)


def differentiable_gradients(
    grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd makes them, of a form in plain PyTorch."""
    again = [t if t is None else t.view_as(t) for t in tensors]  # not through one of them into another, if they depend
    y = eager.grouped(*_arguments(again), geometry)
    return _where_needed(y, again, needs, grad, create_graph=True)


def _gradients(
    form: Form, grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The form once more, and autograd through it."""
    with torch.enable_grad():
        again = _leaves(tensors, needs)
        y = form(*_arguments(again), geometry)
    return _where_needed(y, again, needs, grad)


def _grouped_gradients(
    form: Form, grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The grouped form's: only the kernels are mixed again, the convolution itself is not."""
    x, weight, _ = _arguments(tensors)
    with torch.enable_grad():
        again = _leaves(tensors, (False, *needs[1:]))
        mixed = eager.mixed_kernels(*_arguments(again)[1:], geometry.groups).expand(x.shape[0], *weight.shape[1:])
    stride, padding, dilation, groups = geometry
    x_grad, mixed_grad, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]), x.reshape(1, -1, *x.shape[2:]), mixed.detach().flatten(0, 1), None,
        stride, padding, dilation, False, [0] * len(stride), x.shape[0] * groups, [needs[0], any(needs[1:]), False],
    )  # fmt: skip
    found: list[Tensor | None] = [None] * len(needs)
    if any(needs[1:]):
        found = _where_needed(mixed, again, (False, *needs[1:]), mixed_grad.view_as(mixed))
    return [x_grad.view_as(x) if needs[0] else None, *found[1:]]


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


def _chunks(tensors: Tensors) -> list[Tensors]:
    """The samples, a few at a time: their mixed kernels or columns are what takes memory."""
    x, weight, attentions = _arguments(tensors)
    taps = math.prod(weight.shape[3:])
    sample = max(weight[0].numel(), taps * x[:1].numel()) * x.element_size()
    count = max(1, WORKSPACE // sample)
    if x.shape[0] <= count:
        return [tensors]
    parts = [[None] * -(-x.shape[0] // count) if t is None else t.split(count) for t in (x, *attentions)]
    return [[part[0], weight, *part[1:]] for part in zip(*parts, strict=True)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
