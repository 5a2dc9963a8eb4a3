"""What the tuner asks of CUDA; tests put a clock of their own and the CPU in its place."""

from collections.abc import Callable
from typing import Any

import torch


def is_timed(device: torch.device) -> bool:
    """Return whether backends are timed on a device."""
    return device.type == "cuda"


def is_capturing() -> bool:
    """Return whether a CUDA graph is captured, in which nothing can be waited for."""
    return torch.cuda.is_current_stream_capturing()


def name_device(device: torch.device) -> tuple[str, str]:
    """Return a device's name and capability."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long a run takes, from an idle device to an idle device: with what Python takes to launch it."""
    stream = torch.cuda.current_stream(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream.synchronize()
    begin.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end)
