"""The choices for one kind of device, which the cache folder keeps."""

import json
import math
import warnings
from collections import OrderedDict
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

from odconv import __version__
from odconv.ops import triton
from odconv.ops.policy import EAGER, Choice
from odconv.ops.tuning import cuda
from odconv.system.files import alone, cache_folder, open_regular, write_json
from odconv.system.text import printable

TRITON = "triton"
REMEMBERED = 1024
"""Problems that are remembered for a kind of device; those that were met least recently are forgotten."""
LARGEST = 4 * 2**20
"""Bytes of a file of choices, which has less than a tenth of that."""


class Measured(NamedTuple):
    """A backend that was chosen by measuring, and the times of all that ran, the shortest of each."""

    choice: Choice
    milliseconds: dict[str, float]


class Memory:
    """The choices for one kind of device, the ones met last at the end; their file is read at once.

    Attributes:
        environment: the device and the versions of what runs there.
        name: of the file.
        found: the choices by problem.
        unchecked: problems whose choice comes from the file, and that this process has not met yet.
        refused: problems that Triton failed at in this process.
    """

    def __init__(self, device: torch.device) -> None:
        name, capability = cuda.name_device(device)
        self.environment = {"device": name, "capability": capability} | versions()
        self.name = f"tuned-{sha256(json.dumps(self.environment).encode()).hexdigest()[:16]}.json"
        self.lock = Lock()
        self.found = OrderedDict(self.read())
        self.unchecked = {*self.found}
        self.refused: set[str] = set()

    @property
    def path(self) -> Path:
        """Where the file is; a RuntimeError where the user has no home."""
        return cache_folder() / self.name

    def recall(self, problem: str) -> Measured | None:
        """Return the choice for a problem, and remember that it was met."""
        with self.lock:
            if problem in self.found:
                self.found.move_to_end(problem)
            return self.found.get(problem)

    def remember(self, problem: str, known: Measured) -> None:
        """Remember a choice, here and among those that other processes have put into the file."""
        with self.lock:
            self.unchecked.discard(problem)
            self.found[problem] = known
            self.found.move_to_end(problem)
            if len(self.found) > REMEMBERED:
                self.found.popitem(last=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with alone(self.path):
                kept = self.read()
                kept.pop(problem, None)
                kept = dict([*kept.items(), (problem, known)][-REMEMBERED:])
                choices = {
                    name: {"backend": choice.backend, "milliseconds": times} for name, (choice, times) in kept.items()
                }
                write_json(self.path, {"environment": self.environment, "choices": choices})
        except (OSError, RuntimeError) as error:
            warn("unwritten", f"odconv's choices of backends are not kept for other processes: {error}")

    def read(self) -> dict[str, Measured]:
        """Return the choices in the file; none where there is no file, or one that is damaged."""
        try:
            with open_regular(self.path, LARGEST) as file:
                return parse(file.read(LARGEST).decode(), self.environment)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RuntimeError) as error:  # a RecursionError, too
            reason = printable(error)[:200] or type(error).__name__
            warn("unread", f"{self.name} in odconv's cache folder is ignored, and backends are measured anew: {reason}")
            return {}


def parse(text: str, environment: dict[str, str]) -> dict[str, Measured]:
    """Return the choices that a file holds.

    Raises:
        ValueError, RecursionError: it is not what :meth:`Memory.remember` writes for this environment.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() != {"environment", "choices"}:
        raise ValueError("it has no environment and choices")
    if content["environment"] != environment:
        raise ValueError("it is of another environment")
    choices = content["choices"]
    if not isinstance(choices, dict) or len(choices) > REMEMBERED:
        raise ValueError(f"it has no choices, or more than {REMEMBERED}")
    return {problem: parse_choice(choice, environment["device"]) for problem, choice in choices.items()}


def parse_choice(choice: Any, device: str) -> Measured:
    """Return a choice of a file; a ValueError where it is none."""
    if not isinstance(choice, dict) or choice.keys() != {"backend", "milliseconds"}:
        raise ValueError("a choice has no backend and milliseconds")
    backend, times = choice["backend"], choice["milliseconds"]
    if not isinstance(times, dict) or backend not in [*times] or not {*times} <= {*EAGER, TRITON}:
        raise ValueError("a choice is of no known backend")
    if not all(type(ms) is float and 0 <= ms < math.inf for ms in times.values()):
        raise ValueError("a time is no number of milliseconds")
    return measured(backend, times, device)


def measured(backend: str, milliseconds: dict[str, float], device: str) -> Measured:
    """Return a choice with the times as its reason."""
    times = sorted(milliseconds.items(), key=lambda item: item[1])
    why = f"measured on {device}: {', '.join(f'{name} {ms:.3f} ms' for name, ms in times)}"
    return Measured(Choice(backend, why), milliseconds)


@cache
def memory_of(device: torch.device) -> Memory:
    """Return what is remembered for a device."""
    return Memory(device)


@cache
def versions() -> dict[str, str]:
    """Return the versions of what runs on a device."""
    names = metadata.packages_distributions().get("triton", ()) if triton.INSTALLED else ()
    found = {name: metadata.version(name) for name in sorted({*names})}
    return {"odconv": __version__, "torch": torch.__version__, "triton": " ".join(found.values()) or "none"}


def warn(kind: str, message: str) -> None:
    """Warn, once for each kind."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, stacklevel=2)


_warned: set[str] = set()
