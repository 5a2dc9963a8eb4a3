"""What functions of whole networks ask of what they are given."""

from typing import Any

from torch import nn


def check_module(model: Any) -> None:
    """Raise a TypeError unless an argument `model` is a module."""
    if not isinstance(model, nn.Module):
        hint = f"; odconv.create_model({model!r}) makes a network of the zoo" if isinstance(model, str) else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
