"""Whole networks: static, ours and the published form in one run, as ratios to the static network in the same mode.

    python benchmarks/networks.py              inference, training steps and training memory of the default networks
    python benchmarks/networks.py --compile    with static and ours under torch.compile besides
    python benchmarks/networks.py --best       each side in the fastest of its ways of running instead, see best.py

A training step is zero_grad, forward, loss and backward. Rows go to results/networks.csv as they come, a row that is
measured again takes the old one's place, and the picture is drawn beside it.

Memory is what one training step takes beyond the parameters, their gradients and the input's batch, each form in a
process of its own, in eager mode. `saved_mb` counts what autograd keeps for the backward pass, every storage once,
without parameters and buffers. `peak_mb` adds the working space: the highest resident memory of the process during the
step over that before it, as Linux counts it, so that it includes what is allocated past PyTorch (oneDNN's and our
kernel's buffers). Gradients are allocated before and added to, and freed memory goes back to the system at once.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import best
import torch
from common import (
    MODELS,
    PROCESS,
    RESULTS,
    Sheet,
    alternate,
    forget_peak,
    give_back_memory,
    origin,
    percentiles,
    published_form,
    resident_mb,
    saved_mb,
)
from plot import draw_networks
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.models.build import split_name
from odconv.ops import cpu

KEYS = ("model", "kernel_num", "batch", "size", "mode", "form", "compiled")
MEMORY_FORMS = ("static", "ours", "published")


def network(name: str, n: int | None) -> nn.Module:
    """The network of that name, or its static architecture where n is None."""
    torch.manual_seed(0)
    return odconv.create_model(split_name(name)[1] if n is None else name, kernel_num=n)


def run(model: Callable[[Tensor], Tensor], x: Tensor, train: bool, published: bool) -> None:
    """One inference, or one forward and backward pass."""
    with published_form() if published else nullcontext(), torch.inference_mode(not train):
        y = model(x)
        if train:
            F.cross_entropy(y, torch.zeros(len(x), dtype=torch.long)).backward()


def train_step(model: nn.Module, called: Callable[[Tensor], Tensor], x: Tensor, published: bool) -> None:
    model.zero_grad(set_to_none=True)
    run(called, x, True, published)


def time_network(
    models: dict[tuple[str, str], tuple[nn.Module, Callable[[Tensor], Tensor]]], x: Tensor, train: bool, seconds: float
) -> list[dict[str, Any]]:
    """A row for each form, compiled or not; the ratio is to the static network in the same mode."""
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for key, (model, called) in models.items():
        model.train(train)
        published = key[0] == "published"
        runs[key] = (
            partial(train_step, model, called, x, published) if train else partial(run, called, x, False, published)
        )
    measured = {key: percentiles(times) for key, times in alternate(runs, seconds).items()}
    rows = []
    for (form, compiled), values in measured.items():
        ratio = round(values["median_ms"] / measured["static", compiled]["median_ms"], 3)
        rows.append({"form": form, "compiled": compiled, **values, "ratio_to_static": ratio})
    return rows


def step_memory(name: str, n: int | None, form: str, batch: int, size: int) -> dict[str, float]:
    """Megabytes of one training step; for a process of its own, which has computed nothing yet."""
    libc = give_back_memory()
    model = network(name, n)
    cpu.available()
    static = network(name, None)
    run(static, torch.randn(2, 3, 64, 64), True, False)  # loads the code of every operator
    del static
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)  # written to, hence resident
    x = torch.randn(batch, 3, size, size)
    published = form == "published"
    libc.malloc_trim(0)
    forget_peak()
    before = resident_mb("VmRSS")
    run(model, x, True, published)
    peak = resident_mb("VmHWM") - before

    with published_form() if published else nullcontext():
        return {"saved_mb": saved_mb(model, x), "peak_mb": round(peak, 1)}


def memory_of_network(name: str, n: int, batch: int, size: int) -> list[dict[str, Any]]:
    """A row for each form; the ratio is of the peaks."""
    measured = {}
    for form in MEMORY_FORMS:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            given = (name, None if form == "static" else n, form, batch, size)
            measured[form] = alone.apply(step_memory, given)
    base = measured["static"]["peak_mb"]
    return [
        {"form": form, "compiled": "no", "ratio_to_static": round(values["peak_mb"] / base, 3), **values}
        for form, values in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="dynamic networks of the zoo (od_, dy_, cond_)")
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[1, 4])
    parser.add_argument(
        "--modes", nargs="+", choices=("inference", "training", "memory"), default=["inference", "training", "memory"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="batches of inference")
    parser.add_argument("--train_batch", nargs="+", type=int, default=[16], help="batches of training and its memory")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--compile", action="store_true", help="static and ours under torch.compile besides")
    parser.add_argument("--best", action="store_true", help="every way of running both sides instead")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of --best")
    parser.add_argument("--ways", nargs="+", choices=best.WAYS, default=best.WAYS, help="of --best")
    parser.add_argument("--seconds", type=float, default=8, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=None, help="CSV to write; default networks.csv or best.csv")
    args = parser.parse_args()
    if args.best:
        batches = {"inference": args.batch, "training": args.train_batch}
        wanted = {mode: batches[mode] for mode in args.modes if mode in batches}
        out = args.out or RESULTS / "best.csv"
        return best.measure(args.models, args.kernel_num, wanted, args.size, args.dtypes, args.ways, args.seconds, out)
    if "memory" in args.modes and not (PROCESS / "clear_refs").exists():
        parser.error("memory is measured on Linux only; leave it out of --modes")
    sheet, origin_of_rows = Sheet(args.out or RESULTS / "networks.csv", KEYS), origin()

    def note(keys: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        sheet.add([keys | row | origin_of_rows for row in rows])
        line = f"{keys['model']} n={keys['kernel_num']} batch {keys['batch']:3d} {keys['mode']:9s}"
        for row in rows:
            value = f"{row['peak_mb']:.0f} MB" if keys["mode"] == "memory" else f"{row['median_ms']:.1f} ms"
            form = row["form"] + (" compiled" if row["compiled"] == "yes" else "")
            line += f"  {form} {value} ({row['ratio_to_static']:.2f})"
        print(line, flush=True)

    for name in args.models:
        for mode in args.modes:
            torch.compiler.reset()
            static = network(name, None)
            static_compiled = torch.compile(static, fullgraph=True)
            for n in args.kernel_num:
                ours = network(name, n)
                models = {
                    ("static", "no"): (static, static),
                    ("ours", "no"): (ours, ours),
                    ("published", "no"): (ours, ours),
                }
                if args.compile:
                    models["static", "yes"] = (static, static_compiled)
                    models["ours", "yes"] = (ours, torch.compile(ours, fullgraph=True))
                for batch in args.batch if mode == "inference" else args.train_batch:
                    keys = {"model": name, "kernel_num": n, "batch": batch, "size": args.size, "mode": mode}
                    if mode == "memory":
                        note(keys, memory_of_network(name, n, batch, args.size))
                    else:
                        x = torch.randn(batch, 3, args.size, args.size)
                        note(keys, time_network(models, x, mode == "training", args.seconds))
    draw_networks(sheet.path)


if __name__ == "__main__":
    main()
