"""CUDA chooses by measuring: the first call of a shape times the backends, and the fastest is remembered.

The limits in policy.py were measured on processors; on a GPU the policy's choice holds where nothing is measured. A
problem is the shape of a call, with batch and map rounded up to powers of two, and all else that the times depend on:
:func:`describe` says it. Triton is taken only where its output and gradients are those of plain PyTorch.

Choices are kept in the cache folder, in a file for each kind of device and versions of what runs there. It holds names
and numbers alone; where it chooses Triton, every process checks that again before it follows.
"""

import json
import logging
import math
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from odconv import __version__
from odconv.ops import triton
from odconv.ops.contract import Attentions, Geometry, is_exporting, is_transformed, output_size
from odconv.ops.policy import EAGER, Choice, is_pointwise
from odconv.system.files import alone, cache_folder, open_regular, write_json
from odconv.system.text import printable

TRITON = "triton"
REMEMBERED = 1024
"""Problems that are remembered for a kind of device; those that were met least recently are forgotten."""
BUDGET, ROUNDS = 20.0, 20
"""Milliseconds, and runs of each backend, after which no other round of timings begins."""
HOPELESS = 2.0
"""How many times as long as the fastest a backend may take to be timed again."""
MARGIN = 0.95
"""What share of the time of the policy's choice another backend must stay below to take its place."""
TOLERANCES = {torch.float64: 1e-10} | {
    dtype: 8 * torch.finfo(like).eps
    for dtype, like in (
        (torch.float32, torch.float16),  # on matrix units plain PyTorch rounds float32 to TF32, which is as long
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    )
}
"""Norm of what Triton may differ by, over the norm of the output, or of a gradient."""
LARGEST = 4 * 2**20
"""Bytes of a file of choices, which has less than a tenth of that."""

logger = logging.getLogger("odconv.ops")


class Measured(NamedTuple):
    """A backend that was chosen by measuring, and the times of all that ran, the shortest of each."""

    choice: Choice
    milliseconds: dict[str, float]


class Call(NamedTuple):
    """A call of the operator, its tensors in the dtype that is computed in."""

    x: Tensor
    weight: Tensor
    attentions: Attentions
    geometry: Geometry
    differentiated: bool
    per_sample: bool


Run = Callable[..., Tensor]  # of the name of a backend, and of what a call has


def applies(x: Tensor, weight: Tensor, device: torch.device) -> bool:
    """Return whether a call's backend is chosen by measuring: one that computes now, and need not repeat to the bit.

    Compiled graphs take the policy's choice: what is measured are backends by themselves, which a compiler fuses.
    """
    return (
        is_timed(device)
        and not (torch.compiler.is_compiling() or is_exporting())
        and is_on()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, weight))  # no fake and no sharded ones
        and x.numel() > 0
        and x.dtype in TOLERANCES
        and not is_transformed()
        and not torch.are_deterministic_algorithms_enabled()
    )


def tuned(default: Choice, call: Call, run: Run) -> Choice:
    """Return the fastest backend for a call: the one that is remembered, or else measured now; or the default.

    Args:
        default: what the policy chooses; it holds where nothing can be measured.
        call: one that :func:`applies` holds for.
        run: computes its output by a backend of a name, of tensors that take the place of the call's.
    """
    memory, problem = memory_of(call.x.device), describe_call(call)
    known = memory.recall(problem)
    if known is not None and problem not in memory.unchecked:
        return known.choice
    candidates = candidates_for(call)
    if known is not None and known.choice.backend in candidates and known.choice.backend != TRITON:
        memory.unchecked.discard(problem)
        return known.choice
    if _get_current_dispatch_mode_stack() or is_capturing() or not _measuring.acquire(blocking=False):
        return default  # not waiting for another thread, which may wait for this one to compute its gradients
    try:
        known = measure(memory, problem, default.backend, candidates, Trial(call, run))
    except torch.cuda.OutOfMemoryError:  # for what it takes to compare
        known = None
    finally:
        _measuring.release()
    return default if known is None else known.choice


_measuring = Lock()


