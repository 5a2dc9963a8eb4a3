"""What a fused network does to an output at once: an activation, and the means that the next attention pools."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}
"""The same as modules."""


class Epilogue(NamedTuple):
    """What follows a convolution.

    Attributes:
        activation: one of `ACTIVATIONS`, or None.
        means: whether the mean of each map is wanted beside the output, by the layer that takes it next.
    """

    activation: str | None = None
    means: bool = False


NO_EPILOGUE = Epilogue()


class Finished(NamedTuple):
    """What was done to a tensor already, and the means of its maps, (B, C), where they are known."""

    activation: str | None
    means: Tensor | None


def activate(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Return y activated, and say so beside it."""
    if epilogue.activation is None:
        return y
    return finish(ACTIVATIONS[epilogue.activation](y), Finished(epilogue.activation, None))


def finish(y: Tensor, finished: Finished) -> Tensor:
    """Say beside a tensor what was done to it; operations on it, but those in place, make others that say nothing."""
    if torch.compiler.is_compiling():
        y = y.view(y.shape)  # torch.compile forgets what is said beside one of two results
    y._odconv_finished = finished  # type: ignore[attr-defined]
    return y


def finished(x: Tensor) -> Finished:
    """Return what is said beside a tensor."""
    return getattr(x, "_odconv_finished", Finished(None, None))
