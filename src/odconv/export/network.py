"""What is exported: a copy of a network that takes and gives float32, traced with torch.export."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from odconv.layers.fused_attention import fuse_attentions
from odconv.layers.pooling import has_attentions, pooling

Precision = Literal["float32", "float16", "bfloat16", "int8"]
TRACED = get_args(Precision)[:3]
"""Precisions of a traced network; int8 comes after that."""
INPUT = "images"
SIZES = "sizes"
"""Name of the input that says which part of each image is not padding."""
AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class Network(nn.Module):
    """A network in evaluation mode and in some precision, from float32 to a tuple of float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the outputs in the order of :func:`named_outputs`; sizes as :func:`told`."""
        with told(self.model, images, sizes):
            return tuple(output.float() for output in named_outputs(self.model(images.to(self.dtype))).values())


@contextmanager
def told(model: nn.Module, images: Tensor, sizes: Tensor | None) -> Iterator[None]:
    """Tell the attentions which part of each image is not padding.

    Args:
        model: the network.
        images: what it is about to take, (B, C, *map).
        sizes: pixels from the beginning of each axis that are not padding, (B, dims), integers; None for all.
    """
    if sizes is None:
        yield
        return
    axes = zip(sizes.unbind(1), images.shape[2:], strict=True)
    with pooling(model, torch.stack([size.float() / length for size, length in axes], 1)):
        yield


class Traced(NamedTuple):
    """What torch.export made of a network, and the names of its outputs."""

    program: torch.export.ExportedProgram
    outputs: list[str]


def named_outputs(result: Any) -> dict[str, Tensor]:
    """Return the outputs of a network by name: "logits", a dict's keys, "output_0" and so on of a sequence.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(result, Tensor):
        return {"logits": result}
    sequence = enumerate(result) if isinstance(result, list | tuple) else ()
    pairs = result.items() if isinstance(result, dict) else sequence
    named = {str(key) if str(key).isidentifier() else f"output_{key}": value for key, value in pairs}
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise TypeError(f"model must return a tensor, or a dict or sequence of tensors, got {type(result).__name__}")
    return named


def trace(
    model: nn.Module,
    device: torch.device,
    input_size: Sequence[int],
    dynamic_batch: bool,
    dynamic_size: bool,
    precision: Precision,
    sizes: bool = False,
) -> Traced:
    """Trace a copy of a network for one sample, or for a batch of any size.

    Raises:
        ValueError: the network cannot be exported like that; the message names the layer and the reason.
    """
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if not 2 <= len(size) <= 4 or any(not isinstance(extent, int) or extent < 1 for extent in size):
        raise ValueError(f"input_size must be (C, H, W), (C, L) or (C, D, H, W), each at least 1, got {input_size!r}")
    if precision not in TRACED:
        raise ValueError(f"precision must be one of {TRACED}, got {precision!r}")
    if sizes and not has_attentions(model):
        raise ValueError("sizes are for networks with dynamic layers, whose attentions see padding; this has none")
    dtype = getattr(torch, precision)
    copied = copy.deepcopy(model).eval().requires_grad_(False).to(device, torch.float32)
    refuse_batch_statistics(copied)
    fuse_attentions(copied)
    with torch.no_grad():
        for shape in trials(size, dynamic_batch, dynamic_size):
            with naming_layers(copied, f" for inputs of shape {shape}"):
                outputs = list(named_outputs(copied(torch.ones(shape, device=device))))
        batch, axes = [0] * dynamic_batch, list(range(2, len(size) + 1)) * dynamic_size
        shapes = tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in (batch + axes, batch))
        images = torch.ones(2 if dynamic_batch else 1, *size, device=device)
        inputs = (images, whole_sizes(images)) if sizes else (images,)
        network = Network(copied.to(dtype), dtype)
        with naming_layers(copied):
            program = torch.export.export(network, inputs, dynamic_shapes=shapes[: len(inputs)], strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    return Traced(program, outputs)


def whole_sizes(images: Tensor) -> Tensor:
    """Return the sizes of images that are not padded, see :func:`told`."""
    return torch.tensor([images.shape[2:]] * len(images), device=images.device)


def trials(input_size: Sequence[int], dynamic_batch: bool, dynamic_size: bool) -> list[tuple[int, ...]]:
    """Shapes of inputs to try, which differ in what may vary."""
    channels, *extents = input_size
    batches = (1, 3) if dynamic_batch else (1,)
    sizes = [extents, [extent + 32 for extent in extents]] if dynamic_size else [extents]
    return [(batch, channels, *size) for batch in batches for size in sizes]


def device_of(model: nn.Module) -> torch.device:
    """Where a network is."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise a ValueError for batch norm without running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            reason = "without running statistics, what it makes of an image depends on the others in the batch"
            raise refusal(name, type(module).__name__, reason)


@contextmanager
def naming_layers(model: nn.Module, where: str = "") -> Iterator[None]:
    """Turn an error into a ValueError that names the innermost layer in which it arose."""
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, inputs: running.append(module)) for module in names]
    hooks += [module.register_forward_hook(lambda module, inputs, result: running.remove(module)) for module in names]
    try:
        yield
    except Exception as error:
        culprit = running[-1] if running else model
        raise refusal(names[culprit], type(culprit).__name__, f"{error}{where}") from error
    finally:
        for hook in hooks:
            hook.remove()


def refusal(name: str, kind: str, reason: object) -> ValueError:
    """Return the error that a layer cannot be exported."""
    where = f"layer {name} ({kind})" if name else f"the {kind}"
    return ValueError(f"{where} cannot be exported: {' '.join(str(reason).split())[:400]}")
