"""Kernels in the order that the compiled kernel computes with, kept from call to call in networks that only infer."""

from typing import Any

import torch
from torch import Tensor, nn

from odconv.ops import cpu
from odconv.ops.contract import is_exporting, is_transformed


class Packed:
    """The kernels of a layer, packed at the first call and wherever they were changed since.

    What is changed behind PyTorch's back, as ``weight.data.mul_(2)`` does, is not seen; nor is, in a compiled network,
    what is changed after it was compiled.
    """

    def __init__(self) -> None:
        self._kernels: Tensor | None = None
        self._key: Any = None

    def of(self, weight: Tensor, groups: int) -> Tensor | None:
        """Return a layer's kernels as :func:`odconv.ops.cpu.pack` makes them; None where they are taken as they are."""
        if weight.dtype not in cpu.HALF or torch.is_grad_enabled() or is_exporting():
            return None
        if not torch.compiler.is_compiling():
            plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_inference()
            if not plain or is_transformed():  # whose memory is elsewhere, or whose changes are not counted
                return None
            key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
            if key != self._key:
                self._kernels, self._key = cpu.pack(weight, groups), key
        return self._kernels

    def __reduce__(self) -> tuple[type["Packed"], tuple]:
        return Packed, ()  # copies and pickles pack their own
