"""The attention that weights each sample's mixture of kernels, and its temperature."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from odconv.layers.parts import (
    BATCH_NORM,
    POINTWISE,
    BatchNorm,
    Pointwise,
    call_in_dtype,
    cast,
    is_plain,
    normalise_one,
)
from odconv.layers.pooling import PoolingAttention, has_compiled_kernel, pool
from odconv.layers.starts import check_start, draw_calm, draw_published
from odconv.ops import cpu
from odconv.ops.contract import Attentions, is_traced
from odconv.ops.epilogue import finished
from odconv.system.modules import check_module

NORMS = ("batch", "group", "layer", "none")


class Attention(PoolingAttention):
    """Global average pool, a hidden layer, and one head for each attention.

    Args:
        dims: number of spatial axes of the input, 1, 2 or 3.
        in_channels: channels of the input.
        heads: shape of each attention but for the batch, by name ("channel", "filter", "spatial", "kernel").
        hidden: width of the hidden layer (fc, norm, ReLU); None for heads directly on the pooled input.
        norm: normalisation of the hidden layer, or of the pooled input where there is none: "batch", "group", "layer"
            or "none".
        kernel_gate: what makes shares of the kernel head's logits: "softmax" or "sigmoid".
        gain: factor of the other gates, above 0: with 2, a head of zeros gives gates of exactly 1.
        kernel_gain: factor of the shares, above 0: with sqrt(n), a mixture of n new kernels is as large as one.
        temperature: divisor of every logit, above 0; None for a method that has none.
        init: how the parameters are drawn, "calm" or "published"; see :mod:`odconv.layers.starts`.
        device: where the parameters live.
        dtype: dtype of the parameters. The attention is computed in at least float32 whatever it is.

    The `fc` and the heads are 1x1 convolutions only to keep the keys and shapes of published checkpoints.

    Attributes:
        takes_means: whether the layer before leaves the means of its maps beside them, in a network that
            :func:`odconv.fuse` fused.
    """

    takes_means: bool = False

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
            width = hidden
        if heads and norm == "batch":
            self.bn = BATCH_NORM[dims](width, **placed)
        elif heads and norm != "none":  # on a vector, layer norm is group norm with one group
            self.bn = nn.GroupNorm(math.gcd(width, 4) if norm == "group" else 1, width, **placed)
        for name, shape in heads.items():
            setattr(self, f"{name}_fc", POINTWISE[dims](width, math.prod(shape), 1, **placed))
        self.initial_temperature = temperature if heads else None
        self.temperature: Tensor | None
        self.register_buffer("temperature", self._new_temperature(device))
        self.register_load_state_dict_pre_hook(fill_in_temperature)
        self.factors: Tensor | None
        self.register_buffer("factors", None)
        self.set_factors(gain, kernel_gain)
        self.register_load_state_dict_pre_hook(take_factors)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as `init` says, and go back to the first temperature and statistics.

        All by functions of torch.nn.init, of which programs such as transformers except tensors that they have loaded.
        """
        if isinstance(self.bn, _BatchNorm | nn.GroupNorm):
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                if isinstance(tensor := getattr(self.bn, name, None), Tensor):
                    nn.init.constant_(tensor, 1.0 if name in ("weight", "running_var") else 0.0)
        if self.temperature is not None and self.initial_temperature is not None:
            nn.init.constant_(self.temperature, self.initial_temperature)
        if self.factors is not None:
            self._place_factors(self.factors.device)
        for part in self.children():
            part.reset_parameters = leave_as_drawn  # type: ignore[assignment]
        (draw_calm if self.init == "calm" else draw_published)(self)

    def linear_layers(self) -> list[Pointwise]:
        """Return the hidden layer, where there is one, and the heads."""
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
        self._place_factors(next((tensor.device for tensor in (*self.buffers(), *self.parameters())), None))

    def set_temperature(self, value: float) -> None:
        """Divide every logit by `value` from now on; a method without a temperature keeps none.

        Args:
            value: the temperature, above 0; large values make all attentions alike.

        Raises:
            ValueError: value is not a positive, finite number, or the temperature is offloaded.
        """
        check_temperature(value)
        if self.temperature is not None:
            if self.temperature.is_meta and hasattr(self, "_hf_hook"):  # the numbers lie with accelerate
                raise ValueError(
                    f"temperature {value} cannot be set on the meta device: set it before offloading the buffers "
                    "(accelerate)"
                )
            if self.temperature.is_meta:  # a network without numbers yet, which gets this one with the others
                self.initial_temperature = float(value)
                return
            self.temperature.fill_(value)  # in place: a compiled network reads the new value without recompiling

    def __call__(self, x: Tensor) -> Attentions:
        """Return the attentions of each sample in x, (B, C, *map), in float32 or float64.

        Hooks meet what :meth:`forward` returns, since those of other programs want tensors alone, and of one rank.
        """
        return self.named(super().__call__(x))

    def named(self, found: tuple[Tensor, ...]) -> Attentions:
        """Return what :meth:`forward` returned by name and in the shapes of `heads`."""
        gates = dict(zip(self.heads, found, strict=True))
        if "spatial" in gates:  # unflatten would fix the batch in PyTorch's older ONNX exporter
            gates["spatial"] = gates["spatial"].reshape(-1, *self.heads["spatial"])
        return Attentions(**gates)

    def range_of(self, kind: str) -> tuple[float, float]:
        """Return between which values the attention of a kind lies."""
        return 0.0, self.kernel_gain if kind == "kernel" else self.gain

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return each head's attention of each sample in x, flat, (B, numbers of the head)."""
        if not self.heads:
            return ()
        fused = fused_attention(self, x)
        if fused is not None:
            return fused
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            dtype = torch.promote_types(x.dtype, torch.float32)
            z = pool(x, self.extent, dtype)
            return tuple(map(self._gate, self.heads, self._logits(z)))

    def _logits(self, z: Tensor) -> Sequence[Tensor]:
        """Return the logits of each head, (B, size), of what was pooled, (B, C)."""
        z = self._normalise(z if self.fc is None else self._project(self.fc, z))
        if self.fc is not None:
            z = z.relu()
        return [self._project(layer, z) for layer in self.head_layers()]

    def head_layers(self) -> list[Any]:
        """Return the last layers, of each head."""
        return [self._modules[f"{name}_fc"] for name in self.heads]

    def _gate(self, name: str, logits: Tensor) -> Tensor:
        if self.temperature is not None:
            kept = logits.requires_grad and not is_traced()  # for the backward pass, before which another may be set
            logits = logits / (self.temperature.clone() if kept else self.temperature)
        if name == "kernel":
            shares = logits.softmax(1) if self.kernel_gate == "softmax" else logits.sigmoid()
            return shares if self.factors is None else self.kernel_gain * shares
        return logits.sigmoid() if self.factors is None else self.gain * logits.sigmoid()

    def plain_layers(self, dtype: torch.dtype) -> cpu.Layers | None:
        """Return the numbers of the parts as the compiled kernel takes them; None where these want to be called.

        Args:
            dtype: what all of them must have.
        """
        parts: dict[str, Any] = self._modules
        norm, fc, heads = parts.get("bn"), parts.get("fc"), self.head_layers()
        for part in (fc, norm, *heads):
            if part is not None and not is_plain(part):
                return None
        after: list[Any] = [] if fc is None or fc.bias is None else [fc.bias]
        if norm is not None and after:
            return None
        if isinstance(norm, nn.GroupNorm):
            after = [norm.weight, norm.bias]
        elif norm is not None:
            if norm.training or norm.running_mean is None:
                return None
            after = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
        weights, biases = [layer.weight for layer in heads], [layer.bias for layer in heads]
        groups, eps = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1, 0.0 if norm is None else norm.eps
        return fitting(cpu.Layers(None if fc is None else fc.weight, after, groups, eps, weights, biases), dtype)

    def _project(self, layer: Any, z: Tensor) -> Tensor:
        """Return a 1x1 convolution of vectors, (B, C) -> (B, O), in z's dtype."""
        if is_plain(layer):
            return F.linear(z, layer.weight.flatten(1).to(z.dtype), cast(layer.bias, z))
        return call_in_dtype(layer, z.reshape(*z.shape, *(1,) * self.dims)).flatten(1)

    def _normalise(self, z: Tensor) -> Tensor:
        """Return the norm of what the heads read, in z's dtype."""
        norm = self.bn
        if norm is None:
            return z
        maps = z.reshape(*z.shape, *(1,) * self.dims)
        if isinstance(norm, BatchNorm) and norm.training and z.shape[0] == 1:
            return normalise_one(norm, maps).flatten(1)
        if isinstance(norm, nn.GroupNorm) and is_plain(norm):
            return F.group_norm(z, norm.num_groups, cast(norm.weight, z), cast(norm.bias, z), norm.eps)
        if isinstance(norm, BatchNorm) and is_plain(norm) and not norm.training and norm.running_mean is not None:
            statistics = cast(norm.running_mean, z), cast(norm.running_var, z)
            return F.batch_norm(z, *statistics, cast(norm.weight, z), cast(norm.bias, z), eps=norm.eps)
        return call_in_dtype(norm, maps).flatten(1)

    def _new_temperature(self, device: torch.device | str | None) -> Tensor | None:
        if self.initial_temperature is None:
            return None
        check_temperature(self.initial_temperature)
        return torch.full((), self.initial_temperature, dtype=torch.float32, device=device)

    def _place_factors(self, device: torch.device | str | None) -> None:
        factors = (self.gain, self.kernel_gain)
        self.factors = None if factors == (1, 1) else torch.tensor(factors, dtype=torch.float64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        # Numbers that the layer knows can leave the meta device, which other tensors cannot.
        before = self.temperature
        if before is not None and before.is_meta:
            self.temperature = before = self._new_temperature("cpu")
        if self.factors is not None and self.factors.is_meta:
            self._place_factors("cpu")
        super()._apply(fn, recurse)
        stayed = any(parameter.is_meta for parameter in self.parameters())
        if before is not None and self.temperature is not None:  # stays float32, and keeps its value in to_empty()
            self.temperature = before.to("meta" if stayed else self.temperature.device)
        if self.factors is not None:
            self._place_factors("meta" if stayed else self.factors.device)
        return self


def leave_as_drawn() -> None:
    """Do nothing in place of a part's `reset_parameters`: the attention's own draws its parts together.

    Programs that draw a network by the `reset_parameters` of all its modules come to these after the attention.
    """


def fill_in_temperature(
    attention: Attention,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Add the present temperature to a state dict without one, such as a published one; keep one in float32.

    A temperature that cannot divide logits is one of the errors of loading.
    """
    key, own = f"{prefix}temperature", attention.temperature
    if own is None:
        return
    if isinstance(given := state.get(key), Tensor):
        state[key] = given.float()
        if not given.is_meta and not bool(((given > 0) & given.isfinite()).all()):
            errors.append(f"{key} must be positive and finite, got {given.tolist()}")
            state[key] = own.clone()
    else:
        state[key] = attention._new_temperature("cpu") if own.is_meta else own.clone()


def fused_attention(attention: Attention, x: Tensor) -> tuple[Tensor, ...] | None:
    """Return what :meth:`Attention.forward` does without gradients on the CPU where the compiled kernel does it."""
    if not has_compiled_kernel(x):
        return None
    layers = attention.plain_layers(x.dtype)
    if layers is None:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    pooled = finished(x).means if attention.takes_means and attention.extent is None else None
    if pooled is None:
        pooled = cpu.pool(x) if attention.extent is None else pool(x, attention.extent, dtype)
    kinds, sizes = [*attention.heads], [math.prod(shape) for shape in attention.heads.values()]
    gains = [attention.kernel_gain if kind == "kernel" else attention.gain for kind in kinds]
    softmax = kinds.index("kernel") if "kernel" in kinds and attention.kernel_gate == "softmax" else -1
    return tuple(cpu.attend(pooled, layers, sizes, gains, softmax, attention.temperature))


def fitting(layers: cpu.Layers, dtype: torch.dtype) -> cpu.Layers | None:
    """Return the numbers if the compiled kernel takes them: none is missing, all are contiguous and of one dtype."""
    for tensor in (*([] if layers.fc is None else [layers.fc]), *layers.norm, *layers.weights, *layers.biases):
        if tensor is None or tensor.dtype != dtype or not tensor.is_contiguous():
            return None
    return layers


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


def check_temperature(value: float) -> None:
    """Raise an error unless `value` can divide logits."""
    if isinstance(value, str):
        raise TypeError(f"temperature must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be a positive number, got {value!r}")


def try_temperature(model: nn.Module, value: float) -> bool:
    """Set the temperature of every attention that has one, and return whether there are any."""
    check_module(model)
    check_temperature(value)
    attentions = [part for part in model.modules() if isinstance(part, Attention) and part.temperature is not None]
    for attention in attentions:
        attention.set_temperature(value)
    return bool(attentions)


def find_temperature(model: nn.Module) -> float | None:
    """Return the temperature of a network's first attention that has one; None where none has."""
    parts = (part.temperature for part in model.modules() if isinstance(part, Attention))
    return next((temperature.item() for temperature in parts if temperature is not None), None)


def set_temperature(model: nn.Module, value: float) -> None:
    """Set the temperature of every attention in a network (ODConv and DyConv; CondConv has none).

    Args:
        model: any module; one without a temperature is left as it is, with a warning.
        value: the temperature, above 0. The published schedule falls from 30 to 1 over the first ten epochs.

    Raises:
        ValueError: value is not a positive, finite number, or a temperature is offloaded.
    """
    if not try_temperature(model, value):
        warnings.warn(f"no layer of the {type(model).__name__} has a temperature: none was set", stacklevel=2)
