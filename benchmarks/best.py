"""What a user could have instead: the static network in its best way of running against ours in its own, in one run.

``python benchmarks/networks.py --best`` measures every way for both sides, in turns. In inference a network as it is,
with `odconv.fuse`, channels-last besides, all that under torch.compile, that without guards on modules, and its file in
onnxruntime; in training steps as it is, channels-last, and that under torch.compile, of which those in 16 bits are
under autocast. The ratio of a row is to the fastest of the static network's ways in the same dtype. Rows go to
results/best.csv.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Sheet, alternate, origin, percentiles
from export import settle
from torch import Tensor
from torch.nn import functional as F

import odconv
from odconv.models.build import split_name
from odconv.models.zoo import WAREHOUSE

KEYS = ("model", "kernel_num", "mode", "batch", "size", "dtype", "way")
WAYS = ("plain", "fused", "channels-last", "compiled", "unguarded", "onnxruntime")
"""All but the last each with what the ones before it do."""
TRAINING = ("plain", "channels-last", "compiled")
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {},
    "unguarded": {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
}
"""Ways under torch.compile, and its options."""


def network(name: str, n: int | None) -> torch.nn.Module:
    """Return a network with n kernels, of KernelWarehouse at a budget of n; its static architecture where n is None."""
    method, static = split_name(name)
    if n is None:
        return odconv.create_model(static)
    return odconv.create_model(name, **{"budget" if method == WAREHOUSE else "kernel_num": n})


def inference(name: str, n: int | None, x: Tensor, way: str) -> Callable[[], Any]:
    """Return one inference of a network, or of its static architecture where n is None, in a way of running it."""
    torch.manual_seed(0)
    model = network(name, n).eval()
    if way == "onnxruntime":
        settle(model)
        return in_onnxruntime(model.eval(), x)
    model = model.to(x.dtype)
    if way != "plain":
        model = odconv.fuse(model)
    if way in ("channels-last", *COMPILED):
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def forward(images: Tensor) -> Any:
        return model(images)

    # what is compiled is kept by code: networks of one class would be taken for each other where nothing guards them
    forward.__code__ = forward.__code__.replace()
    called = torch.compile(forward, fullgraph=True, options=COMPILED[way]) if way in COMPILED else model

    def run() -> None:
        with torch.inference_mode():
            called(x)

    return run


def in_onnxruntime(model: torch.nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return one inference of the network's file; its threads do not wait for work while others compute."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        odconv.export_onnx(model, path, tuple(x.shape[1:]), dynamic_batch=len(x) > 1)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"images": x.numpy()})


def training(name: str, n: int | None, x: Tensor, way: str) -> Callable[[], Any]:
    """Return one training step, zero_grad, forward, loss and backward, with weights in float32."""
    torch.manual_seed(0)
    model = network(name, n).train()
    half, x = x.dtype != torch.float32, x.float()
    if way != "plain":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    called = torch.compile(model, fullgraph=True) if way == "compiled" else model

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = F.cross_entropy(called(x), torch.zeros(len(x), dtype=torch.long))
        loss.backward()

    return run


def compare(
    name: str, kernel_nums: list[int], mode: str, batch: int, size: int, dtype: str, ways: list[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a network in all ways of running it, and of its static architecture."""
    torch.compiler.reset()
    x = torch.randn(batch, 3, size, size, dtype=getattr(torch, dtype))
    known = TRAINING if mode == "training" else WAYS if dtype == "float32" else WAYS[:-1]
    cases = {f"{n}/{way}": (n, way) for n in (None, *kernel_nums) for way in known if way in ways}
    prepare = inference if mode == "inference" else training
    runs = {key: prepare(name, n, x, way) for key, (n, way) in cases.items()}
    measured = {key: percentiles(times) for key, times in alternate(runs, seconds).items()}
    base = min(measured[key]["median_ms"] for key, (n, _) in cases.items() if n is None)
    keys = {"model": name, "mode": mode, "batch": batch, "size": size, "dtype": dtype}
    for key, (n, way) in cases.items():
        ratio = round(measured[key]["median_ms"] / base, 3)
        yield {**keys, "kernel_num": n or "", "way": way, **measured[key], "ratio_to_best_static": ratio}


def measure(
    models: list[str], kernel_nums: list[int], batches: dict[str, list[int]], size: int, dtypes: list[str],
    ways: list[str], seconds: float, out: Path,
) -> None:  # fmt: skip
    """Measure networks in all ways of running them, and write the rows."""
    sheet, origin_of_rows = Sheet(out, KEYS), origin()
    for name in models:
        for mode, sizes in batches.items():
            for dtype in dtypes:
                for batch in sizes:
                    rows = list(compare(name, kernel_nums, mode, batch, size, dtype, ways, seconds))
                    sheet.add([row | origin_of_rows for row in rows])
                    for row in rows:
                        title = f"{name} n={row['kernel_num']} {mode} {dtype} batch {batch} {row['way']}"
                        print(f"{title}: {row['median_ms']:.1f} ms ({row['ratio_to_best_static']:.2f})", flush=True)
