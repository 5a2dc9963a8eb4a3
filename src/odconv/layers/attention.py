"""The attention that weights each sample's mixture of kernels, and its temperature."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odconv.layers.starts import check_start, draw_calm, draw_published
from odconv.ops import cpu
from odconv.ops.contract import Attentions, is_exporting

NORMS = ("batch", "group", "layer", "none")
Pointwise = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
POINTWISE: dict[int, type[Pointwise]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Attention(nn.Module):
    """Global average pool, a hidden layer, and one head for each attention.

    Args:
        dims: number of spatial axes of the input, 1, 2 or 3.
        in_channels: channels of the input.
        heads: shape of each attention but for the batch, by name ("channel", "filter", "spatial", "kernel").
        hidden: width of the hidden layer (fc, norm, ReLU); None for heads directly on the pooled input.
        norm: normalisation of the hidden layer: "batch", "group", "layer" or "none".
        kernel_gate: what makes shares of the kernel head's logits: "softmax" or "sigmoid".
        gain: factor of the other gates, above 0: with 2, a head of zeros gives gates of exactly 1.
        kernel_gain: factor of the shares, above 0: with sqrt(n), a mixture of n new kernels is as large as one.
        temperature: divisor of every logit, above 0; None for a method that has none.
        init: how the parameters are drawn, "calm" or "published"; see :mod:`odconv.layers.starts`.
        device: where the parameters live.
        dtype: dtype of the parameters. The attention is computed in at least float32 whatever it is.

    The `fc` and the heads are 1x1 convolutions only to keep the keys and shapes of published checkpoints.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        heads: dict[str, tuple[int, ...]],
        hidden: int | None,
        norm: str = "none",
        kernel_gate: str = "softmax",
        gain: float = 1.0,
        kernel_gain: float = 1.0,
        temperature: float | None = 1.0,
        init: str = "calm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        check_start(init)
        self.dims = dims
        self.heads = heads
        self.norm = norm
        self.kernel_gate = kernel_gate
        self.init = init
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc: Pointwise | None = None
        self.bn: nn.Module | None = None  # so named in published checkpoints, whatever norm it is
        width = in_channels
        if hidden is not None and heads:
            self.fc = POINTWISE[dims](in_channels, hidden, 1, bias=False, **placed)
            if norm == "batch":
                self.bn = BATCH_NORM[dims](hidden, **placed)
            elif norm != "none":  # on a vector, layer norm is group norm with one group
                self.bn = nn.GroupNorm(math.gcd(hidden, 4) if norm == "group" else 1, hidden, **placed)
            width = hidden
        for name, shape in heads.items():
            setattr(self, f"{name}_fc", POINTWISE[dims](width, math.prod(shape), 1, **placed))
        self.temperature: Tensor | None
        self.register_buffer("temperature", None, persistent=False)
        self._temperature = temperature  # what the buffer holds, for when it is made anew
        self._place_temperature(device)
        self.register_load_state_dict_post_hook(place_temperature)
        self.factors: Tensor | None
        self.register_buffer("factors", None)
        self.set_factors(gain, kernel_gain)
        self.register_load_state_dict_pre_hook(take_factors)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as `init` says."""
        if isinstance(self.bn, BatchNorm | nn.GroupNorm):
            self.bn.reset_parameters()
        (draw_calm if self.init == "calm" else draw_published)(self)

    def linear_layers(self) -> list[Pointwise]:
        """The hidden layer, where there is one, and the heads."""
        return [module for module in self.children() if isinstance(module, Pointwise)]

    def set_factors(self, gain: float, kernel_gain: float) -> None:
        """Multiply the gates by `gain` and the shares by `kernel_gain` from now on.

        Other factors than the published ones, 1 and 1, are a buffer too, so that no state dict is without them.

        Raises:
            ValueError: a factor is not a positive, finite number.
        """
        for name, value in (("gain", gain), ("kernel_gain", kernel_gain)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        self.gain, self.kernel_gain = float(gain), float(kernel_gain)
        self._place_factors(self.temperature.device if self.temperature is not None else None)

    def set_temperature(self, value: float) -> None:
        """Divide every logit by `value` from now on; a method without a temperature keeps none.

        Args:
            value: the temperature, above 0; large values make all attentions alike.

        Raises:
            ValueError: value is not a positive, finite number.
        """
        check_temperature(value)
        if self.temperature is not None:
            self._temperature = float(value)
            self.temperature.fill_(value)  # in place: a compiled network reads the new value without recompiling

    def forward(self, x: Tensor) -> Attentions:
        """The attentions of each sample in x, (B, C, *map), in float32 or float64."""
        if not self.heads:
            return Attentions()
        fused = fused_attention(self, x)
        if fused is not None:
            return fused
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            dtype = torch.promote_types(x.dtype, torch.float32)
            z = x.mean(tuple(range(2, x.dim())), dtype=dtype)
            if self.fc is not None:
                z = self._normalise(pointwise(self.fc, z)).relu()
            return Attentions(**{name: self._gate(name, z) for name in self.heads})

    def _gate(self, name: str, z: Tensor) -> Tensor:
        logits = pointwise(getattr(self, f"{name}_fc"), z)
        if self.temperature is not None:
            logits = logits / self.temperature
        if name == "kernel":
            shares = logits.softmax(1) if self.kernel_gate == "softmax" else logits.sigmoid()
            return shares if self.factors is None else self.kernel_gain * shares
        gate = logits.sigmoid() if self.factors is None else self.gain * logits.sigmoid()
        return gate.reshape(-1, *self.heads[name])  # unflatten would fix the batch in PyTorch's older ONNX exporter

    def _normalise(self, z: Tensor) -> Tensor:
        """The hidden layer's norm, computed in z's dtype."""
        norm = self.bn
        if norm is None:
            return z
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(z, norm.num_groups, norm.weight.to(z.dtype), norm.bias.to(z.dtype), norm.eps)
        maps = z.reshape(*z.shape, *(1,) * self.dims)
        if isinstance(norm, BatchNorm) or (isinstance(norm, nn.SyncBatchNorm) and not norm.training):
            return batch_norm(norm, maps).flatten(1)
        # what the user put in its place, or SyncBatchNorm with its own rule for small batches
        return norm(maps).flatten(1)

    def _place_temperature(self, device: torch.device | str | None) -> None:
        if self._temperature is not None:
            check_temperature(self._temperature)
            self.temperature = torch.full((), self._temperature, dtype=torch.float32, device=device)

    def _place_factors(self, device: torch.device | str | None) -> None:
        factors = (self.gain, self.kernel_gain)
        self.factors = None if factors == (1, 1) else torch.tensor(factors, dtype=torch.float64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)
        if self.temperature is not None:  # stays float32 through .half(), and keeps its value through .to_empty()
            self._place_temperature(self.temperature.device)
        if self.factors is not None:
            self._place_factors(self.factors.device)
        return self


def place_temperature(attention: Attention, incompatible_keys: Any) -> None:
    """After loading: ``load_state_dict(assign=True)`` may have brought a meta module to a device."""
    if attention.heads:
        attention._place_temperature(next(attention.parameters()).device)


def fused_attention(attention: Attention, x: Tensor) -> Attentions | None:
    """The attentions without gradients on the CPU, in one step where the compiled kernel has one; else None."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_exporting() or not cpu.takes(x):
        return None
    norm, layers = attention.bn, [getattr(attention, f"{name}_fc") for name in attention.heads]
    plain = norm is None or (isinstance(norm, BatchNorm) and not norm.training and norm.running_mean is not None)
    if not plain:
        return None
    statistics = [] if norm is None else [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    fc = None if attention.fc is None else attention.fc.weight
    own: list[Any] = [*statistics, *weights, *biases, *([] if fc is None else [fc])]
    if any(tensor is None or tensor.dtype != x.dtype or not tensor.is_contiguous() for tensor in own):
        return None
    gates = torch.ops.odconv.attend(
        x.mean(tuple(range(2, x.dim()))).contiguous(),
        fc,
        statistics,
        0.0 if norm is None else norm.eps,
        weights,
        biases,
        [attention.gain if name != "kernel" else float(attention.kernel_gate == "sigmoid") for name in attention.heads],
        attention.temperature,
    )
    shapes = attention.heads.values()
    found = {n: g.view(-1, *s) for n, g, s in zip(attention.heads, gates, shapes, strict=True)}
    if "kernel" in found and attention.factors is not None:
        found["kernel"] = attention.kernel_gain * found["kernel"]
    return Attentions(**found)


def take_factors(attention: Attention, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Take the factors that these weights were trained with; a state dict without them is a published one.

    Version 0.1.0 noted the gain in the metadata instead.
    """
    key = f"{prefix}factors"
    if key in state and state[key].shape == (2,) and not state[key].is_meta:
        attention.set_factors(*state[key].tolist())
        if attention.factors is None:
            del state[key]
    elif "gain" in metadata:
        attention.set_factors(metadata["gain"], 1.0)
        if attention.factors is not None:
            state[key] = attention.factors


def pointwise(layer: Pointwise, z: Tensor) -> Tensor:
    """A 1x1 convolution applied to vectors, (B, C) -> (B, O), with its parameters cast to z's dtype."""
    bias = None if layer.bias is None else layer.bias.to(z.dtype)
    return F.linear(z, layer.weight.flatten(1).to(z.dtype), bias)


def batch_norm(bn: BatchNorm | nn.SyncBatchNorm, z: Tensor) -> Tensor:
    """``bn(z)`` in z's dtype; one sample has no variance, so it is normalised by the running statistics."""
    by_batch = bn.training and z.shape[0] > 1
    if bn.weight.dtype == z.dtype and (by_batch or not bn.training):
        return bn(z)
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "norm without running statistics cannot normalise a batch of one, nor compute in another dtype"
        )
    mean, var = bn.running_mean.to(z.dtype), bn.running_var.to(z.dtype)
    momentum = 0.1 if bn.momentum is None else bn.momentum
    z = F.batch_norm(z, mean, var, bn.weight.to(z.dtype), bn.bias.to(z.dtype), by_batch, momentum, bn.eps)
    if by_batch:  # the statistics were updated in copies
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
    return z


def check_temperature(value: float) -> None:
    """Raise a ValueError unless `value` can divide logits."""
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be a positive number, got {value!r}")


def set_temperature(model: nn.Module, value: float) -> None:
    """Set the temperature of every attention in a network (ODConv and DyConv; CondConv has none).

    Args:
        model: any module; one without dynamic layers is left as it is.
        value: the temperature, above 0. The published schedule falls from 30 to 1 over the first ten epochs.

    Raises:
        ValueError: value is not a positive, finite number.
    """
    check_temperature(value)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_temperature(value)