def is_on() -> bool:
    """Return whether choosing by measuring is not switched off by ODCONV_TUNE=0."""
    return os.environ.get("ODCONV_TUNE") != "0"


def candidates_for(call: Call) -> list[str]:
    """Return the backends that can compute a call and leave its output as others do."""
    x = call.x
    fits = {
        "single": len(x) == 1,
        "shared": not call.per_sample,
        "pointwise": is_pointwise(call.weight, call.geometry),
    }
    names = [name for name in EAGER if fits.get(name, True)]
    # its output is channels-last; where the input is not, whoever takes the output may not expect that
    last = x.movedim(1, -1).is_contiguous()
    return [*names, TRITON] if triton.takes(x) and last and not call.per_sample else names


def describe_call(call: Call) -> str:
    """Return which problem a call is."""
    present = [
        name for name, attention in zip(Attentions._fields, call.attentions, strict=True) if attention is not None
    ]
    return describe(call.x, call.weight, present, call.geometry, call.differentiated, call.per_sample)


def describe(
    x: Tensor, weight: Tensor, present: Iterable[str], geometry: Geometry, differentiated: bool, per_sample: bool
) -> str:
    """Return in words all that a choice depends on but for device and versions.

    Args:
        x: input, (B, C, *map), on any device.
        weight: n kernels, or one for each sample.
        present: names of the attentions that are not None, in their order.
        geometry: stride, padding, dilation and groups.
        differentiated: whether autograd wants gradients.
        per_sample: whether weight has one kernel for each sample.
    """
    batch, channels, *size = x.shape
    count, *kernel = weight.shape
    layout = "contiguous" if x.is_contiguous() else "channels-last" if x.movedim(1, -1).is_contiguous() else "strided"
    stride, padding, dilation, groups = geometry
    return (
        f"{str(x.dtype).removeprefix('torch.')} {'training' if differentiated else 'inference'}, "
        f"x {(rounded(batch), channels, *map(rounded, size))} {layout}, "
        f"{'a kernel for each sample' if per_sample else f'{count} kernels'} of {tuple(kernel)}, "
        f"{' '.join(present) or 'no attentions'}, "
        f"stride {stride}, padding {padding}, dilation {dilation}, groups {groups}"
    )


def rounded(size: int) -> int:
    """Return the least power of two that is no smaller."""
    return 1 << (size - 1).bit_length()


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
        name, capability = name_device(device)
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


class Trial:
    """Runs of one call by different backends, apart from the caller's tensors, gradients and random numbers."""

    def __init__(self, call: Call, run: Run) -> None:
        self.call, self.run = call, run
        x, weight = call.x, call.weight
        size = output_size(x.shape[2:], weight.shape[3:], *call.geometry[:3])
        own = torch.Generator(x.device).manual_seed(0)
        shape = (len(x), weight.shape[1], *size) if call.differentiated else (0,) * x.dim()
        numbers = torch.randn(shape, dtype=x.dtype, device=x.device, generator=own) / math.prod(size) ** 0.5
        self.upstream = numbers.contiguous(memory_format=suggest_memory_format(x))

    def results(self, backend: str) -> list[Tensor]:
        """Compute the output, and the gradients that are wanted."""
        x, weight, attentions, *rest = self.call
        if not self.call.differentiated:
            with torch.no_grad():
                return [self.run(backend, *self.call)]
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, weight, *attentions)]
        with saved_tensors_hooks(itself, itself):  # not the caller's, which may count what is saved
            y = self.run(backend, *leaves[:2], Attentions(*leaves[2:]), *rest)
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            return [y.detach(), *torch.autograd.grad(y, wanted, self.upstream)]

    def milliseconds(self, backend: str) -> float:
        """Return how long that takes."""
        return milliseconds(partial(self.results, backend), self.call.x.device)


def itself(tensor: Tensor) -> Tensor:
    """Return a tensor as it is saved, or was."""
    return tensor


