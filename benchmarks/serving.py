"""Load on examples/serving/server.py with exported networks: requests a second, latency, and batches that formed.

    python benchmarks/serving.py --data ../shared/data/imagenet-sample

For every network, exported as `--forms` say, one server takes images one by one and one takes them in batches, on
127.0.0.1. They are loaded in turns, so that a busy machine slows all alike, and wait meanwhile. Clients send real
images as JPEG, the next as soon as the last is answered. They are coroutines of one process (aiohttp), since what sends
shall take little from the cores that compute. The ratio is to the static network without batches. Rows go to
results/serving.csv.
"""

import argparse
import asyncio
import itertools
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import torch
from common import RESULTS, Sheet, origin
from export import settle

import odconv
from odconv.app.data import open_data
from odconv.models.build import split_name

SERVER = Path(__file__).parents[1] / "examples" / "serving" / "server.py"
KEYS = ("model", "kernel_num", "form", "clients", "max_batch", "wait_ms")
SIZE = 224
FORMS: dict[str, dict[str, Any]] = {
    "static": {},
    "loop": {},
    "product": {"form": "product"},
    "int8": {"precision": "int8"},
}


def write_file(folder: Path, name: str, n: int, form: str) -> Path:
    """Export a network, unless its file is there."""
    path = folder / f"{name}_{n}x_{form}_{SIZE}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        static = form == "static"
        model = odconv.create_model(split_name(name)[1] if static else name, kernel_num=None if static else n)
        settle(model)
        metadata = {"image_size": SIZE, "resize_size": 256}
        print(odconv.export_onnx(model, path, (3, SIZE, SIZE), metadata=metadata, **FORMS[form]), flush=True)
    return path


@contextmanager
def serving(path: Path, batch: int, wait: int) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    options = {"--weights": path, "--port": port, "--batch": batch, "--wait": wait, "--timeout": 60}
    command = [sys.executable, str(SERVER), *(str(part) for option in options.items() for part in option)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)


@dataclass
class Load:
    """What one server did: milliseconds of each answer, how long it was loaded, images and batches it counted."""

    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    images: float = 0.0
    batches: float = 0.0


async def client(session: aiohttp.ClientSession, images: list[bytes], end: float, times: list[float]) -> None:
    """Send images one after another; note how long each answer takes."""
    for image in itertools.cycle(images):
        if (start := time.perf_counter()) > end:
            return
        async with session.post("/inference", data=image) as response:
            await response.read()
            response.raise_for_status()
        times.append(1e3 * (time.perf_counter() - start))


async def counts(session: aiohttp.ClientSession) -> tuple[float, float]:
    """Images computed so far, and batches; the server counts none without batches."""
    async with session.get("/metrics") as response:
        text = await response.text()
    found = [re.search(rf'batch_size_{what}{{stage="Classify_2".*}} (\S+)', text) for what in ("sum", "count")]
    return tuple(float(match[1]) if match else 0.0 for match in found)


async def take_turn(address: str, images: list[bytes], clients: int, seconds: float, done: Load) -> None:
    """Load a server for some seconds, once it answers."""
    connector, timeout = aiohttp.TCPConnector(limit=clients), aiohttp.ClientTimeout(60)
    async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as session:
        for _ in range(600):
            try:
                async with session.get("/"):
                    break
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.2)
        before, start = await counts(session), time.perf_counter()
        parts = [images[i::clients] for i in range(clients)]
        await asyncio.gather(*(client(session, part, start + seconds, done.times) for part in parts))
        done.seconds += time.perf_counter() - start
        after = await counts(session)
    done.images += after[0] - before[0]
    done.batches += after[1] - before[1]


def measure(
    settings: Sequence[tuple[str, Path, int, int]], images: list[bytes], clients: int, seconds: float, turns: int
) -> list[Load]:
    """Load servers in turns; the first turn of each warms it up."""
    with ExitStack() as stack:
        addresses = [stack.enter_context(serving(*setting[1:])) for setting in settings]
        for turn in range(turns + 1):
            if turn < 2:
                loads = [Load() for _ in settings]
            for address, done in zip(addresses, loads, strict=True):
                asyncio.run(take_turn(address, images, clients, seconds / turns, done))
    return loads


def summary(done: Load) -> dict[str, Any]:
    p50, p90, p99 = torch.tensor(done.times).quantile(torch.tensor([0.5, 0.9, 0.99])).tolist()
    return {
        "requests": len(done.times),
        "requests_per_s": round(len(done.times) / done.seconds, 2),
        "p50_ms": round(p50, 1),
        "p90_ms": round(p90, 1),
        "p99_ms": round(p99, 1),
        "mean_batch": round(done.images / done.batches, 2) if done.batches else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images to send, as odconv train takes them")
    parser.add_argument("--model", default="od_resnet18", help="dynamic network of the zoo")
    parser.add_argument("--kernel_num", type=int, default=4)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS)[1:], default=list(FORMS)[1:], help="beside static")
    parser.add_argument("--images", type=int, default=200, help="how many different ones")
    parser.add_argument("--clients", nargs="+", type=int, default=[8])
    parser.add_argument("--batch", type=int, default=8, help="most images computed together")
    parser.add_argument("--wait", type=int, default=5, help="milliseconds that an image waits for others at most")
    parser.add_argument("--seconds", type=float, default=16, help="of load on each server; 0 only exports")
    parser.add_argument("--turns", type=int, default=4, help="in how many turns that is, after one to warm up")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "odconv-serving"), help="of exports")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.csv", help="CSV to write")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = {form: write_file(args.folder, args.model, args.kernel_num, form) for form in ("static", *args.forms)}
    sources = open_data(args.data, image_size=SIZE, resize_size=256, need_train=False).val.sources
    images = [Path(sources[i]).read_bytes() for i in range(min(args.images, len(sources)))]
    sheet = Sheet(args.out, KEYS)
    said = origin() | {name: version(name) for name in ("onnxruntime", "mosec")}
    batching = ((1, 0), (args.batch, args.wait))
    settings = [(form, path, batch, wait) for form, path in paths.items() for batch, wait in batching]
    for clients in args.clients if args.seconds else []:
        rows: list[dict[str, Any]] = []
        loads = measure(settings, images, clients, args.seconds, args.turns)
        for (form, _, batch, wait), done in zip(settings, loads, strict=True):
            static = form == "static"
            row = {"model": split_name(args.model)[1] if static else args.model}
            row |= {"kernel_num": "" if static else args.kernel_num, "form": form, "clients": clients}
            rows.append(row | {"max_batch": batch, "wait_ms": wait} | summary(done))
        for row in rows:
            row["ratio_to_static"] = round(row["requests_per_s"] / rows[0]["requests_per_s"], 3)
            print({name: value for name, value in row.items() if value != ""}, flush=True)
        sheet.add([row | said for row in rows])


if __name__ == "__main__":
    main()
