"""Whole networks: static, ours and the published form in one run, as ratios to the static network.

python benchmarks/networks.py                      inference of the default networks
python benchmarks/networks.py --train --batch 16   a training step
"""

import argparse
from pathlib import Path

import torch
from common import RESULTS, alternate, origin, percentiles, published_form, write_rows
from torch import nn
from torch.nn import functional as F

import odconv
from odconv.models import split_name


def step(model: nn.Module, x: torch.Tensor, train: bool, published: bool = False):
    labels = torch.zeros(len(x), dtype=torch.long)

    def forward():
        if not train:
            with torch.inference_mode():
                return model(x)
        model.zero_grad(set_to_none=True)
        return F.cross_entropy(model(x), labels).backward()

    def as_published():
        with published_form():
            return forward()

    return as_published if published else forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["od_resnet18", "od_resnet50", "od_mobilenetv2_100"])
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--train", action="store_true", help="a training step instead of inference")
    parser.add_argument("--seconds", type=float, default=10, help="time for each row of comparisons")
    parser.add_argument(
        "--out", type=Path, default=None, help="CSV to write; default benchmarks/results/networks_MODE.csv"
    )
    args = parser.parse_args()

    mode = "training" if args.train else "inference"
    rows = []
    for name in args.models:
        for n in args.kernel_num:
            torch.manual_seed(0)
            dynamic = odconv.create_model(name, kernel_num=n).train(args.train)
            static = odconv.create_model(split_name(name)[1]).train(args.train)
            for batch in args.batch:
                x = torch.randn(batch, 3, args.size, args.size)
                times = alternate(
                    {
                        "static": step(static, x, args.train),
                        "odconv": step(dynamic, x, args.train),
                        "published": step(dynamic, x, args.train, published=True),
                    },
                    args.seconds,
                )
                base = percentiles(times["static"])["median_ms"]
                for form, values in times.items():
                    measured = percentiles(values)
                    ratio = round(measured["median_ms"] / base, 3)
                    rows.append(
                        {"model": name, "kernel_num": n, "batch": batch, "size": args.size, "mode": mode, "form": form}
                        | measured
                        | {"ratio_to_static": ratio}
                        | origin()
                    )
                    print(
                        f"{name} n={n} batch {batch:3d} {mode} {form:10s} {measured['median_ms']:9.1f} ms  {ratio:6.2f}"
                    )
    write_rows(args.out or RESULTS / f"networks_{mode}.csv", rows)


if __name__ == "__main__":
    main()
