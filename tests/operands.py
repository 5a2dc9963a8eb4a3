"""Random operands of the operators, and what an operator makes of them."""

import torch

ATTENTIONS = ("kernel", "spatial", "channel", "filter")


def arguments(
    batch,
    channels,
    filters,
    n,
    taps,
    size,
    groups=1,
    present=ATTENTIONS,
    bias=None,
    dtype=torch.float64,
    transposed=False,
):
    """Random tensors by name; n kernels, mixed by a kernel attention where n needs it, or None: one per sample."""
    shapes = {"kernel": (batch, n), "spatial": (batch, *taps), "channel": (batch, channels), "filter": (batch, filters)}
    first, second = (channels, filters) if transposed else (filters, channels)
    kernels = batch if n is None else n
    tensors = {
        "x": torch.randn(batch, channels, *size, dtype=dtype),
        "weight": torch.randn(kernels, first, second // groups, *taps, dtype=dtype),
        **{name: torch.rand(shapes[name], dtype=dtype) for name in present if n is not None or name != "kernel"},
    }
    if bias is not None:
        tensors["bias"] = torch.randn((filters,) if bias == "static" else (kernels, filters), dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def outcome(operator, tensors, **options):
    """The output and the gradient of every tensor under a fixed upstream gradient."""
    y = operator(**tensors, **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, list(tensors.values()), upstream)]
