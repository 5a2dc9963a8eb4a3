"""The layers of KernelWarehouse: convolutions whose kernels are mixed, piece by piece, of shared cells."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from odconv.layers.per_sample import PerSampleConv, Size
from odconv.layers.warehouse_attention import WarehouseAttention
from odconv.ops.cells import assemble, cell_conv
from odconv.ops.contract import Attentions

if TYPE_CHECKING:
    from odconv.layers.warehouse import Warehouse


class KWConv(PerSampleConv):
    """The core of every layer of KernelWarehouse: it has an attention, and takes its kernels from a warehouse.

    A subclass says how many `dims` it has. A layer computes only once a :class:`Warehouse` has been made of it and the
    others that share its cells.
    """

    part = "cell"
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
        padding_mode: str = "zeros",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.attention = None

    def reset_parameters(self) -> None:
        """Set the bias to zero; the attention and the warehouse draw the rest."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

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

    @property
    def parts(self) -> nn.Parameter:
        """The cells."""
        return self.cells

    def kernels(self, attentions: Attentions, dtype: torch.dtype) -> Tensor:
        """Return the kernel that each of B samples is convolved with at some attentions, (B, *kernel_shape)."""
        return assemble(self.cells.to(dtype), attentions.kernel, self.kernel_shape)

    def kernel_blocks(self, attentions: Attentions, numbers: int) -> Iterator[Tensor]:
        """Yield the numbers of B samples' kernels in float32, (B, ...), about as many at a time, in any order."""
        shares = attentions.kernel
        assert shares is not None
        cells = self.cells.to(shares.device, torch.float32).flatten(1)
        for some in shares.float().split(max(1, numbers // (len(shares) * cells.shape[1])), dim=1):
            yield some @ cells

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
        self.check_input(x)
        shares = self.attention(x)
        x, geometry = self.padded(x)
        return cell_conv(x, cells, shares, shape, bias=self.bias, **geometry._asdict())

    def join(self, warehouse: "Warehouse", pool: int, attention: WarehouseAttention) -> None:
        """Take kernels from a parameter of a warehouse, which stays the network's own part and none of the layer's."""
        vars(self)["warehouse"] = warehouse  # past nn.Module, so that the network holds the cells once, under one name
        self.pool, self.attention = pool, attention
        attention.dims = self.dims

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as nn.Conv2d prints them."""
        parts = [super().extra_repr()]
        if self.attention is not None:
            place = self.attention.place
            parts += [f"{len(place.pieces)} pieces of {place.cells} cells in warehouse {self.pool}"]
        return ", ".join(parts)


class KWConv1d(KWConv):
    """KernelWarehouse's convolution over (B, C, L).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv1d``, with its defaults.
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
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv2d``, with its defaults.
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
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv3d``, with its defaults.
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
