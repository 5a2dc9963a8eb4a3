"""Keeping the attentions of a network while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odconv.layers import Attentions, PerSampleConv


def record_attentions(model: nn.Module, x: Tensor) -> dict[str, Attentions]:
    """Run a network on some inputs and keep the attentions of its dynamic layers.

    The network runs in evaluation mode and is left as it was.

    Args:
        model: a network with dynamic layers.
        x: its input, (B, C, *map), on its device.

    Returns:
        The attentions by the name of their layer, on the CPU; those of the last call of a layer that is called often.

    Raises:
        ValueError: the network has no dynamic layers.
    """
    with recording(model) as recorded:
        model(x)
    return recorded


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Attentions]]:
    """Give what :func:`record_attentions` returns, of each call of the network within the block."""
    recorded: dict[str, Attentions] = {}
    names: dict[nn.Module, str] = {
        module.attention: name
        for name, module in model.named_modules()
        if isinstance(module, PerSampleConv) and module.attention is not None
    }
    if not names:
        raise ValueError(f"model must have dynamic layers, got a {type(model).__name__} without")

    def record(module: Any, _: Any, found: Any) -> None:
        attentions = module.named(found)
        recorded[names[module]] = Attentions(*(None if a is None else a.detach().cpu() for a in attentions))

    training = {module: module.training for module in model.modules()}
    hooks = [attention.register_forward_hook(record) for attention in names]
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code would not call the hooks
            yield recorded
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
