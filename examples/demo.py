"""Train ResNet-18, static and with ODConv 1x and 4x, on scikit-learn's digits; compare them and draw what happened."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import odconv
from odconv.app.classify.restore import Restored, restore
from odconv.app.cli import main as command
from odconv.app.commands.listing import find_recipes
from odconv.app.data import normalise, open_data
from odconv.app.pages import plot_attentions
from odconv.app.pages.curves import draw_history
from odconv.app.pages.reports import read_run
from odconv.attentions import record_attentions
from odconv.profiling.table import Table, short, show
from odconv.system.text import count

RECIPES = {
    "ResNet18": "digits_resnet18",
    "+ ODConv 1x": "digits_od_resnet18_1x",
    "+ ODConv 4x": "digits_od_resnet18_4x",
}
MINUTES = 5.0
"""What the three trainings may take together; they are shortened on a machine that would need longer."""

IMAGES = 1437
CHANCE = 2.0  # points of top-1
LEARNED = 90.0  # top-1 below which a training was too short to tell networks apart
SHOWN = (0, 0, 1, 1, 4, 4, 7, 7)  # digits in the picture of the attentions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for runs and pictures (default: demo)")
    out = parser.parse_args().out
    start = time.perf_counter()
    print(f"{IMAGES:,} handwritten digits of 8 x 8 pixels to learn from, 360 others to test on.", flush=True)
    epochs = choose_epochs()
    runs = {name: train(recipe, out / recipe, epochs) for name, recipe in RECIPES.items()}
    print()
    show(compare(runs))
    print("top-1 after the last epoch. " + verdict(runs))
    print("Small images hold few positions and many weights to mix for each: on them dynamic layers cost the most.\n")
    pictures = draw(runs, out)
    print(f"{time.perf_counter() - start:.0f} s in all. Pictures: {', '.join(map(str, pictures))}")


def choose_epochs() -> int:
    """How many epochs each network is trained for: those of the recipe, or fewer on a slow machine."""
    recipe = yaml.safe_load(find_recipes("train")[RECIPES["+ ODConv 4x"]].read_text())
    seconds = IMAGES / recipe["batch_size"] * seconds_per_step(recipe)
    epochs = max(1, min(recipe["epochs"], int(60 * MINUTES / (len(RECIPES) * seconds))))
    if epochs < recipe["epochs"]:
        print(
            f"An epoch of the slowest network takes some {seconds:.0f} s here. To end in about {MINUTES:g} minutes, "
            f"each is trained for {count(epochs, 'epoch')} instead of {recipe['epochs']}, and will be less accurate.",
            flush=True,
        )
    return epochs


def seconds_per_step(recipe: dict[str, Any]) -> float:
    """How long the network of a recipe takes here for a step of training, but for the optimizer."""
    network = odconv.create_model(recipe["arch"], kernel_num=recipe["kernel_num"], stem=recipe["stem"])
    images = torch.rand(recipe["batch_size"], 3, recipe["image_size"], recipe["image_size"])
    times = []
    for _ in range(3):  # in the first, what is compiled once may be compiled
        start = time.perf_counter()
        network(images).sum().backward()
        times.append(time.perf_counter() - start)
    return min(times)


def train(recipe: str, run: Path, epochs: int) -> Path:
    """Train as `odconv train` does; returns the folder of the run."""
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["train", "--config", recipe, "--out", str(run), "--devices", "1", "--epochs", str(epochs)]
    print(f"\n$ odconv {' '.join(arguments)}", flush=True)
    if status := command(arguments):
        sys.exit(status)
    return run


def compare(runs: dict[str, Path]) -> Table:
    """What each network costs and how well it does; times as ratios to the first."""
    header = ("network", "parameters", "multiply-adds", "top-1, %", "s/epoch", "ratio")
    results = {name: json.loads((run / "result.json").read_text()) for name, run in runs.items()}
    static = next(iter(results.values()))["train_seconds_per_epoch"]
    rows = []
    for name, result in results.items():
        network = best(runs[name])
        counts = odconv.profile(network.model, (3, network.image_size, network.image_size))
        seconds = result["train_seconds_per_epoch"]
        rows.append((
            name, f"{counts.parameters / 1e6:.2f}M", short(counts.madds), f"{result['top1']:.1f}",
            f"{seconds:.1f}", f"{seconds / static:.1f}",
        ))  # fmt: skip
    return Table(header, rows, left=1)


def verdict(runs: dict[str, Path]) -> str:
    """Which networks are ahead of the first, level with it or behind."""
    scores = {name: json.loads((run / "result.json").read_text())["top1"] for name, run in runs.items()}
    static, *_ = scores
    if min(scores.values()) < LEARNED:
        return f"Not all of them have learned the digits in this time: below {LEARNED:g} % they cannot be told apart."
    places = {
        name: "level with"
        if abs(score - scores[static]) < CHANCE
        else "ahead of"
        if score > scores[static]
        else "behind"
        for name, score in scores.items()
        if name != static
    }
    said = ", ".join(f"{name.removeprefix('+ ')} is {place} {static}" for name, place in places.items())
    return f"{said}; a difference below {CHANCE:g} points is chance with 360 images."


def draw(runs: dict[str, Path], out: Path) -> list[Path]:
    """The training curves, and the attentions of the last network on some digits it has not seen."""
    *_, network = (best(run) for run in runs.values())
    digits = open_data("digits", image_size=network.image_size, resize_size=network.resize_size).val
    places = {digit: [i for i, label in enumerate(digits.labels) if label == digit] for digit in SHOWN}
    images = normalise(torch.stack([digits[places[digit].pop(0)][0] for digit in SHOWN]))
    guesses = network.model(images).argmax(1).tolist()
    pairs = zip(SHOWN, guesses, strict=True)
    titles = [f"{digit}" if digit == guess else f"{digit}, taken for {guess}" for digit, guess in pairs]
    figures = {
        out / "curves.png": draw_history({name: read_run(run).epochs for name, run in runs.items()}),
        out / "attentions.png": plot_attentions(record_attentions(network.model, images), images, titles),
    }
    for path, figure in figures.items():
        figure.savefig(path, dpi=130)
    return list(figures)


def best(run: Path) -> Restored:
    """The network of a run after its best epoch."""
    return restore(str(run / "best.ckpt"))


if __name__ == "__main__":
    main()
