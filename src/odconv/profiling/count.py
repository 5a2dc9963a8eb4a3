"""Parameters and multiply-adds, layer by layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odconv.layers import DynamicConv, PerSampleConv
from odconv.layers.warehouse_conv import KWConv
from odconv.profiling.table import Table
from odconv.system.modules import check_module

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Call(NamedTuple):
    """Shapes of the input and output of a layer when it was called."""

    x: torch.Size
    y: torch.Size


class Row(NamedTuple):
    """What a layer costs.

    Attributes:
        name: the layer's name in the network.
        kind: its class.
        output_shape: shape of its output without the batch; None where it was not called or returns no tensor.
        parameters: number of its parameters; one shared with an earlier layer is not counted again.
        madds: its multiply-adds for one sample, over all its calls.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...] | None
    parameters: int
    madds: int


@dataclass(frozen=True)
class Profile:
    """What a network costs, layer by layer; prints as a table (``rich.print`` gives a coloured one).

    Attributes:
        rows: the layers that have parameters or multiply-adds, in the order of the network's modules.
    """

    rows: list[Row]

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(row.parameters for row in self.rows)

    @property
    def madds(self) -> int:
        """Multiply-adds for one sample."""
        return sum(row.madds for row in self.rows)

    @property
    def table(self) -> Table:
        """The layers with multiply-adds, the sum of the others, and the total."""
        counted = [row for row in self.rows if row.madds]
        others = [row for row in self.rows if not row.madds]
        lines = [
            (
                row.name or "(itself)",
                row.kind,
                " x ".join(map(str, row.output_shape or ())),
                f"{row.parameters:,}",
                f"{row.madds:,}",
            )
            for row in counted
        ]
        if others:
            kinds = ", ".join(dict.fromkeys(row.kind for row in others))
            lines.append((f"{len(others)} others", kinds, "", f"{sum(row.parameters for row in others):,}", ""))
        lines.append(("total", "", "", f"{self.parameters:,}", f"{self.madds:,}"))
        return Table(("layer", "kind", "output", "parameters", "multiply-adds"), lines, left=2)

    def __str__(self) -> str:
        """Return the table as plain text."""
        return str(self.table)

    def __rich__(self) -> Table:
        """Return the table, for rich."""
        return self.table


def profile(model: nn.Module, input_size: Sequence[int]) -> Profile:
    """Count the parameters and multiply-adds of a network, layer by layer.

    Multiply-adds are those of convolutions, transposed convolutions and linear layers. A dynamic layer counts its
    convolution, the layers of its attention, the scaling of the maps by channel and filter attention, one multiply-add
    for every weight of its n kernels to mix them (n > 1), and one more for the spatial attention; one of
    KernelWarehouse counts its n cells for every piece of its kernel. Everything else (biases, norms, activations,
    products that a network computes without such a layer) counts as none.

    The network runs once in evaluation mode on zeros, on its own device and in its dtype, and is left as it was.

    Args:
        model: any network that takes one tensor.
        input_size: shape of its input, (B, C, *map) or without the batch, (C, *map); (features,) for one without
            convolutions. Counts are for one sample whatever the batch.

    Returns:
        The counts; ``print`` shows a table.

    Raises:
        ValueError: `input_size` is not a shape. One that does not fit raises what the network raises.
    """
    check_module(model)
    x = zeros_for(model, input_size)
    calls = record_calls(model, x)
    seen: set[nn.Parameter] = set()
    rows = []
    for name, module in layers(model):
        own = {p for p in module.parameters(recurse=isinstance(module, PerSampleConv)) if p not in seen}
        seen |= own
        made = calls.get(module, [])
        madds = sum(count_madds(module, call) for call in made) // x.shape[0]
        if own or madds:
            shape = tuple(made[-1].y[1:]) if made else None
            rows.append(Row(name, type(module).__name__, shape, sum(p.numel() for p in own), madds))
    return Profile(rows)


def layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield all modules of a network by name, a dynamic layer as one with its attention."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PerSampleConv) and module.attention is not None:
            inside.update(module.attention.modules())
        if module not in inside:
            yield name, module


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers a module learns, or could learn if nothing were frozen."""
    return sum(parameter.numel() for parameter in module.parameters())


def zeros_for(model: nn.Module, input_size: Sequence[int], name: str = "input_size") -> Tensor:
    """Return an input of zeros with a batch axis, on the model's device and in its dtype; errors name it `name`."""
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if not size or not all(isinstance(length, int) and length > 0 for length in size):
        raise ValueError(f"{name} must be positive ints, (B, C, *map) or (C, *map), got {input_size!r}")
    convolutions = (*CONVOLUTIONS, *TRANSPOSED, PerSampleConv)
    first = next((module for module in model.modules() if isinstance(module, convolutions)), None)
    if len(size) == (1 if first is None else 1 + len(first.kernel_size)):
        size = (1, *size)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(size, device=weight.device, dtype=weight.dtype)


def record_calls(model: nn.Module, x: Tensor) -> dict[nn.Module, list[Call]]:
    """Run the network in evaluation mode, leave it as it was, and return the calls of each layer."""
    calls: dict[nn.Module, list[Call]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.setdefault(module, []).append(Call(inputs[0].shape, output.shape))

    with torch.no_grad():
        run_hooked(model, x, [module for _, module in layers(model)], record)
    return calls


def run_hooked(
    model: nn.Module,
    x: Tensor,
    hooked: Iterable[nn.Module],
    hook: Callable[[nn.Module, tuple[Any, ...], Any], None],
    training: bool = False,
) -> None:
    """Run a network once, with a hook after the forward pass of some modules, and leave it as it was."""
    before = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # what changes them, changes copies
    hooks = [module.register_forward_hook(hook) for module in hooked]
    cuda = [x.device] if x.device.type == "cuda" else []
    try:
        model.train(training)
        with torch.random.fork_rng(cuda):
            torch.func.functional_call(model, buffers, (x,))
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in before.items():
            module.training = mode


def count_madds(module: nn.Module, call: Call) -> int:
    """Multiply-adds of one call of a layer, for the whole batch."""
    if isinstance(module, DynamicConv):
        places = call.x if module.transposed else call.y
        return places.numel() * module.weight[0, 0].numel() + count_attention(module, call)
    if isinstance(module, KWConv):
        return call.y.numel() * math.prod(module.kernel_shape[1:]) + call.x[0] * count_mixing(module)
    if isinstance(module, CONVOLUTIONS):
        return call.y.numel() * module.weight[0].numel()
    if isinstance(module, TRANSPOSED):
        return call.x.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return call.y.numel() * module.in_features
    return 0


def count_mixing(layer: KWConv) -> int:
    """Return what a layer of KernelWarehouse computes for a sample besides its convolution."""
    assert layer.attention is not None
    pieces = len(layer.attention.place.pieces)
    linear = [module for module in layer.attention.modules() if isinstance(module, nn.Linear)]
    repeated = {layer.attention.fc3: pieces}  # which mixes the logits of each piece
    return pieces * layer.cells.numel() + sum(module.weight.numel() * repeated.get(module, 1) for module in linear)


def count_attention(layer: DynamicConv, call: Call) -> int:
    """Return what a dynamic layer computes besides its convolution."""
    heads = layer.attention.heads
    pointwise = sum(module.weight.numel() for module in layer.attention.modules() if isinstance(module, CONVOLUTIONS))
    passes = (layer.kernel_num > 1) + ("spatial" in heads)  # over all weights: mixing, spatial attention
    scaled = call.x.numel() * ("channel" in heads) + call.y.numel() * ("filter" in heads)
    return call.x[0] * (pointwise + passes * layer.weight.numel()) + scaled
