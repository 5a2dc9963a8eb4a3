"""Groups of parameters for any optimizer: a pace of their own for attentions, and no weight decay where it harms."""

import warnings
from typing import Any, Literal

from torch import nn

from odconv.layers import PoolingAttention
from odconv.system.modules import check_module


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    attention_lr: float = 1.0,
    decay: Literal["weights", "all"] = "weights",
) -> list[dict[str, Any]]:
    """Sort the parameters of a network into groups, as optimizers of PyTorch take them.

    Attentions learn at their own rate. Weight decay leaves biases and norms alone, where it would close the gates of
    new attentions::

        optimizer = torch.optim.AdamW(odconv.parameter_groups(model, lr=1e-3, weight_decay=0.05, attention_lr=0.5))

    Args:
        model: any network; a warning says where attention_lr has no effect, as it has no dynamic layers.
        lr: learning rate, above 0.
        weight_decay: of the weights, at least 0. Default 0.
        attention_lr: learning rate of the attentions as a factor of lr, at least 0. Default 1.
        decay: "weights", or "all" for weight decay on every parameter, as published. Default "weights".

    Returns:
        Up to four groups of the parameters that are not frozen, each with `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: a number is out of range.
        TypeError: it is no number.
    """
    check_module(model)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("attention_lr", attention_lr)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= value < float("inf") or (name == "lr" and value == 0):
            raise ValueError(f"{name} must be a {'positive' if name == 'lr' else 'non-negative'} number, got {value!r}")
    if decay not in ("weights", "all"):
        raise ValueError(f"decay must be 'weights' or 'all', got {decay!r}")
    attentions = {
        parameter for part in model.modules() if isinstance(part, PoolingAttention) for parameter in part.parameters()
    }
    if not attentions and attention_lr != 1:
        warnings.warn(f"the {type(model).__name__} has no dynamic layers: attention_lr has no effect", stacklevel=2)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr * attention_lr if parameter in attentions else lr
            plain = decay == "weights" and (parameter.ndim <= 1 or name.endswith("bias"))
            groups.setdefault((rate, 0.0 if plain else weight_decay), []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]
