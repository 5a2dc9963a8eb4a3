"""The transposed layers: each method's layer, with the signature and the operator of ``torch.nn.ConvTransposeNd``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odconv.layers.conv import ATTENTIONS, DynamicConv, _CondConv, _DyConv, _ODConv
from odconv.layers.per_sample import Size
from odconv.ops import dynamic_conv_transpose
from odconv.ops.contract import per_axis
from odconv.ops.dynamic_conv import add_bias
from odconv.ops.epilogue import activate


class DynamicConvTranspose(DynamicConv):
    """The core of every transposed layer, before the method's own class in the order of bases.

    Input is (B, C, *map), output (B, O, *map); the weight is (n, C, O/groups, *kernel_size).
    """

    transposed = True
    padding: tuple[int, ...]

    def __init__(self, *, padding: Size, output_padding: Size, padding_mode: str, **others: Any) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros' for a transposed layer, got {padding_mode!r}")
        padding = per_axis("padding", padding, self.dims, least=0)  # no names such as "same"
        super().__init__(padding=padding, padding_mode=padding_mode, **others)
        self.output_padding = per_axis("output_padding", output_padding, self.dims, least=0)

    def forward(  # type: ignore[override]  # the order of nn.ConvTransposeNd's arguments
        self, x: Tensor, output_size: Sequence[int] | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Convolve each sample with its own kernel.

        Args:
            x: input, (B, C, *map).
            output_size: map of the output, or the whole shape, where a stride leaves it open; instead of
                `output_padding`.
            context: what the attention looks at instead of x; see :meth:`DynamicConv.forward`.

        Returns:
            (B, O, *map).

        Raises:
            ValueError: x or context has another shape, or no output padding leads to `output_size`.
        """
        attentions = self._attend(x, context)
        y = dynamic_conv_transpose(
            x,
            self.weight,
            **attentions._asdict(),
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding if output_size is None else self._padding_to(x, output_size),
            dilation=self.dilation,
            groups=self.groups,
        )
        return activate(add_bias(y, self._mixed_bias(attentions)), self.epilogue)

    def _padding_to(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding that leads to a map of `output_size`."""
        wanted = tuple(output_size)[2 if len(output_size) == self.dims + 2 else 0 :]
        axes = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        least = [(extent - 1) * s - 2 * p + d * (k - 1) + 1 for extent, k, s, p, d in axes]
        most = [size + s - 1 for size, s in zip(least, self.stride, strict=True)]
        if len(wanted) != self.dims or not all(a <= size <= b for a, size, b in zip(least, wanted, most, strict=True)):
            raise ValueError(
                f"output_size must lie between {tuple(least)} and {tuple(most)} for x of shape {tuple(x.shape)}, "
                f"got {tuple(output_size)}"
            )
        return tuple(size - a for size, a in zip(wanted, least, strict=True))

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as nn.ConvTranspose2d prints them."""
        parts = super().extra_repr()
        return f"{parts}, output_padding={self.output_padding}" if any(self.output_padding) else parts


class _ODConvTranspose(DynamicConvTranspose, _ODConv):
    """Omni-dimensional dynamic convolution, transposed. A drop-in for ``torch.nn.ConvTransposeNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.ConvTranspose2d``, with its order and defaults.
        bias: add a static bias. Default False.
        padding_mode: only "zeros".
        kernel_num, reduction, min_channels, attentions, norm, temperature: as in :class:`ODConv2d`.
        gain, kernel_gain, init, context_channels, device, dtype: as in :class:`ODConv2d`.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map); the weight is (n, C, O/groups, *kernel_size).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: Size = 1,
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
            output_padding=output_padding, groups=groups, bias=bias, dilation=dilation, padding_mode=padding_mode,
            kernel_num=kernel_num, reduction=reduction, min_channels=min_channels, attentions=attentions, norm=norm,
            temperature=temperature, gain=gain, kernel_gain=kernel_gain, init=init, context_channels=context_channels,
            device=device, dtype=dtype,
        )  # fmt: skip


class _DyConvTranspose(DynamicConvTranspose, _DyConv):
    """Dynamic convolution, transposed. A drop-in for ``torch.nn.ConvTransposeNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.ConvTranspose2d``, with its order and defaults.
        bias: add a mixed bias. Default False.
        padding_mode: only "zeros".
        kernel_num, reduction, min_channels, norm, temperature, kernel_gain: as in :class:`DyConv2d`.
        init, context_channels, device, dtype: as in :class:`DyConv2d`.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map); the weight is (n, C, O/groups, *kernel_size).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: Size = 1,
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
            output_padding=output_padding, groups=groups, bias=bias, dilation=dilation, padding_mode=padding_mode,
            kernel_num=kernel_num, reduction=reduction, min_channels=min_channels, norm=norm, temperature=temperature,
            kernel_gain=kernel_gain, init=init, context_channels=context_channels, device=device, dtype=dtype,
        )  # fmt: skip


class _CondConvTranspose(DynamicConvTranspose, _CondConv):
    """Conditionally parameterised convolution, transposed. A drop-in for ``torch.nn.ConvTransposeNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.ConvTranspose2d``, with its order and defaults.
        bias: add a mixed bias. Default False.
        padding_mode: only "zeros".
        kernel_num, norm, init, context_channels, device, dtype: as in :class:`CondConv2d`.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map); the weight is (n, C, O/groups, *kernel_size).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        kernel_num: int = 8,
        norm: str = "none",
        init: str = "calm",
        context_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            output_padding=output_padding, groups=groups, bias=bias, dilation=dilation, padding_mode=padding_mode,
            kernel_num=kernel_num, norm=norm, init=init, context_channels=context_channels, device=device, dtype=dtype,
        )  # fmt: skip


class ODConvTranspose1d(_ODConvTranspose):
    dims = 1


class ODConvTranspose2d(_ODConvTranspose):
    dims = 2


class ODConvTranspose3d(_ODConvTranspose):
    dims = 3


class DyConvTranspose1d(_DyConvTranspose):
    dims = 1


class DyConvTranspose2d(_DyConvTranspose):
    dims = 2


class DyConvTranspose3d(_DyConvTranspose):
    dims = 3


class CondConvTranspose1d(_CondConvTranspose):
    dims = 1


class CondConvTranspose2d(_CondConvTranspose):
    dims = 2


class CondConvTranspose3d(_CondConvTranspose):
    dims = 3
