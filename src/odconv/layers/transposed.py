"""The transposed layers: each method's layer, with the signature and the operator of ``torch.nn.ConvTransposeNd``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from odconv.layers.conv import DynamicConv, Size, _CondConv, _DyConv, _ODConv
from odconv.ops import dynamic_conv_transpose
from odconv.ops.contract import per_axis


class DynamicConvTranspose(DynamicConv):
    """Transposed convolution with a kernel mixed for each sample. A drop-in for ``torch.nn.ConvTransposeNd``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.ConvTranspose2d``, with its order and defaults.
        bias: add a bias. Default False.
        padding_mode: only "zeros".
        **options: those of the method: of :class:`ODConv2d` for :class:`ODConvTranspose2d`, and so on.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Input is (B, C, *map), output (B, O, *map); the weight is (n, C, O/groups, *kernel_size).
    """

    transposed = True
    padding: tuple[int, ...]

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
        **options: Any,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros' for a transposed layer, got {padding_mode!r}")
        padding = per_axis("padding", padding, self.dims, least=0)  # no names such as "same"
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **options
        )
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
            bias=self.bias if self.kernel_bias is None else self.kernel_bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding if output_size is None else self._padding_to(x, output_size),
            dilation=self.dilation,
            groups=self.groups,
        )
        return self._add_static_bias(y)

    def _padding_to(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that leads to a map of `output_size`."""
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
        """The arguments that differ from their defaults, as nn.ConvTranspose2d prints them."""
        parts = super().extra_repr()
        return f"{parts}, output_padding={self.output_padding}" if any(self.output_padding) else parts


class ODConvTranspose1d(DynamicConvTranspose, _ODConv):
    dims = 1


class ODConvTranspose2d(DynamicConvTranspose, _ODConv):
    dims = 2


class ODConvTranspose3d(DynamicConvTranspose, _ODConv):
    dims = 3


class DyConvTranspose1d(DynamicConvTranspose, _DyConv):
    dims = 1


class DyConvTranspose2d(DynamicConvTranspose, _DyConv):
    dims = 2


class DyConvTranspose3d(DynamicConvTranspose, _DyConv):
    dims = 3


class CondConvTranspose1d(DynamicConvTranspose, _CondConv):
    dims = 1


class CondConvTranspose2d(DynamicConvTranspose, _CondConv):
    dims = 2


class CondConvTranspose3d(DynamicConvTranspose, _CondConv):
    dims = 3
