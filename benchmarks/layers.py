"""One layer at a time: every form of the operator, the static convolution and the published form, in one run.

    python benchmarks/layers.py            forward
    python benchmarks/layers.py --train    forward and backward

The rows in results/layers_*.csv set the limits in odconv.ops.dynamic_conv.choose.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, alternate, origin, percentiles, published_conv, write_rows
from torch.nn import functional as F

from odconv.functional import dynamic_conv

# channels, filters, map, kernel, stride, groups: the layers of ResNet-18, ResNet-50 and MobileNetV2
SHAPES = (
    (64, 64, 56, 3, 1, 1),
    (128, 128, 28, 3, 1, 1),
    (256, 256, 14, 3, 1, 1),
    (256, 512, 14, 3, 2, 1),
    (512, 512, 7, 3, 1, 1),
    (64, 256, 56, 1, 1, 1),
    (256, 64, 56, 1, 1, 1),
    (1024, 256, 14, 1, 1, 1),
    (512, 2048, 7, 1, 1, 1),
    (144, 144, 56, 3, 1, 144),
    (960, 960, 7, 3, 1, 960),
    (24, 144, 56, 1, 1, 1),
    (960, 320, 7, 1, 1, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--seconds", type=float, default=1, help="time for each row of comparisons")
    parser.add_argument(
        "--out", type=Path, default=None, help="CSV to write; default benchmarks/results/layers_MODE.csv"
    )
    args = parser.parse_args()
    mode = "training" if args.train else "inference"
    where, rows = origin(), []
    for channels, filters, side, taps, stride, groups in SHAPES:
        for n in args.kernel_num:
            for batch in args.batch:
                tensors = {
                    "x": torch.randn(batch, channels, side, side),
                    "weight": torch.randn(n, filters, channels // groups, taps, taps) / (channels // groups) ** 0.5,
                    "kernel": torch.rand(batch, n).softmax(1) if n > 1 else None,
                    "spatial": torch.rand(batch, taps, taps) if taps > 1 else None,
                    "channel": torch.rand(batch, channels),
                    "filter": torch.rand(batch, filters) if groups == 1 else None,
                }
                for tensor in tensors.values():
                    if tensor is not None:
                        tensor.requires_grad_(args.train)
                geometry = {"stride": stride, "padding": taps // 2, "dilation": 1, "groups": groups}
                runs = {
                    "static": partial(F.conv2d, tensors["x"], tensors["weight"][0].detach(), None, *geometry.values()),
                    "published": partial(published_conv, **tensors, bias=None, **geometry),
                }
                if args.train:
                    weight = tensors["weight"][0].detach().requires_grad_()
                    runs["static"] = partial(F.conv2d, tensors["x"], weight, None, *geometry.values())
                for form in ("auto", "shared", "product", "grouped"):
                    if groups == 1 or form in ("auto", "grouped"):
                        runs[form] = partial(dynamic_conv, **tensors, **geometry, backend=form)
                if args.train:
                    runs = {name: partial(forward_and_backward, run) for name, run in runs.items()}
                times = alternate(runs, args.seconds)
                base = percentiles(times["static"])["median_ms"]
                shape = f"{channels}->{filters} {side}x{side} k{taps} s{stride} g{groups}"
                print(f"{shape:32s} n={n} batch {batch:3d} {mode}, static {base:.2f} ms:", end="")
                for form, values in times.items():
                    measured = percentiles(values)
                    ratio = round(measured["median_ms"] / base, 3)
                    print(f"  {form} {ratio:.2f}" if form != "static" else "", end="")
                    rows.append(
                        {"layer": shape, "kernel_num": n, "batch": batch, "mode": mode, "form": form}
                        | measured
                        | {"ratio_to_static": ratio}
                        | where
                    )
                print(flush=True)
    write_rows(args.out or RESULTS / f"layers_{mode}.csv", rows)


def forward_and_backward(run) -> None:
    y = run()
    y.backward(torch.ones_like(y))


if __name__ == "__main__":
    main()
