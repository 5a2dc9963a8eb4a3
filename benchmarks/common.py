"""What every benchmark shares: the published form, alternating timings, and rows that say where they come from."""

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.layers import conv as layer_room

RESULTS = Path(__file__).parent / "results"


def published_conv(
    x: Tensor, weight: Tensor, *, kernel, spatial, channel, filter, bias, stride, padding, dilation, groups
):
    """The operator as published: kernels broadcast to (B, n, O, C, k, k), summed, then B * groups groups."""
    batch, taps = x.shape[0], weight.shape[3:]
    x = x if channel is None else x * channel[:, :, None, None]
    mixed = weight[None]
    if spatial is not None:
        mixed = spatial.view(-1, 1, 1, 1, *taps) * mixed
    if kernel is not None:
        mixed = kernel.view(batch, -1, 1, 1, 1, 1) * mixed
    mixed = mixed.expand(batch, *mixed.shape[1:]).sum(1).flatten(0, 1)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), mixed, None, stride, padding, dilation, batch * groups)
    y = y.view(batch, -1, *y.shape[2:])
    return y if filter is None else y * filter[:, :, None, None]


@contextmanager
def published_form() -> Iterator[None]:
    """Let every dynamic layer compute as published."""
    with mock.patch.object(layer_room, "dynamic_conv", published_conv):
        yield


def alternate(runs: dict[str, Callable[[], Any]], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < least:
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - before))
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds."""
    p10, p50, p90 = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"median_ms": round(p50, 3), "p10_ms": round(p10, 3), "p90_ms": round(p90, 3), "runs": len(times)}


def origin() -> dict[str, Any]:
    """Machine, versions and commit of a row."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        processor = models[0] if models else processor
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "machine": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in {path}")
