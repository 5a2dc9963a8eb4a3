"""What a run works on: the machine, without its name, and the versions of what takes part."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from odconv.app.data.parallel import count_cores

PACKAGES = ("odconv", "torch", "torchvision", "lightning")


def describe_machine(processes: int) -> dict[str, Any]:
    """Describe this machine, without its name or a user's, and the versions; None where something is unknown or absent.

    `cores` are those that this process may use, `memory` is in GiB, `processes` work together over all machines.
    """
    return {
        "processor": _processor(),
        "cores": count_cores(),
        "memory": _memory(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processes": processes,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def _processor() -> str | None:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not a system that says so
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
