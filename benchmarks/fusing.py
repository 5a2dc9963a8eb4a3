"""Inference with batch norm folded into the convolutions before it (`odconv.fuse`), and with it apart, in one run.

    python benchmarks/fusing.py

The ratio is to the network with batch norm, in the same mode. Rows go to results/fusing.csv.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from common import MODELS, RESULTS, Sheet, alternate, origin, percentiles
from torch import Tensor, nn

import odconv
from odconv.models.build import split_name


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MODELS, *(split_name(name)[1] for name in MODELS)]
    parser.add_argument("--models", nargs="+", default=names, help="networks of the zoo")
    parser.add_argument("--kernel_num", type=int, default=4, help="of the dynamic ones")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=4, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=RESULTS / "fusing.csv", help="CSV to write")
    args = parser.parse_args()
    sheet, origin_of_rows = Sheet(args.out, ("model", "kernel_num", "batch", "size", "form")), origin()
    for name in args.models:
        n = args.kernel_num if split_name(name)[0] else None
        model = odconv.create_model(name, kernel_num=n).eval()
        forms = {"apart": model, "fused": odconv.fuse(copy.deepcopy(model))}
        for batch in args.batch:
            x = torch.randn(batch, 3, args.size, args.size)
            measured = alternate({form: partial(infer, network, x) for form, network in forms.items()}, args.seconds)
            rows = []
            for form, times in measured.items():
                row = {"model": name, "kernel_num": n or "", "batch": batch, "size": args.size, "form": form}
                rows.append(row | percentiles(times))
            for row in rows:
                row["ratio_to_apart"] = round(row["median_ms"] / rows[0]["median_ms"], 3)
            sheet.add([row | origin_of_rows for row in rows])
            apart, fused = rows
            print(
                f"{name} n={n} batch {batch}: {apart['median_ms']:.1f} ms, fused {fused['median_ms']:.1f} ms "
                f"({fused['ratio_to_apart']:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
