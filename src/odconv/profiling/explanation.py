"""What the operator does for a layer: which backend, why, and what it costs."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from odconv.layers import DynamicConv, PerSampleConv
from odconv.layers.transposed import DynamicConvTranspose
from odconv.layers.warehouse_conv import KWConv
from odconv.ops import cpu, flops, tuning
from odconv.ops.cells import BY_TILES
from odconv.ops.contract import Attentions, Geometry, check_map, output_size
from odconv.ops.dynamic_conv import compute_dtype
from odconv.ops.mixing import part_of_batch
from odconv.ops.policy import Choice, choose, choose_transposed, reach_of
from odconv.ops.recompute import samples_at_a_time
from odconv.ops.tuning.memory import memory_of
from odconv.ops.tuning.problem import describe


class Explanation(NamedTuple):
    """What the operator does for a layer; ``print`` shows it.

    Attributes:
        backend: name of the backend that is chosen; see docs/layers.md.
        why: the reason, in a sentence.
        multiply_adds: of the convolution, of mixing, and of the other attentions.
        bytes: least that is read and written: the input, all kernels or cells, the attentions and the output.
        workspace: bytes of mixed kernels or columns that the backend makes in memory besides, for the whole batch;
            0 where they stay in the processor's cache, or none are made.
        milliseconds: of each backend that was timed, where the backend was chosen by measuring; else empty.
    """

    backend: str
    why: str
    multiply_adds: int
    bytes: int
    workspace: int
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        """Return two lines."""
        return (
            f"{self.backend}: {self.why}\n{self.multiply_adds / 1e6:.1f} M multiply-adds, {self.bytes / 1e6:.2f} MB "
            f"read and written, {self.workspace / 1e6:.2f} MB of kernels or columns made"
        )


def explain(
    layer: PerSampleConv,
    shape: Sequence[int],
    *,
    training: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Explanation:
    """Say which backend computes a layer for inputs of a shape, why, and what that costs; computes nothing.

    Device and dtype are those of the layer's kernels, or autocast's dtype under autocast. On CUDA the reason is the
    times that the first call of such a shape, or :func:`tune`, measured; before that, it is the policy's.

    Args:
        layer: any dynamic layer.
        shape: shape of the input, (B, C, *map).
        training: whether gradients are wanted.
        memory_format: of the input, such as ``torch.channels_last``.

    Returns:
        The backend, the reason and the costs.

    Raises:
        TypeError: layer is not dynamic.
        ValueError: shape is none that the layer takes.
    """
    if not isinstance(layer, PerSampleConv):
        raise TypeError(f"layer must be a dynamic layer, got {type(layer).__name__}")
    if len(shape) != layer.dims + 2 or shape[1] != layer.in_channels or min(shape) < 0:
        raise ValueError(f"shape must be (B, {layer.in_channels}, *map) with {layer.dims} axes of map, got {shape}")
    parts, (batch, channels, *_) = layer.parts, shape
    dtype = compute_dtype(parts.new_empty(0), parts)
    x = torch.empty(shape, dtype=dtype, device="meta")
    times: dict[str, float] = {}
    gates: dict[str, tuple[int, ...]] = {}
    if isinstance(layer, DynamicConv):
        gates = {name: (batch, *size) for name, size in layer.attention.heads.items()}
    if isinstance(layer, DynamicConvTranspose):
        choice = choose_transposed(x)
        y = transposed_shape(layer, shape)
    else:
        x, geometry = layer.padded(x)
        check_map(x, layer.kernel_size, geometry)
        y = (batch, layer.out_channels, *output_size(x.shape[2:], layer.kernel_size, *geometry[:3]))
        device = parts.device if parts.device.type == "cpu" else "meta"
        like = torch.empty(x.shape, dtype=dtype, device=device, memory_format=memory_format)
        if isinstance(layer, KWConv):
            return explain_mixing(layer, like, geometry, shape, y, training)
        choice, times = chosen(like, parts, parts.device, gates, geometry, training)
    assert isinstance(layer, DynamicConv)
    weight = layer.weight
    named = [gates.get(name) for name in ("kernel", "spatial", "channel", "filter")]
    numbers = math.prod(shape) + weight.numel() + math.prod(y) + sum(math.prod(gate) for gate in gates.values())
    # a transposed convolution meets its input as an ordinary one meets its output
    met = shape if layer.transposed else y
    one = weight[0].numel()
    made = {
        "single": one,
        "grouped": batch * one,
        "pointwise": batch * one,
        "product": batch * channels * math.prod(layer.kernel_size) * math.prod(y[2:]),
        "dense": batch * math.prod(y[:2]) * math.prod(layer.kernel_size) * math.prod(shape[2:]),
    }
    if "spatial" in gates:
        made["shared"] = made["product"]
    return Explanation(
        choice.backend,
        choice.why,
        flops.forward(tuple(shape), tuple(weight.shape), *named, out_shape=tuple(met)) // 2,
        numbers * dtype.itemsize,
        made.get(choice.backend, 0) * dtype.itemsize,
        times,
    )


def chosen(
    x: torch.Tensor,
    weight: torch.Tensor,
    device: torch.device,
    attentions: Iterable[str],
    geometry: Geometry,
    differentiated: bool,
    per_sample: bool = False,
) -> tuple[Choice, dict[str, float]]:
    """Return what the operator chooses for a call on a device, and the times that were measured for it."""
    n = None if per_sample else weight.shape[0]
    if reach := reach_of(x, weight, geometry, n, x.dtype, differentiated):
        weight, geometry = reach.cut(weight, 3), reach.geometry
    choice = choose(x, weight, geometry, differentiated, per_sample)
    if reach:
        choice = choice._replace(why=f"{tuple(weight.shape[3:])} taps meet more than padding; {choice.why}")
    if not tuning.applies(x, weight, device):
        return choice, {}
    present = [name for name in Attentions._fields if name in attentions]
    problem = describe(x, weight, present, geometry, differentiated, per_sample)
    known = memory_of(device).recall(problem)
    if known is None:
        return choice._replace(why=f"{choice.why}; not measured yet"), {}
    return known


def explain_mixing(
    layer: KWConv, x: torch.Tensor, geometry: Geometry, shape: Sequence[int], y: Sequence[int], training: bool
) -> Explanation:
    """Say it for a layer whose kernels are mixed of cells, by tiles, or a few samples' before they are convolved with.

    Args:
        layer: the layer.
        x: its padded input.
        geometry: of what is left to do.
        shape: of its input.
        y: shape of its output.
        training: whether gradients are wanted.
    """
    assert layer.attention is not None
    one, (pieces, _, cells, _) = math.prod(layer.kernel_shape), layer.attention.place
    some = samples_at_a_time(x, one, math.prod(layer.kernel_size)) if training else part_of_batch(x, one)
    x = x[: min(some, len(x))]
    kernels = x.new_empty(()).expand(len(x), *layer.kernel_shape)
    # the backward pass is the mixing operator's own
    choice, times = chosen(x, kernels, layer.parts.device, (), geometry, False, per_sample=True)
    made = len(x) * one
    if cpu.fits_cells(x, layer.cells, x.dtype, layer.groups):
        choice, times, made = BY_TILES, {}, made * training  # of whole kernels are the gradients alone
    convolution, mixing = math.prod(y) * math.prod(layer.kernel_shape[1:]), len(pieces) * layer.cells.numel()
    numbers = math.prod(shape) + layer.cells.numel() + shape[0] * len(pieces) * cells + math.prod(y)
    return Explanation(
        choice.backend,
        choice.why,
        convolution + shape[0] * mixing,
        numbers * x.element_size(),
        made * x.element_size(),
        times,
    )


def transposed_shape(layer: DynamicConvTranspose, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a transposed layer's output."""
    axes = zip(
        shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding, strict=True
    )
    size = [(extent - 1) * s - 2 * p + d * (k - 1) + e + 1 for extent, k, s, p, d, e in axes]
    return (shape[0], layer.out_channels, *size)
