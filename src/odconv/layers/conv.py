"""The dynamic layers: one N-d core and, for each method, how its attention is built."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from odconv.layers.attention import Attention
from odconv.layers.parts import hidden_width
from odconv.layers.per_sample import PerSampleConv, Size, below_each_other
from odconv.layers.starts import draw_kernels, mixture_size
from odconv.ops.contract import Attentions, check_map, positive
from odconv.ops.dynamic_conv import compute, mixed_bias
from odconv.ops.eager import mixed_kernels
from odconv.ops.epilogue import NO_EPILOGUE, Epilogue
from odconv.ops.packing import Packed

ATTENTIONS = ("channel", "filter", "spatial", "kernel")


class DynamicConv(PerSampleConv):
    """The core of every dynamic layer: n kernels, an attention, and :func:`odconv.functional.dynamic_conv`.

    A subclass says how many `dims` it has, whether it is transposed and whether its bias is mixed, and builds its
    `attention`. It describes the convolution by keywords: those of ``torch.nn.Conv2d``, the number of kernels, and the
    width of the context.

    Attributes:
        weight: the n kernels, (n, O, C/groups, *kernel_size); of a transposed layer (n, C, O/groups, *kernel_size).
        bias: (O), or None.
        kernel_bias: a bias for each kernel, mixed as these are, (n, O), or None.
        attention: what computes the attentions from the input, or from a context.
        epilogue: what follows the convolution, in a network that :func:`odconv.fuse` fused; nothing in a new layer.
        packed: the kernels packed, in such a network; None in a new layer.
    """

    part = "kernel"
    mixed_bias: ClassVar[bool] = False
    epilogue: Epilogue = NO_EPILOGUE
    packed: Packed | None = None
    attention: Attention

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        bias: bool,
        padding_mode: str,
        kernel_num: int,
        context_channels: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        self.kernel_num = positive("kernel_num", kernel_num)
        self.context_channels = None if context_channels is None else positive("context_channels", context_channels)
        self.weight = nn.Parameter(torch.empty((kernel_num, *self.kernel_shape), device=device, dtype=dtype))
        static = torch.empty(out_channels, device=device, dtype=dtype) if bias and not self.mixed_bias else None
        mixed = torch.empty(kernel_num, out_channels, device=device, dtype=dtype) if bias and self.mixed_bias else None
        self.bias = None if static is None else nn.Parameter(static)
        self.kernel_bias = None if mixed is None else nn.Parameter(mixed)

    @property
    def parts(self) -> nn.Parameter:
        """The kernels that those of samples are mixed of."""
        return self.weight

    def kernels(self, attentions: Attentions, dtype: torch.dtype) -> Tensor:
        """Return the kernel that each of B samples is convolved with at some attentions, (B, *kernel_shape)."""
        return mixed_kernels(self.weight.to(dtype), self._by_weight(attentions), self.groups)

    def kernel_blocks(self, attentions: Attentions, numbers: int) -> Iterator[Tensor]:
        """Yield the numbers of B samples' kernels in float32, (B, ...), about as many at a time, in any order."""
        attentions = self._by_weight(attentions)
        given = [a for a in attentions if a is not None]
        weight = self.weight.to(given[0].device, torch.float32)
        per_filter = max(map(len, given)) * weight[0, 0].numel()
        block = max(1, numbers // per_filter) if self.groups == 1 else weight.shape[1]
        for start in range(0, weight.shape[1], block):
            some, gate = slice(start, start + block), attentions.filter
            gates = attentions if gate is None else attentions._replace(filter=gate[:, some])
            yield mixed_kernels(weight[:, some], gates, self.groups)

    def _by_weight(self, attentions: Attentions) -> Attentions:
        """Return attentions as the axes of the weight are: those of a transposed layer begin with the channels."""
        if not self.transposed:
            return attentions
        return attentions._replace(channel=attentions.filter, filter=attentions.channel)

    def reset_parameters(self) -> None:
        """Draw the parameters: kernels Kaiming normal, biases as nn.Conv2d's, the attention as its `init` says."""
        # depth-wise kernels are drawn small already, and the batch norm behind them begins with a variance of 1
        calm = self.attention.init == "calm" and self.groups == self.in_channels
        draw_kernels(self.weight, self.transposed, mixture_size(self.attention, self.kernel_num) if calm else 1.0)
        bound = 1 / math.sqrt(self.weight[0, 0].numel())
        for bias in (self.bias, self.kernel_bias):
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
        self.attention.reset_parameters()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Convolve each sample with its own kernel.

        Args:
            x: input, (B, C, *map).
            context: what the attention looks at instead of x, a map or a vector for each sample, (B, C', *map) or
                (B, C'), where C' is `context_channels`, or C where that is None.

        Returns:
            (B, O, *map).

        Raises:
            ValueError: x or context has another shape, or the context that `context_channels` announces is missing.
        """
        attentions = self._attend(x, context)
        x, geometry = self.padded(x)
        check_map(x, self.kernel_size, geometry)
        packed = None if self.packed is None else self.packed.of(self.weight, self.groups)
        bias = self._mixed_bias(attentions)
        return compute(x, self.weight, attentions, bias, geometry, epilogue=self.epilogue, packed=packed)

    def _attend(self, x: Tensor, context: Tensor | None) -> Attentions:
        """Return the attentions of each sample, after checking the shapes."""
        self.check_input(x)
        if self.weight.shape[0] != self.kernel_num:
            raise ValueError(
                f"weight must have {self.kernel_num} kernels (kernel_num) on its first axis, got shape "
                f"{tuple(self.weight.shape)}: it was rewritten, perhaps by a fusing for static convolutions; "
                "odconv.fuse and odconv.conversion.fusion.fold_batch_norm fold batch norm into dynamic ones"
            )
        if context is None:
            if self.context_channels is not None:
                raise ValueError(f"context must be given to a layer of context_channels {self.context_channels}")
            return self.attention(x)
        width = self.context_channels or self.in_channels
        if context.dim() < 2 or context.shape[0] != x.shape[0] or context.shape[1] != width:
            raise ValueError(
                f"context must have shape (B, C) or (B, C, *map) with B = {x.shape[0]} and C = {width}, "
                f"got {tuple(context.shape)}"
            )
        return self.attention(context[..., None] if context.dim() == 2 else context)

    def _mixed_bias(self, attentions: Attentions) -> Tensor | None:
        """Return the bias of all samples, (O), or of each, (B, O); a layer that was fused may have both."""
        mixed = mixed_bias(self.kernel_bias, attentions.kernel)
        if mixed is None or self.bias is None:
            return self.bias if mixed is None else mixed
        return mixed + self.bias.to(mixed.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DynamicConv":
        shape = getattr(getattr(self, "weight", None), "shape", None)  # FSDP takes the weight away
        super()._apply(below_each_other(fn, [shape]), recurse)
        return self

    @property
    def _is_hf_initialized(self) -> bool:
        return vars(self).get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, done: bool) -> None:
        # transformers sets this on every module, parts first, once it has read its file and put memory as it was in the
        # place of tensors that the file lacks; the functions of torch.nn.init leave the others alone meanwhile
        vars(self)["_is_hf_initialized"] = done
        if done and keeps_loaded_tensors():
            self.reset_parameters()

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as nn.Conv2d prints them."""
        parts = [super().extra_repr()]
        parts += [f"kernel_num={self.kernel_num}"]
        parts += [f"context_channels={self.context_channels}"] if self.context_channels is not None else []
        parts += [f"activation={self.epilogue.activation}"] if self.epilogue.activation is not None else []
        factors = {"gain": self.attention.gain, "kernel_gain": self.attention.kernel_gain}
        parts += [f"{name}={round(value, 4)}" for name, value in factors.items() if value != 1]
        return ", ".join(parts)


def keeps_loaded_tensors() -> bool:
    """Return whether the functions of torch.nn.init leave tensors alone that transformers has marked as loaded."""
    probe = torch.zeros((), device="cpu")
    probe._is_hf_initialized = True  # type: ignore[attr-defined]
    return nn.init.ones_(probe).item() == 0


class _ODConv(DynamicConv):
    """Omni-dimensional dynamic convolution: n kernels weighted along channel, filter, spatial and kernel axes.

    Follows Li, Zhou, Yao: Omni-Dimensional Dynamic Convolution, ICLR 2022. A drop-in for ``torch.nn.ConvNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv2d``, with its defaults.
        bias: add a static bias, (O), after the filter attention. Default False, as published.
        kernel_num: number n of kernels. Default 4.
        reduction: width of the attention's hidden layer as a share of C. Default 1/16.
        min_channels: least width of that hidden layer. Default 16.
        attentions: which of the four to use. The filter attention is left out where groups = C = O (depth-wise), the
            spatial one for 1x1 kernels, and the kernel one for n = 1, as published.
        norm: norm of the attention's hidden layer: "batch", "group", "layer" or "none". Batch norm takes its running
            statistics for a training batch of one.
        temperature: divisor of the attention's logits. Default 1; see :func:`odconv.set_temperature`.
        gain: factor of the sigmoid gates (channel, filter, spatial). Default 1, as published; 2 in layers that
            :func:`odconv.convert` started from trained kernels.
        kernel_gain: factor of the kernels' shares, or "sqrt" for sqrt(n), with which a mixture of n freshly drawn
            kernels is as large as one of them. Default 1, as published.
        init: how the parameters are drawn: "calm", to train from the first step, or "published". Default "calm"; see
            :mod:`odconv.layers.starts`.
        context_channels: channels of the context that :meth:`forward` then takes for the attention, C'. Default None: x
            itself, or a context of C channels where one is given.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        kernel_num: int = 4,
        reduction: float = 0.0625,
        min_channels: int = 16,
        attentions: Sequence[str] = ATTENTIONS,
        norm: str = "batch",
        temperature: float = 1.0,
        gain: float = 1.0,
        kernel_gain: float | str = 1.0,
        init: str = "calm",
        context_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode, kernel_num=kernel_num,
            context_channels=context_channels, device=device, dtype=dtype,
        )  # fmt: skip
        if isinstance(attentions, Iterable) and not isinstance(attentions, str):
            attentions = tuple(attentions)
        if not isinstance(attentions, tuple) or not attentions or not set(attentions) <= set(ATTENTIONS):
            raise ValueError(f"attentions must be some of {ATTENTIONS}, got {attentions!r}")
        if kernel_num > 1 and "kernel" not in attentions:
            raise ValueError(f"kernel_num must be 1 without the kernel attention, got {kernel_num} and {attentions!r}")
        depthwise = groups == in_channels == out_channels
        shapes = {
            "channel": (in_channels,),
            "filter": () if depthwise else (out_channels,),
            "spatial": self.kernel_size if math.prod(self.kernel_size) > 1 else (),
            "kernel": (kernel_num,) if kernel_num > 1 else (),
        }
        self.attention = Attention(
            self.dims,
            context_channels or in_channels,
            {name: shape for name, shape in shapes.items() if shape and name in attentions},
            hidden_width(context_channels or in_channels, reduction, min_channels),
            norm,
            gain=gain,
            kernel_gain=share_factor(kernel_gain, kernel_num),
            temperature=temperature,
            init=init,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()


class _DyConv(DynamicConv):
    """Dynamic convolution: n kernels mixed by a softmax attention.

    Follows Chen et al.: Dynamic Convolution: Attention over Convolution Kernels, CVPR 2020. A drop-in for
    ``torch.nn.ConvNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv2d``, with its defaults.
        bias: add a bias of n rows, (n, O), mixed like the kernels. Default False.
        kernel_num: number n of kernels. Default 4.
        reduction: width of the attention's hidden layer as a share of C. Default 1/4.
        min_channels: least width of that hidden layer. Default 4.
        norm: normalisation of the hidden layer: "batch", "group", "layer" or "none". Default "none", as published; with
            "layer" its shares move slowly enough to train from the first step.
        temperature: divisor of the attention's logits. Default 1; see :func:`odconv.set_temperature`.
        kernel_gain: factor of the kernels' shares, or "sqrt" for sqrt(n), with which a mixture of n freshly drawn
            kernels is as large as one of them. Default 1, as published.
        init: how the parameters are drawn: "calm", to train from the first step, or "published". Default "calm"; see
            :mod:`odconv.layers.starts`.
        context_channels: channels of the context that :meth:`forward` then takes for the attention, C'. Default None: x
            itself, or a context of C channels where one is given.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map).
    """

    mixed_bias = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        kernel_num: int = 4,
        reduction: float = 0.25,
        min_channels: int = 4,
        norm: str = "none",
        temperature: float = 1.0,
        kernel_gain: float | str = 1.0,
        init: str = "calm",
        context_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode, kernel_num=kernel_num,
            context_channels=context_channels, device=device, dtype=dtype,
        )  # fmt: skip
        self.attention = Attention(
            self.dims,
            context_channels or in_channels,
            {"kernel": (kernel_num,)},
            hidden_width(context_channels or in_channels, reduction, min_channels),
            norm=norm,
            kernel_gain=share_factor(kernel_gain, kernel_num),
            temperature=temperature,
            init=init,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()


class _CondConv(DynamicConv):
    """Conditionally parameterised convolution: n experts mixed by sigmoid routing weights.

    Follows Yang et al.: CondConv: Conditionally Parameterized Convolutions for Efficient Inference, NeurIPS 2019. A
    drop-in for ``torch.nn.ConvNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv2d``, with its defaults.
        bias: add a bias of n rows, (n, O), mixed like the kernels. Default False.
        kernel_num: number n of experts. Default 8.
        norm: normalisation of the pooled input before the routing: "none" or "layer", with which the routing moves
            slowly enough to train from the first step. Default "none", as published.
        init: how the parameters are drawn: "calm", to train from the first step, or "published". Default "calm"; see
            :mod:`odconv.layers.starts`.
        context_channels: channels of the context that :meth:`forward` then takes for the attention, C'. Default None: x
            itself, or a context of C channels where one is given.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map).
    """

    mixed_bias = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        kernel_num: int = 8,
        norm: str = "none",
        init: str = "calm",
        context_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if norm not in ("none", "layer"):
            raise ValueError(f"norm must be 'none' or 'layer', got {norm!r}")
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode, kernel_num=kernel_num,
            context_channels=context_channels, device=device, dtype=dtype,
        )  # fmt: skip
        self.attention = Attention(
            self.dims,
            context_channels or in_channels,
            {"kernel": (kernel_num,)},
            hidden=None,
            norm=norm,
            kernel_gate="sigmoid",
            temperature=None,
            init=init,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()


def share_factor(kernel_gain: float | str, kernel_num: int) -> float:
    """Return the factor of the shares as a number."""
    if isinstance(kernel_gain, str) and kernel_gain != "sqrt":
        raise ValueError(f"kernel_gain must be a positive number or 'sqrt', got {kernel_gain!r}")
    return math.sqrt(kernel_num) if isinstance(kernel_gain, str) else kernel_gain


class ODConv1d(_ODConv):
    dims = 1


class ODConv2d(_ODConv):
    dims = 2


class ODConv3d(_ODConv):
    dims = 3


class DyConv1d(_DyConv):
    dims = 1


class DyConv2d(_DyConv):
    dims = 2


class DyConv3d(_DyConv):
    dims = 3


class CondConv1d(_CondConv):
    dims = 1


class CondConv2d(_CondConv):
    dims = 2


class CondConv3d(_CondConv):
    dims = 3
