"""The layers of KernelWarehouse: convolutions whose kernels are mixed, piece by piece, of shared cells."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from odconv.layers.warehouse_attention import WarehouseAttention
from odconv.ops.contract import per_axis, positive
from odconv.ops.mixing import mixed_conv

if TYPE_CHECKING:
    from odconv.layers.warehouse import Warehouse

Size = int | Sequence[int]


class KWConv(nn.Module):
    """The core of every layer of KernelWarehouse: it has an attention, and takes its kernels from a warehouse.

    A subclass says how many `dims` it has. A layer computes only once a :class:`Warehouse` has been made of it and the
    others that share its cells.
    """

    dims: ClassVar[int]
    transposed: ClassVar[bool] = False
    attention: WarehouseAttention | None
    warehouse: "Warehouse | None" = None

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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        self.out_channels = positive("out_channels", out_channels)
        self.groups = positive("groups", groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels {in_channels} and out_channels {out_channels}, got {groups}"
            )
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dims, least=1)
        self.stride = per_axis("stride", stride, self.dims, least=1)
        self.dilation = per_axis("dilation", dilation, self.dims, least=1)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
        self.padding = padding if isinstance(padding, str) else per_axis("padding", padding, self.dims, least=0)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.attention = None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of a sample's kernel, (O, C/groups, *kernel_size)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def cells(self) -> nn.Parameter:
        """The cells that the layer's kernels are mixed of, (n, co, ci, *window), in its warehouse.

        Raises:
            ValueError: the layer is in no warehouse.
        """
        if self.warehouse is None:
            raise ValueError(
                f"the {type(self).__name__} has no kernel: it takes one from an odconv.Warehouse, to be made of all "
                "layers that share cells"
            )
        return self.warehouse.weights[self.pool]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each sample with its own kernel.

        Args:
            x: input, (B, C, *map).

        Returns:
            (B, O, *map).

        Raises:
            ValueError: x has another shape, or the layer is in no warehouse.
        """
        cells, shape = self.cells, self.kernel_shape
        assert self.attention is not None
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[3 - self.dims :])
            raise ValueError(f"x must have shape (B, C, {axes}) with C = {self.in_channels}, got {tuple(x.shape)}")
        return mixed_conv(
            x,
            partial(assemble, shape=shape),
            cells,
            self.attention(x),
            shape,
            bias=self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def join(self, warehouse: "Warehouse", pool: int, attention: WarehouseAttention) -> None:
        """Take kernels from a parameter of a warehouse, which stays the network's own part and none of the layer's."""
        vars(self)["warehouse"] = warehouse  # past nn.Module, so that the network holds the cells once, under one name
        self.pool, self.attention = pool, attention
        attention.dims = self.dims

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as nn.Conv2d prints them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding!r}"] if self.padding not in ((0,) * self.dims, "valid") else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1,) * self.dims else []
        parts += [f"groups={self.groups}"] if self.groups != 1 else []
        parts += ["bias=True"] if self.bias is not None else []
        if self.attention is not None:
            place = self.attention.place
            parts += [f"{len(place.pieces)} pieces of {place.cells} cells in warehouse {self.pool}"]
        return ", ".join(parts)


class KWConv1d(KWConv):
    """KernelWarehouse's convolution over (B, C, L).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in ``torch.nn.Conv1d``, with its
            defaults.
        bias: add a static bias, (O). Default False, as published.
        device: where the bias lives.
        dtype: dtype of the bias.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    dims = 1


class KWConv2d(KWConv):
    """KernelWarehouse's convolution over (B, C, H, W).

    Follows Li, Yao: KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in ``torch.nn.Conv2d``, with its
            defaults.
        bias: add a static bias, (O). Default False, as published.
        device: where the bias lives.
        dtype: dtype of the bias.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    dims = 2


class KWConv3d(KWConv):
    """KernelWarehouse's convolution over (B, C, D, H, W).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in ``torch.nn.Conv3d``, with its
            defaults.
        bias: add a static bias, (O). Default False, as published.
        device: where the bias lives.
        dtype: dtype of the bias.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    dims = 3


class KWLinear(nn.Module):
    """KernelWarehouse's linear layer: a 1x1 convolution over the tokens of each sample.

    Args:
        in_features: numbers C of a token.
        out_features: numbers O of a token of the output.
        bias: add a static bias, (O). Default True.
        device: where the bias lives.
        dtype: dtype of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.conv = KWConv1d(in_features, out_features, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *, O) of x, (B, *, C), where each sample has a matrix of its own for all its tokens."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)
        return self.conv(tokens).transpose(1, 2).reshape(*x.shape[:-1], self.out_features)


def assemble(cells: Tensor, shares: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return a kernel for each sample, (B, *shape), of cells, (n, co, ci, *window), and shares, (B, m, n).

    The m pieces are in the order taps, blocks of filters, blocks of channels; the last varies first.
    """
    assert shares is not None
    (filters, channels), (outer, inner, *window) = shape[:2], cells.shape[1:]
    within = math.prod(window)
    pieces = (shares @ cells.flatten(1)).reshape(
        -1, math.prod(shape[2:]) // within, filters // outer, channels // inner, outer, inner, within
    )
    return pieces.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, *shape)


def cut(kernel: Tensor, cell: Sequence[int]) -> Tensor:
    """Return the m pieces of a kernel, (O, C/groups, *k), in the shape of a cell, (co, ci, *window)."""
    outer, inner, *window = cell
    within = math.prod(window)
    pieces = kernel.reshape(kernel.shape[0] // outer, outer, kernel.shape[1] // inner, inner, -1, within)
    return pieces.permute(4, 0, 2, 1, 3, 5).reshape(-1, *cell)
