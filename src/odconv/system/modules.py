"""What functions of whole networks ask of what they are given."""

from typing import Any

from torch import nn


def check_module(model: Any, name: str = "model") -> None:
    """Raise a TypeError that names the argument unless it is a module."""
    if not isinstance(model, nn.Module):
        hint = f"; odconv.create_model({model!r}) makes a network of the zoo" if isinstance(model, str) else ""
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}{hint}")
