"""CUDA chooses by measuring: the first call of a shape times the backends, and the fastest is remembered.

The limits in policy.py were measured on processors; on a GPU the policy's choice holds where nothing is measured. A
problem is the shape of a call, with batch and map rounded up to powers of two, and all else that the times depend on:
:func:`~odconv.ops.tuning.problem.describe` says it. Triton is taken only where its output and gradients are those of
plain PyTorch.

Choices are kept in the cache folder, in a file for each kind of device and versions of what runs there. It holds names
and numbers alone; where it chooses Triton, every process checks that again before it follows.
"""

import math
import os
import sys
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from odconv.ops import triton
from odconv.ops.contract import is_channels_last, is_exporting, is_transformed
from odconv.ops.policy import EAGER, Choice, is_pointwise
from odconv.ops.tuning import cuda
from odconv.ops.tuning.memory import TRITON, Measured, Memory, measured, memory_of, warn
from odconv.ops.tuning.problem import Call, describe_call
from odconv.ops.tuning.trial import Run, Trial, attempt, norm, tells, timed

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


def applies(x: Tensor, weight: Tensor, device: torch.device) -> bool:
    """Return whether a call's backend is chosen by measuring: one that computes now, and need not repeat to the bit.

    Compiled graphs take the policy's choice: what is measured are backends by themselves, which a compiler fuses.
    """
    return (
        cuda.is_timed(device)
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
    if _get_current_dispatch_mode_stack() or cuda.is_capturing() or not _measuring.acquire(blocking=False):
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
    last = is_channels_last(x)
    return [*names, TRITON] if triton.takes(x) and last and not call.per_sample else names


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


def refuse(memory: Memory, problem: str, kind: str, what: str) -> None:
    """Never take Triton again for a problem in this process, and say so, once for each kind of failure."""
    memory.refused.add(problem)
    warn(kind, f"backend 'triton' {what}; it is not taken for this, nor for what else that happens to: {problem}")
