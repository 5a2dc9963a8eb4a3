"""Inference in bfloat16, float16 and float32: static and ours in the static network's best way, in one run.

    python benchmarks/half.py

Batch norm is folded by `odconv.fuse` on both sides, maps are channels-last, and the whole network is in the dtype. The
ratio is to the static network in the same dtype. Rows go to results/half.csv.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, Sheet, alternate, origin, percentiles
from torch import Tensor, nn

import odconv
from odconv.models import split_name

KEYS = ("model", "kernel_num", "batch", "size", "dtype", "form")


def network(name: str, n: int | None, dtype: torch.dtype) -> nn.Module:
    """The network of that name, or its static architecture where n is None, folded and channels-last."""
    torch.manual_seed(0)
    model = odconv.create_model(split_name(name)[1] if n is None else name, kernel_num=n).eval()
    return odconv.fuse(model).to(dtype, memory_format=torch.channels_last)


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["od_mobilenetv2_100", "od_resnet18"], help="dynamic networks")
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[4])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=8, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=RESULTS / "half.csv", help="CSV to write")
    args = parser.parse_args()
    sheet, origin_of_rows = Sheet(args.out, KEYS), origin()
    for name in args.models:
        for dtype in args.dtypes:
            models = {n: network(name, n, getattr(torch, dtype)) for n in (None, *args.kernel_num)}
            for batch in args.batch:
                x = torch.randn(batch, 3, args.size, args.size, dtype=getattr(torch, dtype))
                x = x.to(memory_format=torch.channels_last)
                runs = {n: partial(infer, model, x) for n, model in models.items()}
                measured = {n: percentiles(times) for n, times in alternate(runs, args.seconds).items()}
                rows = []
                for n, values in measured.items():
                    keys = {"model": name, "kernel_num": n or "", "batch": batch, "size": args.size, "dtype": dtype}
                    ratio = round(values["median_ms"] / measured[None]["median_ms"], 3)
                    rows.append({**keys, "form": "ours" if n else "static", **values, "ratio_to_static": ratio})
                sheet.add([row | origin_of_rows for row in rows])
                line = ", ".join(f"n={n} {v['median_ms']:.1f} ms" for n, v in measured.items())
                print(f"{name} {dtype} batch {batch}: {line}; {[row['ratio_to_static'] for row in rows]}", flush=True)


if __name__ == "__main__":
    main()
