"""What goes into the operator: the attentions, the geometry, and the checks that every form relies on."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Attentions(NamedTuple):
    """The weights of each sample's mixture; one that is absent counts as ones (and `kernel` then needs n = 1).

    Attributes:
        kernel: share of each of the n kernels, (B, n).
        spatial: weight of each tap, shared by the n kernels, (B, *kernel_size).
        channel: weight of each input channel, (B, C).
        filter: weight of each output filter, (B, O).
    """

    kernel: Tensor | None = None
    spatial: Tensor | None = None
    channel: Tensor | None = None
    filter: Tensor | None = None


class Geometry(NamedTuple):
    """How the kernel moves over the map, one number an axis, as in ``torch.nn.functional.conv2d``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Placement = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]
"""Stride, padding, output padding, groups and dilation of a transposed convolution."""


def per_axis(name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """`value` as one int an axis; a ValueError names the argument where it is not."""
    try:
        values = tuple(map(operator.index, value)) if isinstance(value, Sequence) else (operator.index(value),) * dims
    except TypeError:
        values = ()
    if len(values) != dims or min(values) < least:
        raise ValueError(f"{name} must be an int or {dims} ints, each at least {least}, got {value!r}")
    return values


def positive(name: str, value: int) -> int:
    """`value` as an int of at least 1; a ValueError names the argument where it is not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return number


def check_shapes(
    x: Tensor,
    weight: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    groups: int,
    transposed: bool = False,
    per_sample: bool = False,
) -> None:
    """Raise a ValueError that names the first argument whose shape does not fit the others.

    Per sample, weight has B kernels in the place of n, which may be none.
    """
    axis = "B" if per_sample else "n"
    if weight.dim() not in (4, 5, 6) or 0 in weight.shape[per_sample:]:
        layout = f"({axis}, C, O/groups, *kernel_size)" if transposed else f"({axis}, O, C/groups, *kernel_size)"
        raise ValueError(f"weight must have shape {layout}, none of them 0, got {tuple(weight.shape)}")
    n, whole, parted = weight.shape[0], weight.shape[1], weight.shape[2] * positive("groups", groups)
    if whole % groups:
        kind = "channels" if transposed else "filters"
        raise ValueError(f"groups must be a positive divisor of the {whole} {kind} in weight, got {groups}")
    channels, filters = (whole, parted) if transposed else (parted, whole)
    if x.dim() != weight.dim() - 1 or x.shape[1] != channels:
        axes = ", ".join("DHW"[4 - weight.dim() + 2 :])
        raise ValueError(f"x must have shape (B, C, {axes}) with C = {channels}, got {tuple(x.shape)}")
    batch = x.shape[0]
    expected = {
        "kernel": ("(B, n)", (batch, n)),
        "spatial": ("(B, *kernel_size)", (batch, *weight.shape[3:])),
        "channel": ("(B, C)", (batch, channels)),
        "filter": ("(B, O)", (batch, filters)),
    }
    for name, (meaning, shape) in expected.items():
        given = getattr(attentions, name)
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(given.shape)}")
    if per_sample and n != batch:
        raise ValueError(f"weight must have a kernel for each of the {batch} samples in x, got {tuple(weight.shape)}")
    if attentions.kernel is None and not per_sample and n > 1:
        raise ValueError(f"kernel must have shape (B, n) = ({batch}, {n}) to mix the {n} kernels in weight, got None")
    if bias is not None and tuple(bias.shape) not in ((filters,), (n, filters)):
        raise ValueError(
            f"bias must have shape (O) = ({filters},) or ({axis}, O) = ({n}, {filters}), got {tuple(bias.shape)}"
        )
    if bias is not None and bias.dim() == 2 and attentions.kernel is None and not per_sample:
        raise ValueError(f"bias of shape (n, O) = ({n}, {filters}) is mixed by kernel, which is None")


def is_exporting() -> bool:
    """Return whether torch.export or torch.jit.trace, or an exporter built on them, is at work: sizes may be open."""
    return torch.compiler.is_exporting() or is_traced()


def is_traced() -> bool:
    """Return whether torch.jit.trace or the ONNX exporter that is built on it is at work."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exported_sample(x: Tensor) -> bool:
    """Return whether torch.export is tracing for a batch that is always one."""
    return torch.compiler.is_exporting() and surely(x.shape[0] == 1)


def surely(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes holds, whatever sizes torch.export leaves open."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return statically_known_true(condition)


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jacrev, ...) or forward AD is at work, which only plain PyTorch follows."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels at each position of a map lie next to each other in memory."""
    return x.movedim(1, -1).is_contiguous()


def output_size(
    map_size: Sequence[int], taps: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return the map that a convolution makes of a map, one number an axis each."""
    spans = zip(map_size, taps, stride, padding, dilation, strict=True)
    return tuple((extent + 2 * p - d * (k - 1) - 1) // s + 1 for extent, k, s, p, d in spans)


def check_map(x: Tensor, taps: tuple[int, ...], geometry: Geometry) -> None:
    """Raise a ValueError where the padded map of x is smaller than the kernel."""
    for extent, k, _, p, d in zip(x.shape[2:], taps, *geometry[:3], strict=True):
        if extent + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"x must have a map of at least the kernel's span, {taps} with dilation {geometry.dilation}, "
                f"after padding {geometry.padding}, got {tuple(x.shape)}"
            )
