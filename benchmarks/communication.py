"""What two processes say to each other in a step: gradient bytes, their all-reduce, its share of a training step.

    python benchmarks/communication.py                        bytes of every network; times of two of them
    python benchmarks/communication.py --models od_resnet50 --kernel_num 4 --batch 4 --ways plain

Two processes of one thread each, on this machine, through gloo: the network is the memory of one machine, and the
processors compute and copy at once, so that little of the communication can hide. Kinds of rows:

    gradients     bytes of the gradients of every network (float32, counted); `messages`: buckets of DDP, of 25 MB;
                  `last_message`: bytes of the last one, which is complete only when the backward pass ends
    all-reduce    the gradients by themselves, in one piece
    step          zero_grad, forward, loss and backward of DistributedDataParallel, by way of communicating: "none" is
                  no_sync, "plain" is DDP's own; the others change one thing. `exposed` is the share of the step that
                  "none" does without
    sync_bn       the messages of SyncBatchNorm, by themselves, one after the other: in the forward pass, each layer
                  gathers mean, deviation and count (2 C + 1 numbers) from every process; in the backward pass it sums
                  2 C. They are sent by hand, since torch's own layer runs on GPUs alone. `bytes`: what one process
                  contributes

Every time is that of the slower process; the ways take turns; medians.
"""

import argparse
import copy
import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, Sheet, origin, percentiles
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import odconv
from odconv.models.build import split_name

PROCESSES = 2
NETWORKS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_100")
KEYS = ("kind", "model", "kernel_num", "batch", "size", "way")
WAYS = ("none", "plain", "buckets of 5 MB", "bucket view", "bf16", "fp16")


def network(name: str, n: int | None) -> nn.Module:
    """The network of that name, or its static architecture where n is None."""
    torch.manual_seed(0)
    return odconv.create_model(split_name(name)[1] if n is None else name, kernel_num=n)


def gradient_bytes(model: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in model.parameters())


def buckets(model: nn.Module, first: int = 2**20, cap: int = 25 * 2**20) -> list[int]:
    """Bytes of the messages that DDP makes of the gradients, in order."""
    sizes, limit, filled = [], first, 0
    for parameter in reversed(list(model.parameters())):
        filled += 4 * parameter.numel()
        if filled >= limit:
            sizes, limit, filled = [*sizes, filled], cap, 0
    return [*sizes, filled] if filled else sizes


def in_parallel(model: nn.Module, way: str) -> DistributedDataParallel:
    options: dict[str, Any] = {}
    if way.startswith("buckets of"):
        options["bucket_cap_mb"] = int(way.split()[2])
    parallel = DistributedDataParallel(copy.deepcopy(model), gradient_as_bucket_view=way == "bucket view", **options)
    if way == "bf16":
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif way == "fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return parallel


def step(parallel: DistributedDataParallel, x: Tensor, way: str) -> None:
    parallel.zero_grad(set_to_none=True)
    with parallel.no_sync() if way == "none" else nullcontext():
        F.cross_entropy(parallel(x), torch.zeros(len(x), dtype=torch.long)).backward()


def synchronise_batch_norms(channels: list[int]) -> None:
    for count in channels:
        numbers = torch.zeros(2 * count + 1)
        dist.all_gather([torch.empty_like(numbers) for _ in range(PROCESSES)], numbers)
    for count in reversed(channels):
        dist.all_reduce(torch.zeros(2 * count))


def together(runs: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Milliseconds of the slower process, in turns; every process does the same number of turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2):  # DDP rearranges its buckets after the first step
        for run in runs.values():
            run()
    started = time.perf_counter()
    while True:
        for name, run in runs.items():
            dist.barrier()
            before = time.perf_counter()
            run()
            taken = torch.tensor(1e3 * (time.perf_counter() - before))
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            times[name].append(taken.item())
        enough = torch.tensor(float(time.perf_counter() - started > seconds and len(times[name]) >= least))
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        if enough:
            return times


def process(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    sheet, origin_of_rows = Sheet(args.out, KEYS), origin()

    def note(row: dict[str, Any]) -> None:
        if rank == 0:
            sheet.add([dict.fromkeys(KEYS, "") | row | origin_of_rows])
            print(*[value for value in row.values() if value != ""], flush=True)

    for name in args.models:
        for n in args.kernel_num:
            model = network(name, n or None)
            about = {"model": split_name(name)[1] if n == 0 else name, "kernel_num": n or "", "processes": PROCESSES}
            gradients = torch.zeros(gradient_bytes(model) // 4)
            channels = [m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            alone: dict[str, Callable[[], Any]] = {
                "all-reduce": partial(dist.all_reduce, gradients),
                "sync_bn": partial(synchronise_batch_norms, channels),
            }
            sizes = {"all-reduce": 4 * gradients.numel(), "sync_bn": 4 * sum(4 * count + 1 for count in channels)}
            messages = {"all-reduce": 1, "sync_bn": 2 * len(channels)}
            for kind, times in together(alone, args.seconds / 4).items():
                note({"kind": kind, **about, "bytes": sizes[kind], "messages": messages[kind], **percentiles(times)})
            x = torch.randn(args.batch, 3, args.size, args.size)
            ways = dict.fromkeys(["none", "plain", *args.ways])
            parallel = {way: in_parallel(model, way) for way in ways if way != "none"}
            parallel["none"] = parallel["plain"]
            runs = {way: partial(step, parallel[way], x, way) for way in ways}
            measured = {way: percentiles(times) for way, times in together(runs, args.seconds).items()}
            base = measured["none"]["median_ms"]
            for way, values in measured.items():
                exposed = round(1 - base / values["median_ms"], 3)
                keys = {"kind": "step", **about, "batch": args.batch, "size": args.size, "way": way}
                note({**keys, "bytes": sizes["all-reduce"], **values, "exposed": exposed})
            del parallel, runs
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["od_mobilenetv2_050", "od_resnet18"])
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[0, 4], help="0: the static network")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:])
    parser.add_argument("--batch", type=int, default=8, help="images of each process")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=14, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=RESULTS / "communication.csv", help="CSV to write")
    args = parser.parse_args()
    sheet, origin_of_rows = Sheet(args.out, KEYS), origin()
    for backbone in NETWORKS:
        for n in (None, 1, 2, 4):
            name = backbone if n is None else f"od_{backbone}"
            with torch.device("meta"):
                model = odconv.create_model(name, kernel_num=n)
            about = dict.fromkeys(KEYS, "") | {"kind": "gradients", "model": name, "kernel_num": n or ""}
            messages = buckets(model)
            counts = {"bytes": gradient_bytes(model), "messages": len(messages), "last_message": messages[-1]}
            sheet.add([about | counts | origin_of_rows])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, args), PROCESSES)


if __name__ == "__main__":
    main()
