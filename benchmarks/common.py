"""What every benchmark shares: the published form, alternating timings, and rows that say where they come from."""

import copy
import csv
import ctypes
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from odconv.app.data import Images
from odconv.layers import attention as attention_room
from odconv.layers import conv as layer_room
from odconv.ops.contract import Attentions, Geometry

RESULTS = Path(__file__).parent / "results"
PROCESS = Path("/proc/self")
MODELS = ("od_resnet18", "od_resnet50", "od_mobilenetv2_100")
SHORT = 100  # ms: of a run that finds much of what it reads in the caches where it was called just before


def published_conv(
    x: Tensor,
    weight: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    geometry: Geometry,
    **_: Any,
) -> Tensor:
    """The operator as published, in the place of :func:`odconv.ops.dynamic_conv.compute`.

    ODConv: kernels broadcast to (B, n, O, C, k, k) and summed, then a convolution of B * groups groups; but one shared
    convolution for a single 1x1 kernel. CondConv and DyConv, which have the kernel attention alone: a matrix product
    instead of the sum.
    """
    kernel, spatial, channel, filter = attentions
    batch, taps = x.shape[0], weight.shape[3:]
    x = x if channel is None else x * channel[:, :, None, None]
    if spatial is None and kernel is None:
        y = F.conv2d(x, weight[0], None, *geometry)
    else:
        if channel is None and spatial is None and filter is None:
            mixed = (kernel @ weight.flatten(1)).view(-1, *weight.shape[2:])
        else:
            gates = 1 if spatial is None else spatial.view(batch, 1, 1, 1, *taps)
            gates = gates if kernel is None else gates * kernel.view(batch, -1, 1, 1, 1, 1)
            mixed = (gates * weight[None]).sum(1).flatten(0, 1)
        geometry = geometry._replace(groups=batch * geometry.groups)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), mixed, None, *geometry)
        y = y.view(batch, -1, *y.shape[2:])
    y = y if filter is None else y * filter[:, :, None, None]
    return y if bias is None else y + bias[..., None, None]


@contextmanager
def published_form() -> Iterator[None]:
    """Let every dynamic layer compute as published: the operator, and the attention in plain PyTorch."""
    ours = layer_room.compute, attention_room.fused_attention
    layer_room.compute, attention_room.fused_attention = published_conv, lambda attention, x: None
    try:
        yield
    finally:
        layer_room.compute, attention_room.fused_attention = ours


def milliseconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    before = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - before)


def alternate(runs: dict[str, Callable[[], Any]], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns so that a busy machine slows all alike.

    Each turn has another order, and a run that takes less than `SHORT` is called once before it is timed: what another
    one left in the caches is not what it finds where it runs alone.
    Goes on for `seconds`, and until every run was taken `least` times or took `seconds` by itself: what is much slower
    than the others is measured once.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    taken = {}
    for name, run in runs.items():
        taken[name] = milliseconds(run)
    started = time.perf_counter()
    waiting = list(runs)
    while waiting:
        order.shuffle(waiting)
        for name in waiting:
            if taken[name] < SHORT:
                runs[name]()
            taken[name] = milliseconds(runs[name])
            times[name].append(taken[name])
        if time.perf_counter() - started >= seconds:
            waiting = [name for name in waiting if len(times[name]) < least and sum(times[name]) < 1e3 * seconds]
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds."""
    p10, p50, p90 = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"median_ms": round(p50, 3), "p10_ms": round(p10, 3), "p90_ms": round(p90, 3), "runs": len(times)}


def give_back_memory() -> ctypes.CDLL:
    """Let this process give every larger block back to the system when it is freed; return the C library."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD
    return libc


def resident_mb(entry: str) -> float:
    """VmRSS, the resident memory of this process, or VmHWM, its highest since `forget_peak`, in MB."""
    return int(re.search(rf"{entry}:\s+(\d+) kB", (PROCESS / "status").read_text())[1]) * 1024 / 1e6


def forget_peak() -> None:
    (PROCESS / "clear_refs").write_text("5")


def saved_mb(model: nn.Module, x: Tensor) -> float:
    """MB that autograd keeps of a forward pass, every storage once, without parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return round(sum(storage.nbytes() for storage in saved.values()) / 1e6, 1)


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


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV."""
    save_rows(path, rows)
    print(f"{len(rows)} rows in {path}")


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def subset(images: Images, indices: list[int]) -> Images:
    """Some of the images."""
    chosen = copy.copy(images)
    chosen.sources, chosen.labels = [images.sources[i] for i in indices], [images.labels[i] for i in indices]
    return chosen


class Sheet:
    """A CSV that is written after every addition; a row that is measured again takes the place of the old one."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {self._key(row): row for row in read_rows(path)}

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows |= {self._key(row): row for row in rows}
        save_rows(self.path, list(self.rows.values()))

    def _key(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(key)) for key in self.keys)
