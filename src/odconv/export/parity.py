"""Whether an exported file computes what the network does."""

import copy
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from odconv.export.network import INPUT, Precision, device_of, named_outputs
from odconv.export.written import needed

TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}


@torch.no_grad()
def verify(
    path: str | Path, model: nn.Module, input_shapes: Sequence[Sequence[int]], *, tolerance: float = 1e-4
) -> float:
    """Compare an exported file with the network that it was made of, on random inputs.

    Args:
        path: a file of :func:`odconv.export_onnx` or :func:`odconv.export.export_torch`.
        model: the network. It is computed in evaluation mode and float32, in a copy.
        input_shapes: shapes of the inputs to try, batch first, such as [(1, 3, 224, 224), (2, 3, 224, 224)].
        tolerance: how far an output may be off, as a share of the greatest value in it.

    Returns:
        The greatest difference found, as a share of the greatest value of that output.

    Raises:
        ValueError: the difference is above the tolerance, or not a number.
        OSError: the file cannot be read.
        ImportError: onnxruntime is not installed.
    """
    device = device_of(model)
    computed = load(Path(path), device)
    network = copy.deepcopy(model).eval().float()
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in input_shapes:
        images = torch.randn(*shape, generator=random)
        wanted = named_outputs(network(images.to(device)))
        for (name, value), other in zip(wanted.items(), computed(images), strict=True):
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


def load(path: Path, device: torch.device) -> Callable[[Tensor], Sequence[Tensor]]:
    """The function in an exported file, of a batch of float32."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        runtime = needed("onnxruntime")
        try:
            session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has its own for everything that may be wrong
            raise OSError(f"onnxruntime cannot read {path}: {' '.join(str(error).split())}") from error
        return lambda images: [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]
    with zipfile.ZipFile(path) as archive:
        compiled = any("/aotinductor/" in name for name in archive.namelist())
    called = torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()
    return lambda images: [output.cpu() for output in called(images.to(device))]
