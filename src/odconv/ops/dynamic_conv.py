"""The operator's contract, and its two halves: mixing a kernel for each sample, and convolving each with its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.ops import cpu, eager, flops, traced, tuning
from odconv.ops.contract import Attentions, Geometry, check_map, check_shapes, per_axis
from odconv.ops.cpu import samples
from odconv.ops.epilogue import NO_EPILOGUE, Epilogue, Finished, activate, finish
from odconv.ops.policy import (
    EAGER,
    choose,
    is_better_unrounded,
    is_differentiated,
    is_pointwise,
    log_choice,
    reach_of,
)
from odconv.ops.recompute import recomputed
from odconv.ops.reference import reference
from odconv.ops.triton import triton_conv
from odconv.ops.tuning.problem import Call

BACKENDS = {
    "reference": reference,
    "cpu": cpu.convolve,
    "samples": samples.convolve,
    "triton": triton_conv,
    "single": eager.single,
    "shared": eager.shared,
    "product": eager.product,
    "pointwise": eager.pointwise,
    "grouped": eager.grouped,
    "traced": traced.convolve,
}
PER_SAMPLE = {name: run for name, run in BACKENDS.items() if name not in ("shared", "samples")}
PER_SAMPLE["traced"] = traced.convolve_per_sample


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
        backend: "auto" chooses by shape and device, on CUDA by measuring. A named one is strict: "reference" (the
            definition, a loop), "single" (B = 1 only), "shared", "product", "pointwise" (one tap) or "grouped"
            (B > 0), described in :mod:`odconv.ops.eager`; "cpu" (compiled C++); "samples" (compiled C++ for few
            positions, without groups); "triton" (CUDA, 1-d and 2-d); "traced" (for torch.jit.trace).

    Returns:
        (B, O, *map), in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: an argument's shape or value does not fit; the message names it and what is expected.
        TypeError: x and weight differ in dtype outside autocast.
    """
    attentions = Attentions(kernel, spatial, channel, filter)
    check_shapes(x, weight, attentions, bias, groups)
    x, geometry = checked_geometry(x, tuple(weight.shape[3:]), stride, padding, dilation, groups)
    return compute(x, weight, attentions, mixed_bias(bias, kernel), geometry, backend)


