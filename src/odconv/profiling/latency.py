"""How long a network takes."""

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn


def latencies(models: Sequence[nn.Module], x: Tensor, runs: int = 10) -> list[float]:
    """Median time of a forward pass of each model, in seconds; the models take turns, so that they share the noise.

    Args:
        models: networks in evaluation mode, on x's device.
        x: their input.
        runs: timed passes of each, after two to warm up.
    """
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(2 + runs):
            for model, taken in zip(models, times, strict=True):
                synchronize(x.device)
                start = time.perf_counter()
                model(x)
                synchronize(x.device)
                taken.append(time.perf_counter() - start)
    return [median(taken[2:]) for taken in times]


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe(device: torch.device) -> str:
    """Return what the latency was measured on."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} CPU thread{'s' * (threads > 1)}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