def measure(memory: Memory, problem: str, default: str, candidates: Sequence[str], trial: Trial) -> Measured | None:
    """Return the fastest backend that works and is right, and remember it; None where the call does not tell.

    Where Triton was chosen before this process, it is checked and not timed again.
    """
    plain = iter(sorted((name for name in candidates if name != TRITON), key=lambda name: name != default))
    first, expected = next(((name, found) for name in plain if (found := attempt(name, trial))), ("", []))
    if not tells(expected):
        return None
    right = TRITON in candidates and is_right(memory, problem, trial, expected)
    known = memory.recall(problem)
    if right and problem in memory.unchecked and known is not None and known.choice.backend == TRITON:
        memory.unchecked.discard(problem)
        return known
    expected.clear()  # its memory is free while the backends are timed
    working = [first, *(name for name in plain if attempt(name, trial)), *([TRITON] if right else [])]
    times = timed(working, trial)
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    backend = best if times[best] < MARGIN * times.get(default, math.inf) else default
    known = measured(backend, times, memory.environment["device"])
    memory.remember(problem, known)
    return known


def attempt(backend: str, trial: Trial) -> list[Tensor] | None:
    """Return what a backend in plain PyTorch computes; None where it fails, most likely for lack of memory."""
    try:
        return trial.results(backend)
    except torch.cuda.OutOfMemoryError:
        return None
    except Exception as error:  # the policy's choice will raise it again for the caller
        logger.debug("backend %s is not considered: %s", backend, error)
        return None


def tells(results: Sequence[Tensor]) -> bool:
    """Return whether results are numbers, not all of them zero, so that what is wrong differs from them."""
    norms = [norm(result) for result in results]
    return all(map(math.isfinite, norms)) and norms[:1] > [0]


def is_right(memory: Memory, problem: str, trial: Trial, expected: Sequence[Tensor]) -> bool:
    """Return whether Triton computes what is expected; refuse it for good where it raises, or is wrong."""
    if problem in memory.refused:
        return False
    try:
        pairs = list(zip(trial.results(TRITON), expected, strict=True))
        errors = [norm(value - wanted) / max(norm(wanted), sys.float_info.min) for value, wanted in pairs]
    except torch.cuda.OutOfMemoryError:
        return False
    except Exception as error:
        lines = str(error).strip().splitlines()
        refuse(memory, problem, "raised", f"raises {type(error).__name__}: {lines[0][:200] if lines else ''}")
        return False
    right = all(error <= TOLERANCES[wanted.dtype] for error, (_, wanted) in zip(errors, pairs, strict=True))  # not NaN
    if not right:
        worst = ", ".join(f"{error:.1e}" for error in errors)
        refuse(memory, problem, "wrong", f"differs from plain PyTorch, of whose norms its errors are {worst}")
    return right


def norm(values: Tensor) -> float:
    """Return the norm of a tensor's numbers, summed in float32 at least."""
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)).item()


def refuse(memory: Memory, problem: str, kind: str, what: str) -> None:
    """Never take Triton again for a problem in this process, and say so, once for each kind of failure."""
    memory.refused.add(problem)
    warn(kind, f"backend 'triton' {what}; it is not taken for this, nor for what else that happens to: {problem}")


def timed(backends: Sequence[str], trial: Trial) -> dict[str, float]:
    """Return the least milliseconds of each backend, which take turns; what is hopeless is timed once."""
    times: dict[str, float] = {}
    waiting, spent = list(backends), 0.0
    for _ in range(ROUNDS):
        for name in tuple(waiting):
            try:
                taken = trial.milliseconds(name)
            except Exception as error:  # most likely for lack of memory
                logger.debug("backend %s is not considered: %s", name, error)
                waiting.remove(name)
                times.pop(name, None)
                continue
            spent += taken
            times[name] = min(taken, times.get(name, math.inf))
        waiting = [name for name in waiting if times[name] <= HOPELESS * min(times.values())]
        if spent >= BUDGET or len(waiting) < 2:
            break
    return times


def warn(kind: str, message: str) -> None:
    """Warn, once for each kind."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, stacklevel=2)


_warned: set[str] = set()


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


# What asks the device; tests put a clock of their own and the CPU in its place.


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