def per_sample_conv(
    x: Tensor,
    weight: Tensor,
    *,
    channel: Tensor | None = None,
    filter: Tensor | None = None,
    spatial: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve each sample with a kernel of its own, in 1, 2 or 3 dimensions.

    ``y[b] = filter[b] * conv(channel[b] * x[b], spatial[b] * weight[b]) + bias``: the second half of
    :func:`dynamic_conv`, for kernels that come from elsewhere. An attention that is None counts as ones. For kernels
    that are mixed of others, :func:`mixed_conv` keeps what they are mixed of instead of the kernels themselves.

    Args:
        x: input, (B, C, L), (B, C, H, W) or (B, C, D, H, W); any memory format; B may be 0.
        weight: a kernel for each sample, (B, O, C/groups, *kernel_size).
        channel: weight of each input channel, (B, C).
        filter: weight of each output filter, (B, O).
        spatial: weight of each tap, (B, *kernel_size).
        bias: (O), or (B, O), one for each sample; added after `filter`.
        stride: step of the kernel, an int or one an axis.
        padding: zeros added on both sides, an int, one an axis, "valid" (none) or "same" (output as large as x).
        dilation: distance between taps, an int or one an axis.
        groups: blocks of channels and filters that are convolved apart; divides C and O.
        backend: "auto" chooses by shape and device; a named one is strict, as in :func:`dynamic_conv`, whose backends
            all take kernels per sample but "shared" and "samples".

    Returns:
        (B, O, *map), in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: an argument's shape or value does not fit; the message names it and what is expected.
        TypeError: x and weight differ in dtype outside autocast.
    """
    attentions = Attentions(None, spatial, channel, filter)
    check_shapes(x, weight, attentions, bias, groups, per_sample=True)
    x, geometry = checked_geometry(x, tuple(weight.shape[3:]), stride, padding, dilation, groups)
    return compute(x, weight, attentions, bias, geometry, backend, per_sample=True)


def checked_geometry(
    x: Tensor,
    taps: tuple[int, ...],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Geometry]:
    """Return x, padded where "same" wants more at one side, and how the kernel moves over it.

    Raises:
        ValueError: an argument is out of range, or the map is smaller than the kernel.
    """
    steps = per_axis("stride", stride, len(taps), least=1)
    spread = per_axis("dilation", dilation, len(taps), least=1)
    if isinstance(padding, str):
        x, margin = pad_by_name(x, padding, taps, steps, spread)
    else:
        margin = per_axis("padding", padding, len(taps), least=0)
    geometry = Geometry(steps, margin, spread, groups)
    check_map(x, taps, geometry)
    return x, geometry


def compute(
    x: Tensor,
    weight: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str = "auto",
    per_sample: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
    packed: Tensor | None = None,
) -> Tensor:
    """Compute :func:`dynamic_conv`, or :func:`per_sample_conv`, of arguments that fit: layers, which check theirs.

    A bias is one of all samples, (O), or one of each, (B, O). What `packed` holds is the weight, as
    :func:`odconv.ops.cpu.pack` makes it, for inference.
    """
    flops.watch()
    dtype = compute_dtype(x, weight)
    differentiated = is_differentiated(x, weight, *attentions)
    n = None if per_sample else weight.shape[0]
    if differentiated and backend == "auto" and is_better_unrounded(x, weight, geometry, n, dtype):
        with torch.autocast(x.device.type, enabled=False):
            y = compute(x.float(), weight, attentions, bias, geometry, per_sample=per_sample, epilogue=epilogue)
        return y.to(dtype)
    if backend == "auto" and (reach := reach_of(x, weight, geometry, n, dtype, differentiated)):
        weight, geometry, packed = reach.cut(weight, 3).contiguous(), reach.geometry, None
        if attentions.spatial is not None:
            attentions = attentions._replace(spatial=reach.cut(attentions.spatial, 1))
    if x.dtype != dtype or weight.dtype != dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    if backend == "auto":
        choice = choose(x, weight, geometry, differentiated, per_sample)
        if tuning.applies(x, weight, x.device):
            call = Call(x, weight, in_dtype(attentions, dtype), geometry, differentiated, per_sample)
            choice = tuning.tuned(choice, call, compute_by)
        log_choice(choice, x, weight)
        backend = choice.backend
    else:
        check_backend(backend, x, weight, geometry, per_sample)
    attentions = in_dtype(attentions, torch.promote_types(dtype, torch.float32) if backend == "cpu" else dtype)
    bias = None if bias is None else bias.to(dtype)
    packed = packed if packed is not None and packed.dtype == dtype else None
    if backend == "cpu" and (epilogue.activation or packed is not None) and not torch.is_grad_enabled():
        activation = epilogue.activation or "none"
        y, found = cpu.convolve_fused(x, weight, attentions, geometry, bias, activation, epilogue.means, packed)
        return finish(y, Finished(epilogue.activation, found)) if epilogue.activation else y
    if backend == "cpu":  # which adds the bias to what it writes
        return activate(cpu.convolve(x, weight, attentions, geometry, bias), epilogue)
    y = compute_by(backend, x, weight, attentions, geometry, differentiated, per_sample)
    return activate(add_bias(y, bias), epilogue)


def in_dtype(attentions: Attentions, dtype: torch.dtype) -> Attentions:
    """Return attentions in a dtype, those that have it as they are."""
    return Attentions(*(a if a is None or a.dtype == dtype else a.to(dtype) for a in attentions))


def compute_by(
    backend: str,
    x: Tensor,
    weight: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    differentiated: bool,
    per_sample: bool,
) -> Tensor:
    """Compute the output without its bias by a backend, which keeps no mixed kernel for the gradients."""
    run = (PER_SAMPLE if per_sample else BACKENDS)[backend]
    if backend in EAGER and differentiated:
        return recomputed(run, x, weight, attentions, geometry, per_sample)
    return run(x, weight, attentions, geometry)


def check_backend(backend: str, x: Tensor, weight: Tensor, geometry: Geometry, per_sample: bool) -> None:
    """Raise a ValueError unless there is a backend of that name for such a call."""
    backends = PER_SAMPLE if per_sample else BACKENDS
    if backend not in backends:
        raise ValueError(f"backend must be 'auto' or one of {sorted(backends)}, got {backend!r}")
    if backend == "single" and x.shape[0] != 1:
        raise ValueError(f"backend 'single' needs a batch of one, got x of shape {tuple(x.shape)}")
    if backend == "grouped" and x.shape[0] == 0:
        raise ValueError(f"backend 'grouped' needs at least one sample, got x of shape {tuple(x.shape)}")
    if backend == "pointwise" and not is_pointwise(weight, geometry):
        raise ValueError(
            "backend 'pointwise' needs kernels of one tap without groups and padding, got weight of shape "
            f"{tuple(weight.shape)}, groups {geometry.groups} and padding {geometry.padding}"
        )


def mixed_bias(bias: Tensor | None, kernel: Tensor | None) -> Tensor | None:
    """Return a bias as what is added to all samples, (O), or to each, (B, O): one of (n, O) is mixed by `kernel`."""
    return bias if bias is None or bias.dim() == 1 or kernel is None else kernel @ bias.to(kernel.dtype)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y plus a bias, (O) or (B, O), in y's dtype."""
    return y if bias is None else y + eager.over_map(bias.to(y.dtype) if bias.dim() == 2 else bias.to(y.dtype)[None], y)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype to convolve in: autocast's where it is on, else the one that x and weight share."""
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
