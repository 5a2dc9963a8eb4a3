"""Accuracy on real images: static networks, squeeze-and-excitation and dynamic convolutions, by one recipe.

    python -m benchmarks.accuracy --data ../shared/data --studies tuning main longer ablation --seeds 2
    python -m benchmarks.accuracy --data data --scale full --device cuda --minutes 12
    python -m benchmarks.accuracy --report

Safe to stop at any time, to call again (finished trainings are kept, an unfinished one goes on from its last epoch),
and to call several times at once: each call takes trainings that no other has in hand. With --minutes, trainings are
done on one device, side by side, and those are begun that fit; what is unfinished then is lost.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.accuracy.cells import RECIPES, STUDIES, Cell
from benchmarks.accuracy.device import run_within
from benchmarks.accuracy.networks import ABLATIONS, METHODS
from benchmarks.accuracy.training import FOLDERS, train
from benchmarks.common import RESULTS, Sheet
from filelock import FileLock, Timeout

from odconv.app.engine.checkpoint_io import LAST, PREVIOUS

KEYS = (
    "dataset", "network", "method", "seed", "split", "epochs", "image_size", "train_images", "batch_size", "lr", "wd",
    "dropout", "temp_init", "temp_share", "start", "device",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with imagenette96 and cifar10")
    parser.add_argument("--scale", choices=RECIPES, default="full" if torch.cuda.is_available() else "small")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=["main"])
    parser.add_argument("--datasets", nargs="+", choices=FOLDERS, help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS | ABLATIONS, metavar="METHOD", help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder for unfinished trainings")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.csv", help="a row for each finished one")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="train as many as fit, several side by side on the device")
    parser.add_argument("--compile", action="store_true", help="with --minutes: compile the networks")
    parser.add_argument("--commit", help="with --minutes: of the rows, where there is no git")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what is finished")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    if args.report:
        from benchmarks.accuracy.report import write_report  # with scipy and matplotlib, which training does without

        write_report(args.out, args.out.with_name("accuracy_costs.csv"), args.out.parent)
        return
    if args.data is None:
        parser.error("--data is needed, the folder with imagenette96 and cifar10")
    cells = [cell for study in args.studies for cell in STUDIES[study](args.scale, args.seeds)]
    chosen = [
        cell
        for cell in cells
        if (not args.datasets or cell.dataset in args.datasets) and (not args.methods or cell.method in args.methods)
    ]
    if not chosen:
        parser.error("nothing is to be trained: no cell has these studies, data sets, methods and seeds")
    if args.minutes is not None:
        run_for(args.minutes, chosen, args)
        return
    for number, cell in enumerate(chosen, start=1):
        print(f"{number} of {len(chosen)}: {cell.study} {cell.name}", flush=True)
        run(cell, args)


def run_for(minutes: float, cells: list[Cell], args: argparse.Namespace) -> None:
    """Train those cells on one device that have no row from it and fit in the time, and add their rows."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = Sheet(args.out, KEYS)
    waiting = [cell for cell in cells if not any(is_of(row, cell, name) for row in sheet.rows.values())]
    for row in run_within(waiting, args.data, device, minutes, compile=args.compile):
        sheet.add([row | ({"commit": args.commit} if args.commit else {})])


def is_of(row: dict[str, str], cell: Cell, device: str) -> bool:
    """Say whether a row is a cell's, trained on a device."""
    said = {**asdict(cell.recipe), **vars(cell), "device": device}
    return all(str(row[key]) == str(said[key]) for key in KEYS if key in said)


def run(cell: Cell, args: argparse.Namespace) -> None:
    """Train a cell unless that is done, or another process is at it, and add its row."""
    out: Path = args.runs / cell.name
    out.mkdir(parents=True, exist_ok=True)
    done = out / "done"
    try:
        with FileLock(out / ".lock", blocking=False):
            if not done.exists():
                row = train(cell, args.data, out, args.workers)
                with FileLock(f"{args.out}.lock"):
                    Sheet(args.out, KEYS).add([row])
                done.touch()
                for name in (LAST, PREVIOUS):  # twice the size of the weights each
                    (out / name).unlink(missing_ok=True)
    except Timeout:
        print("another process is at it", flush=True)


if __name__ == "__main__":
    main()
