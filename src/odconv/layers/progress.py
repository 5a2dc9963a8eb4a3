"""One schedule for all methods: how far the attentions of a network are from alike to free."""

import warnings

from torch import nn

from odconv.layers.attention import check_temperature, try_temperature
from odconv.layers.warehouse_attention import try_blend


def set_progress(model: nn.Module, progress: float, *, temperature: float = 30.0) -> None:
    """Say how far a network's training has come from fixed kernels to free attentions.

    All attentions of ODConv and DyConv have the temperature ``temperature + progress * (1 - temperature)``, and all of
    KernelWarehouse the blend ``1 - progress``: with ``progress = min(1, step / steps)`` of the first epochs, these are
    the published schedules of both.

    Args:
        model: any module; one with neither is left as it is, with a warning.
        progress: from 0 to 1.
        temperature: the one to begin with. Default 30, as published.

    Raises:
        ValueError: an argument is out of range, or the model is on the meta device.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be from 0 to 1, got {progress!r}")
    check_temperature(temperature)
    tempered = try_temperature(model, temperature + progress * (1 - temperature))
    if not try_blend(model, 1 - progress) and not tempered:
        warnings.warn(
            f"no layer of the {type(model).__name__} has a temperature or a blend: none was set", stacklevel=2
        )
