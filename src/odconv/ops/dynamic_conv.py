"""The operator's contract and the choice of its form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.ops import cpu, eager, flops, traced
from odconv.ops.contract import (
    Attentions,
    Geometry,
    check_map,
    check_shapes,
    is_exported_sample,
    is_exporting,
    is_traced,
    is_transformed,
    per_axis,
    surely,
)
from odconv.ops.recompute import recomputed
from odconv.ops.reference import reference
from odconv.ops.triton import triton_conv

BACKENDS = {
    "reference": reference,
    "cpu": cpu.convolve,
    "triton": triton_conv,
    "single": eager.single,
    "shared": eager.shared,
    "product": eager.product,
    "grouped": eager.grouped,
    "traced": traced.convolve,
}
EAGER = ("single", "shared", "product", "grouped")  # what autograd would differentiate by keeping every mixed kernel


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    *,
    kernel: Tensor | None = None,
    spatial: Tensor | None = None,
    channel: Tensor | None = None,
    filter: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve each sample with its own mixture of n kernels, in 1, 2 or 3 dimensions.

    ``y[b] = filter[b] * conv(channel[b] * x[b], sum_i kernel[b, i] * (spatial[b] * weight[i])) + bias``,
    the operator of ODConv (Li et al., ICLR 2022) and, with `kernel` alone, of CondConv and DyConv. An attention
    that is None counts as ones.

    Args:
        x: input, (B, C, L), (B, C, H, W) or (B, C, D, H, W); any memory format; B may be 0.
        weight: the n kernels, (n, O, C/groups, *kernel_size).
        kernel: share of each kernel, (B, n); may be None only for n = 1.
        spatial: weight of each tap, (B, *kernel_size).
        channel: weight of each input channel, (B, C).
        filter: weight of each output filter, (B, O).
        bias: (O), added after `filter`, or (n, O), mixed by `kernel` and then added.
        stride: step of the kernel, an int or one an axis.
        padding: zeros added on both sides, an int, one an axis, "valid" (none) or "same" (output as large as x).
        dilation: distance between taps, an int or one an axis.
        groups: blocks of channels and filters that are convolved apart; divides C and O.
        backend: "auto" chooses the form by shape and device. A named form is strict: "reference" (the definition, a
            loop), "single" (B = 1 only), "shared", "product" or "grouped" (B > 0), described in
            :mod:`odconv.ops.eager`; "cpu" (float32 and float64, compiled C++); "triton" (CUDA, 1-d and 2-d); "traced"
            (for torch.jit.trace).

    Returns:
        (B, O, *map), in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: an argument's shape or value does not fit; the message names it and what is expected.
        TypeError: x and weight differ in dtype outside autocast.
    """
    attentions = Attentions(kernel, spatial, channel, filter)
    check_shapes(x, weight, attentions, bias, groups)
    dims = weight.dim() - 3
    taps = tuple(weight.shape[3:])
    steps = per_axis("stride", stride, dims, least=1)
    spread = per_axis("dilation", dilation, dims, least=1)
    if isinstance(padding, str):
        x, margin = pad_by_name(x, padding, taps, steps, spread)
    else:
        margin = per_axis("padding", padding, dims, least=0)
    geometry = Geometry(steps, margin, spread, groups)
    check_map(x, taps, geometry)
    return compute(x, weight, attentions, bias, geometry, backend)


def compute(
    x: Tensor, weight: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry, backend: str = "auto"
) -> Tensor:
    """What :func:`dynamic_conv` computes, of arguments that fit: what a layer, which has checked its own, calls."""
    flops.watch()
    dtype = compute_dtype(x, weight)
    if x.dtype != dtype or weight.dtype != dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    attentions = Attentions(*(a if a is None or a.dtype == dtype else a.to(dtype) for a in attentions))

    differentiated = is_differentiated(x, weight, *attentions)
    if backend == "auto":
        backend = "traced" if is_traced() else choose(x, weight, geometry, differentiated)
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    elif backend == "single" and x.shape[0] != 1:
        raise ValueError(f"backend 'single' needs a batch of one, got x of shape {tuple(x.shape)}")
    elif backend == "grouped" and x.shape[0] == 0:
        raise ValueError(f"backend 'grouped' needs at least one sample, got x of shape {tuple(x.shape)}")
    form = BACKENDS[backend]
    if backend in EAGER and differentiated:
        y = recomputed(form, x, weight, attentions, geometry)
    else:
        y = form(x, weight, attentions, geometry)

    return add_bias(y, bias, attentions.kernel)


def add_bias(y: Tensor, bias: Tensor | None, kernel: Tensor | None) -> Tensor:
    """y plus a bias, (O), or (n, O) mixed by `kernel`, in y's dtype."""
    if bias is None:
        return y
    bias = bias.to(y.dtype)
    if bias.dim() == 2 and kernel is not None:
        return y + eager.over_map(kernel @ bias, y)
    return y + bias.view(-1, *(1,) * (y.dim() - 2))


def choose(x: Tensor, weight: Tensor, geometry: Geometry, differentiated: bool) -> str:
    """The name of the cheapest form for these shapes; rows of benchmarks/results/layers_*.csv set the limits."""
    batch, n, filters = x.shape[0], weight.shape[0], weight.shape[1] // geometry.groups
    positions = math.prod(x.shape[2:]) // math.prod(geometry.stride)
    small = positions < filters
    dense = "shared" if n == 1 else "product"
    if is_exported_sample(x):
        # the gates of the taps are then multiplied with columns, which are fewer than the numbers of a kernel
        return dense if math.prod(weight.shape[3:]) > 1 and surely(small) else "single"
    if is_exporting() or batch == 0:  # exported, one graph serves every batch, which may be no number of groups then
        return dense
    if n * positions > 1 and cpu.fits(x, weight, geometry):  # one kernel in one position is a plain matrix product
        # A single 1x1 kernel can do without a kernel per sample: a small map is scaled instead.
        scaled = n == math.prod(weight.shape[3:]) == geometry.groups == 1 and (batch > 1 or weight.numel() >= 2**20)
        return "shared" if scaled and small and not differentiated else "cpu"
    # Mixed kernels cost |W| a sample and columns C * k * L: a map is unfolded where it has fewer positions than a group
    # has filters. A depth-wise kernel has one filter a group, so it never is.
    if batch == 1:
        return "shared" if n == 1 and small else "single"
    if not small:
        return "grouped"
    return "shared" if n * positions <= 64 else dense  # so few products cost less than mixing a kernel for each sample


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd will want gradients of these; a compiled or exported graph decides itself what to keep."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted and not (torch.compiler.is_compiling() or is_exporting() or is_transformed())


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype to convolve in: autocast's where it is on, else the one that x and weight share."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if x.dtype != weight.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    return x.dtype


def pad_by_name(
    x: Tensor, padding: str, taps: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """x and the symmetric padding left to do; an even span under "same" is padded here, one more zero at the end."""
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return x, (0,) * len(taps)
    if any(s != 1 for s in stride):
        raise ValueError(f"padding 'same' needs stride 1, got {stride}")
    total = [d * (k - 1) for k, d in zip(taps, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, tuple(t // 2 for t in total)
    return F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)]), (0,) * len(taps)
