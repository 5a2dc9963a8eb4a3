"""Whether an exported file computes what the network does."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from odconv.export.network import Precision, device_of, named_outputs, told
from odconv.export.opened import open_exported

TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1, "int8": 3e-1}


@torch.no_grad()
def verify(
    path: str | Path,
    model: nn.Module,
    input_shapes: Sequence[Sequence[int]],
    *,
    tolerance: float = 1e-4,
    trust: bool = False,
) -> float:
    """Compare an exported file with the network that it was made of, on random inputs.

    Args:
        path: a file of :func:`odconv.export_onnx` or :func:`odconv.export.export_torch`.
        model: the network. It is computed in evaluation mode and float32, in a copy.
        input_shapes: shapes of the images to try, batch first, such as [(1, 3, 224, 224), (2, 3, 224, 224)]. A file
            that takes sizes is given random ones.
        tolerance: how far an output may be off, as a share of the greatest value in it.
        trust: whether a .pt2 file may run code, which each can; see :func:`odconv.export.opened.open_exported`.

    Returns:
        The greatest difference found, as a share of the greatest value of that output.

    Raises:
        ValueError: the difference is above the tolerance, or not a number, or the file has other inputs, or is a
            .pt2 file and not trusted.
        OSError: the file cannot be read.
        ImportError: onnxruntime is not installed.
    """
    device = device_of(model)
    opened = open_exported(Path(path), trust)
    network = copy.deepcopy(model).eval().float()
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in input_shapes:
        images = torch.randn(*shape, generator=random)
        sizes, placed = None, images.to(device)
        if opened.takes_sizes:
            parts = [torch.randint(1, length + 1, shape[:1], generator=random) for length in shape[2:]]
            sizes = torch.stack(parts, 1)
        with told(network, placed, None if sizes is None else sizes.to(device)):
            wanted = named_outputs(network(placed))
        for (name, value), other in zip(wanted.items(), opened.compute(images, sizes), strict=True):
            one = value.cpu()
            if one.shape != other.shape:
                raise ValueError(f"the exported {name} has shape {tuple(other.shape)}, not {tuple(one.shape)}")
            error = ((one - other).abs().max() / one.abs().max().clamp(min=torch.finfo(one.dtype).tiny)).item()
            if not error <= tolerance:
                raise ValueError(
                    f"the exported file does not compute what the network does: {name} is off by {error:.1e} of its "
                    f"greatest value for inputs of shape {tuple(shape)}, and {tolerance:.1e} is allowed"
                )
            worst = max(worst, error)
    return worst
