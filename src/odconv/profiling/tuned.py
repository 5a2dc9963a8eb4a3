"""Backends chosen ahead for all layers of a network, by measuring where that is how they are chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from odconv.layers import PerSampleConv
from odconv.ops import tuning
from odconv.ops.tuning import cuda
from odconv.ops.tuning.memory import memory_of
from odconv.profiling.count import run_hooked, zeros_for
from odconv.profiling.explanation import Explanation, explain
from odconv.profiling.table import Table
from odconv.system.modules import check_module


class TunedLayer(NamedTuple):
    """What was chosen for a layer.

    Attributes:
        name: the layer's name in the network.
        kind: its class.
        shape: shape of its input, (B, C, *map).
        training: whether it is for training steps.
        explanation: the backend, why it was chosen, and the times that were measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    training: bool
    explanation: Explanation


@dataclass(frozen=True)
class Tuning:
    """What was chosen for the layers of a network; prints as a table (``rich.print`` gives a coloured one).

    Attributes:
        rows: the dynamic layers in the order in which they were called, once for each shape and mode.
        note: what the choices rest on, in a sentence.
    """

    rows: list[TunedLayer]
    note: str

    @property
    def table(self) -> Table:
        """The layers, and the least milliseconds of each backend that was timed."""
        timed = list(dict.fromkeys(name for row in self.rows for name in row.explanation.milliseconds))
        lines = []
        for row in self.rows:
            times = row.explanation.milliseconds
            lines.append(
                (
                    row.name or "(itself)",
                    row.kind,
                    "training" if row.training else "inference",
                    " x ".join(map(str, row.shape)),
                    row.explanation.backend,
                    *(f"{times[name]:.3f}" if name in times else "" for name in timed),
                )
            )
        return Table(("layer", "kind", "mode", "input", "backend", *(f"{name} ms" for name in timed)), lines, left=5)

    def __str__(self) -> str:
        """Return the table and the note as plain text."""
        return f"{self.table}\n{self.note}"

    def __rich__(self) -> Any:
        """Return the same for rich."""
        from rich.console import Group

        return Group(self.table, self.note)


def tune(
    model: nn.Module,
    input: Sequence[int] | Tensor,
    *,
    training: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tuning:
    """Choose the backends of all dynamic layers of a network ahead, so that no later call has to measure.

    On CUDA the first call of each shape measures the backends, and its choice is remembered; this function makes these
    calls: it runs the network once in evaluation mode without gradients and, where asked, once in training mode with
    them. Elsewhere the policy's limits hold, and what they choose is returned. The network, its gradients and the
    random numbers to come are left as they were. Dtypes are those of the network, or autocast's under autocast.

    Args:
        model: any network with dynamic layers that takes one tensor.
        input: shape of its input, (B, C, *map), of which random numbers are drawn on the network's device and in its
            dtype, or the input itself; batch and map as they will be used.
        training: whether to choose for training steps, too.
        memory_format: of the input that is drawn, such as ``torch.channels_last``, in which alone Triton takes part.

    Returns:
        The backend of each layer, and the times; ``print`` shows a table.

    Raises:
        TypeError: model is no module, input neither a shape nor a tensor, or memory_format of another kind.
        ValueError: model has no dynamic layers, input is not a shape, or memory_format does not suit it. An input that
            does not fit raises what the network raises.
    """
    check_module(model)
    names = {module: name for name, module in model.named_modules() if isinstance(module, PerSampleConv)}
    if not names:
        raise ValueError(f"model must have dynamic layers, got a {type(model).__name__} without one")
    x = input.detach() if isinstance(input, Tensor) else random_input(model, input, memory_format)
    rows = []
    for mode in (False, True) if training else (False,):
        called: dict[tuple[PerSampleConv, torch.Size, torch.memory_format, bool], None] = {}

        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any, called: dict[Any, None] = called) -> None:
            given = (inputs[0], layer.parts, *layer.parameters())
            wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
            called[layer, inputs[0].shape, suggest_memory_format(inputs[0]), wanted] = None

        with torch.set_grad_enabled(mode):
            run_hooked(model, x, names, record, mode)
        for layer, shape, layout, differentiated in called:
            found = explain(layer, shape, training=differentiated, memory_format=layout)
            rows.append(TunedLayer(names[layer], type(layer).__name__, tuple(shape), mode, found))
    return Tuning(rows, note_on(x.device))


def random_input(model: nn.Module, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """Return random numbers as an input of a network, without drawing from PyTorch's own."""
    if not isinstance(shape, Sequence):
        raise TypeError(f"input must be a tensor or a shape, (B, C, *map), got {type(shape).__name__}")
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format must be a torch.memory_format, got {memory_format!r}")
    x = zeros_for(model, shape, "input")
    try:
        return x.normal_(generator=torch.Generator(x.device).manual_seed(0)).contiguous(memory_format=memory_format)
    except RuntimeError as error:
        raise ValueError(f"memory_format must suit an input of {tuple(x.shape)}, got {memory_format}") from error


def note_on(device: torch.device) -> str:
    """Say what the choices on a device rest on."""
    if not cuda.is_timed(device):
        return f"nothing to tune on {device.type}: limits that were measured before choose the backends there"
    if not tuning.is_on():
        return "nothing was measured: ODCONV_TUNE=0 switches it off"
    if torch.are_deterministic_algorithms_enabled():
        return "nothing was measured: torch.use_deterministic_algorithms asks for runs that repeat"
    memory = memory_of(device)
    return f"measured on {memory.environment['device']}, kept in {memory.path}"
