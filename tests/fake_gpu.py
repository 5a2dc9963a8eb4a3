"""The CPU in the place of a GPU, and a clock by which every backend takes the time that a test gives it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from odconv.ops import cpu
from odconv.ops.dynamic_conv import BACKENDS, PER_SAMPLE
from odconv.ops.tuning import cuda, memory


class FakeGpu:
    """What the tuner asks of a device.

    Attributes:
        costs: milliseconds that each run of a backend takes.
        runs: names of the backends that ran.
        timings: how many runs were timed.
    """

    runs: list[str]
    timings: int

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.costs = {"single": 4.0, "shared": 3.0, "product": 1.0, "grouped": 2.0, "triton": 9.0}
        self.now = 0.0
        self.patch = monkeypatch
        self.folder = folder
        monkeypatch.setenv("ODCONV_CACHE", str(folder))
        monkeypatch.delenv("ODCONV_TUNE", raising=False)
        monkeypatch.setattr(cpu, "available", lambda: False)
        monkeypatch.setattr(cuda, "is_timed", lambda device: device.type == "cpu")
        monkeypatch.setattr(cuda, "is_capturing", lambda: False)
        monkeypatch.setattr(cuda, "name_device", lambda device: ("Fake GPU", "9.0"))
        monkeypatch.setattr(cuda, "milliseconds", self.milliseconds)
        for name in self.costs:
            for backends in (BACKENDS, PER_SAMPLE):
                if name in backends:
                    monkeypatch.setitem(backends, name, self.slow(name, backends[name]))
        self.restart()

    def slow(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a backend that takes its time."""

        def timed(*arguments: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.runs.append(name)
                self.now += self.costs[name]
            return run(*arguments)

        return timed

    def replace(self, name: str, run: Callable[..., Any]) -> None:
        """Put another function in the place of a backend."""
        self.patch.setitem(BACKENDS, name, self.slow(name, run))

    def milliseconds(self, run: Callable[[], Any], device: torch.device) -> float:
        before = self.now
        run()
        self.timings += 1
        return self.now - before

    def restart(self) -> None:
        """Be as in another process; the files stay."""
        forget()
        self.runs, self.timings = [], 0

    @property
    def memory(self) -> memory.Memory:
        """What is remembered for the device."""
        return memory.memory_of(torch.device("cpu"))

    @property
    def file(self) -> Path:
        """The file of choices."""
        (path,) = self.folder.glob("tuned-*.json")
        return path


def forget() -> None:
    """Forget what this process remembers."""
    memory.memory_of.cache_clear()
    memory._warned.clear()
