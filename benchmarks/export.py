"""Exported networks in onnxruntime on the CPU, as ratios to the static network's export.

    python benchmarks/export.py                    the default networks, batch 1, one and two threads
    python benchmarks/export.py --batch 1 8 32     other batches
    python benchmarks/export.py --seconds 0        only write the ONNX files

Each form has one session in a process of its own; they take turns, some runs each, so that a busy machine slows all
alike. Rows go to results/export.csv as they come, and a row that is measured again takes the old one's place.
`kernels_mb` are the kernels of the dynamic layers, n of each, which every image needs whole; `read_ms` is how long this
machine takes to read them once, the bound that no form can beat.
"""

import argparse
import multiprocessing
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, Sheet, origin, percentiles
from torch import nn

import odconv
from odconv.layers import DynamicConv
from odconv.models.build import split_name

KEYS = ("model", "kernel_num", "form", "batch", "size", "threads")
FORMS: dict[str, dict[str, Any]] = {
    "static": {},
    "loop": {},
    "product": {"form": "product"},
    "one": {"dynamic_batch": False},
}
TURN = 5
"""Runs in a turn."""
REST = 0.05
"""Seconds before a turn, in which the threads of the process before stop waiting for work."""


def write_file(folder: Path, name: str, n: int, form: str, size: int) -> Path:
    """Export a network, unless its file is there."""
    path = folder / f"{name}_{n}x_{form}_{size}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        static = form == "static"
        model = odconv.create_model(split_name(name)[1] if static else name, kernel_num=None if static else n)
        settle(model)
        print(odconv.export_onnx(model, path, (3, size, size), **FORMS[form]), flush=True)
    return path


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Keep the numbers in an untrained network from vanishing, and rounding errors from growing without bound."""
    for name, parameter in model.named_parameters():
        if ".attention." in name and name.endswith("_fc.weight"):
            parameter.zero_()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # takes the statistics of what comes
    model.train()(torch.randn(8, 3, 64, 64))


def serve(orders: Connection, path: Path, threads: int, shape: tuple[int, ...]) -> None:
    """In a process of its own: at each order, answer with the milliseconds of some runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
    while orders.recv():
        time.sleep(REST)
        times = []
        for _ in range(TURN):
            before = time.perf_counter()
            session.run(None, {"images": images})
            times.append(1e3 * (time.perf_counter() - before))
        orders.send(times)


def measure(paths: dict[str, Path], threads: int, shape: tuple[int, ...], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each form, in turns."""
    spawn = multiprocessing.get_context("spawn")
    orders: dict[str, Connection] = {}
    for form, path in paths.items():
        orders[form], theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(theirs, path, threads, shape), daemon=True).start()
    times: dict[str, list[float]] = {}
    end = None
    while end is None or time.perf_counter() < end:
        for form, connection in orders.items():
            connection.send(True)
            answer = connection.recv()
            if end is not None:  # the first round warms up
                times.setdefault(form, []).extend(answer)
        end = end or time.perf_counter() + seconds
    for connection in orders.values():
        connection.send(False)
    return times


def milliseconds_to_read(megabytes: float, threads: int) -> float:
    """How long the machine takes to read so much memory."""
    torch.set_num_threads(threads)
    block = torch.ones(64 * 2**20)
    times = []
    for _ in range(5):
        before = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - before)
    return 1e3 * min(times) * megabytes * 1e6 / (4 * block.numel())


def megabytes_of_kernels(name: str, n: int) -> float:
    """The kernels of all dynamic layers in float32."""
    layers = [part for part in odconv.create_model(name, kernel_num=n).modules() if isinstance(part, DynamicConv)]
    return sum(4 * layer.weight.numel() for layer in layers) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="dynamic networks of the zoo (od_, dy_, cond_)")
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[4])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS)[1:], default=list(FORMS)[1:])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=8, help="time for each comparison, after warming up")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "odconv-export"), help="where the ONNX files lie"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "export.csv", help="CSV to write")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    sheet = Sheet(args.out, KEYS)
    for name in args.models:
        for n in args.kernel_num:
            paths = {form: write_file(args.folder, name, n, form, args.size) for form in ("static", *args.forms)}
            kernels = megabytes_of_kernels(name, n)
            for threads in args.threads if args.seconds else []:
                for batch in args.batch:
                    measured = measure(paths, threads, (batch, 3, args.size, args.size), args.seconds)
                    read = milliseconds_to_read(kernels, threads)
                    keys = {"model": name, "kernel_num": n, "batch": batch, "size": args.size, "threads": threads}
                    bound = {"kernels_mb": round(kernels, 1), "read_ms": round(read, 2)}
                    rows = [
                        keys | {"form": form} | percentiles(times) | (bound if form != "static" else {})
                        for form, times in measured.items()
                    ]
                    for row in rows:
                        row["ratio_to_static"] = round(row["median_ms"] / rows[0]["median_ms"], 3)
                        row.update(origin() | {"threads": threads, "onnxruntime": version("onnxruntime")})
                        print(*(row[key] for key in (*KEYS, "median_ms", "ratio_to_static")), flush=True)
                    sheet.add(rows)


if __name__ == "__main__":
    main()
