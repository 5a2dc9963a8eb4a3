"""Where one process computes."""

from typing import Literal, TypeAlias

import torch

Device: TypeAlias = Literal["auto", "cpu", "gpu"]


def find_device(name: Device) -> torch.device:
    """Return the device to compute on; auto is a GPU where CUDA finds one.

    Raises:
        ValueError: gpu, and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        raise ValueError("device gpu needs an accelerator, and PyTorch finds none here")
    return accelerator
