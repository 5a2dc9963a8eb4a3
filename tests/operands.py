"""Random operands of the operators, and what an operator makes of them."""

import torch
from torch._subclasses import FakeTensorMode

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


def assert_gradients_stand_alone(operator, tensors, **options):
    """Assert that a gradient is the same whichever others are wanted."""
    names = [*tensors]
    y, *wanted = outcome(operator, tensors, **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    for only in [{name} for name in names] + [{*names} - {name} for name in names]:
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in only)
        y = operator(**tensors, **options)
        found = torch.autograd.grad(y, [tensors[name] for name in names if name in only], upstream)
        expected = [gradient for name, gradient in zip(names, wanted, strict=True) if name in only]
        torch.testing.assert_close(found, tuple(expected), rtol=1e-12, atol=1e-12)


def assert_laid_out_as_told(operator, given):
    """Assert that an operator returns what torch.compile is told: shapes, strides and dtypes."""
    with FakeTensorMode() as mode:
        told = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given))
    for found, fake in zip(flat(operator(*given)), flat(told), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (fake.shape, fake.stride(), fake.dtype)


def flat(found):
    """One output of an operator, or several, as several."""
    return (found,) if isinstance(found, torch.Tensor) else found
