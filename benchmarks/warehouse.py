"""KernelWarehouse's networks: static, ours and the published form in turns, as ratios to the static network.

    python -m benchmarks.warehouse                         kw_resnet18 at 1x, batch 8, 224 px: inference and training
    python -m benchmarks.warehouse --budget 4 --batch 1    other ones

Every round is a row of its own, for on a busy machine a ratio is to be looked at twice. `load` is the system's load
average. A training step is a forward and a backward pass; `saved_mb` is what autograd keeps between them. Rows go to
results/warehouse.csv.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from benchmarks.common import RESULTS, Sheet, alternate, origin, percentiles, saved_mb
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.layers.warehouse_conv import KWConv
from odconv.models.build import split_name

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def published_conv(layer: KWConv, x: Tensor) -> Tensor:
    """Compute a layer as published: all samples' pieces in one product, then a convolution of B * groups groups."""
    batch, (filters, channels, *taps) = x.shape[0], layer.kernel_shape
    cells = layer.cells
    outer, inner = cells.shape[1:3]
    shares = layer.attention(x).flatten(0, 1)
    pieces = torch.mm(shares, cells.flatten(1))
    blocks = pieces.view(batch, -1, filters // outer, channels // inner, outer, inner)
    kernels = blocks.permute(0, 2, 4, 3, 5, 1).reshape(-1, channels, *taps)
    groups = batch * layer.groups
    conv = CONVOLUTIONS[layer.dims - 1]
    y = conv(x.reshape(1, -1, *x.shape[2:]), kernels, None, layer.stride, layer.padding, layer.dilation, groups)
    y = y.view(batch, filters, *y.shape[2:])
    return y if layer.bias is None else y + layer.bias.view(-1, *(1,) * layer.dims)


@contextmanager
def published_form() -> Iterator[None]:
    """Let every layer compute as published."""
    ours, KWConv.forward = KWConv.forward, published_conv
    try:
        yield
    finally:
        KWConv.forward = ours


def run(model: nn.Module, x: Tensor, train: bool, form: str) -> None:
    """One inference, or one forward and backward pass."""
    with published_form() if form == "published" else nullcontext(), torch.inference_mode(not train):
        y = model(x)
        if train:
            model.zero_grad()
            y.square().mean().backward()


def check(model: nn.Module, x: Tensor) -> None:
    """See that both forms compute the same."""
    with torch.no_grad():
        ours = model(x)
        with published_form():
            torch.testing.assert_close(ours, model(x), rtol=1e-3, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kw_resnet18")
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--modes", nargs="+", default=["inference", "training"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    static, dynamic = (
        odconv.create_model(split_name(args.model)[1]),
        odconv.create_model(args.model, budget=args.budget),
    )
    x = torch.randn(args.batch, 3, args.size, args.size)
    check(dynamic.eval(), x)
    keys = ("model", "budget", "batch", "size", "mode", "form", "threads", "round")
    sheet, where = Sheet(RESULTS / "warehouse.csv", keys), origin()
    for mode in args.modes:
        train = mode == "training"
        models = {"static": static.train(train), "ours": dynamic.train(train), "published": dynamic}
        for number in range(args.rounds):
            runs: dict[str, Callable[[], None]] = {f: partial(run, model, x, train, f) for f, model in models.items()}
            measured = {form: percentiles(times) for form, times in alternate(runs, args.seconds, least=5).items()}
            load = round(os.getloadavg()[0], 1)
            setting = {"model": args.model, "budget": args.budget, "batch": args.batch, "size": args.size, "mode": mode}
            base = measured["static"]["median_ms"]
            kept = {}
            for form, model in models.items() if train else ():
                with published_form() if form == "published" else nullcontext():
                    kept[form] = {"saved_mb": saved_mb(model, x)}
            rows = [
                setting
                | {"form": form, "round": number}
                | times
                | {"ratio_to_static": round(times["median_ms"] / base, 3), "load": load}
                | where
                | kept.get(form, {})
                for form, times in measured.items()
            ]
            sheet.add(rows)
            print(mode, number, load, {row["form"]: row["ratio_to_static"] for row in rows}, flush=True)


if __name__ == "__main__":
    main()
