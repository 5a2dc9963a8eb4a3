"""Runs of one call by different backends: their results, and their times."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.graph import saved_tensors_hooks

from odconv.ops.contract import Attentions, output_size
from odconv.ops.tuning import cuda
from odconv.ops.tuning.problem import Call

BUDGET, ROUNDS = 20.0, 20
"""Milliseconds, and runs of each backend, after which no other round of timings begins."""
HOPELESS = 2.0
"""How many times as long as the fastest a backend may take to be timed again."""

logger = logging.getLogger("odconv.ops")

Run = Callable[..., Tensor]  # of the name of a backend, and of what a call has


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
        return cuda.milliseconds(partial(self.results, backend), self.call.x.device)


def itself(tensor: Tensor) -> Tensor:
    """Return a tensor as it is saved, or was."""
    return tensor


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


def norm(values: Tensor) -> float:
    """Return the norm of a tensor's numbers, summed in float32 at least."""
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)).item()


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
