"""What a user could have instead: the static network in its best way of running against ours in its own, in one run.

    python benchmarks/best.py                      inference of the default networks in float32 and bfloat16
    python benchmarks/best.py --dtypes float16 --ways plain channels-last

Every way is measured for both sides, in turns: as it is, with `odconv.fuse`, channels-last besides, and all that under
torch.compile. The ratio of a row is to the fastest of the static network's ways in the same dtype. Rows go to
results/best.csv.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, Sheet, alternate, origin, percentiles
from torch import Tensor

import odconv
from odconv.models.build import split_name

KEYS = ("model", "kernel_num", "batch", "size", "dtype", "way")
WAYS = ("plain", "fused", "channels-last", "compiled")  # each with what the ones before it do
BATCH = {"float32": 8}  # of other dtypes 4


def prepare(name: str, n: int | None, x: Tensor, way: str) -> Callable[[], None]:
    """Return one inference of a network, or of its static architecture where n is None, in a way of running it."""
    torch.manual_seed(0)
    model = odconv.create_model(split_name(name)[1] if n is None else name, kernel_num=n).eval().to(x.dtype)
    if way != "plain":
        model = odconv.fuse(model)
    if way in ("channels-last", "compiled"):
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    called = torch.compile(model, fullgraph=True) if way == "compiled" else model
    return partial(infer, called, x)


def infer(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["od_mobilenetv2_100", "od_resnet18"], help="dynamic networks")
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", nargs="+", type=int, default=None, help="default 8 in float32 and 4 in 16 bits")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=20, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=RESULTS / "best.csv", help="CSV to write")
    args = parser.parse_args()
    sheet, origin_of_rows = Sheet(args.out, KEYS), origin()
    for name in args.models:
        for dtype in args.dtypes:
            for batch in args.batch or [BATCH.get(dtype, 4)]:
                torch.compiler.reset()
                x = torch.randn(batch, 3, args.size, args.size, dtype=getattr(torch, dtype))
                cases = {f"{n}/{way}": (n, way) for n in (None, *args.kernel_num) for way in args.ways}
                runs = {key: prepare(name, n, x, way) for key, (n, way) in cases.items()}
                measured = {key: percentiles(times) for key, times in alternate(runs, args.seconds).items()}
                best = min(measured[key]["median_ms"] for key, (n, _) in cases.items() if n is None)
                keys = {"model": name, "batch": batch, "size": args.size, "dtype": dtype}
                for key, (n, way) in cases.items():
                    ratio = round(measured[key]["median_ms"] / best, 3)
                    of_row = {"kernel_num": n or "", "way": way, **measured[key], "ratio_to_best_static": ratio}
                    sheet.add([{**keys, **of_row, **origin_of_rows}])
                    print(
                        f"{name} n={n} {dtype} batch {batch} {way}: {of_row['median_ms']:.1f} ms ({ratio:.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
