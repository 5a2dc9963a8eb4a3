"""Convolutions that hold a batch in their groups, the usual way of giving each sample a kernel of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from odconv.ops import per_sample_conv

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class UnfoldedBatch(TorchFunctionMode):
    """Computes convolutions of one image, whose groups are those of a whole batch, as convolutions of the batch.

    A layer folds B maps of C channels into one of B C, and B kernels of O filters into one of B O, with B times the
    groups. An exporter writes that B down, and a processor takes the groups one after the other. Other convolutions are
    left alone.

    Args:
        batch: the number B of samples.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, or compute what it would."""
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            given: dict[str, Any] = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
            x, weight, groups = given.pop("input"), given.pop("weight"), given.pop("groups", 1)
            folded = x.shape[0] == 1 and x.shape[1] == groups * weight.shape[1]
            if folded and self.batch and groups % self.batch == 0:
                return self._unfolded(x, weight, groups // self.batch, given)
        return func(*args, **kwargs)

    def _unfolded(self, x: Tensor, weight: Tensor, groups: int, given: dict[str, Any]) -> Tensor:
        samples = x.reshape(self.batch, -1, *x.shape[2:])
        kernels = weight.reshape(self.batch, -1, *weight.shape[1:])
        bias = given.pop("bias", None)
        own = None if bias is None else bias.reshape(self.batch, -1)
        y = per_sample_conv(samples, kernels, bias=own, groups=groups, **given)
        return y.reshape(1, -1, *y.shape[2:])
