"""The report of what was trained: tables with confidence intervals, and a picture of accuracy against cost."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from benchmarks.accuracy.networks import ABLATIONS, METHODS, build
from benchmarks.common import alternate, origin, percentiles, read_rows, save_rows
from scipy import stats

import odconv
from odconv.app.pages.colours import COLOURS, FAINT, INK
from odconv.layers.attention import try_temperature

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
TITLES = {name: method.title for name, method in (METHODS | ABLATIONS).items()}
DATASETS = {"imagenette": "Imagenette", "cifar10": "CIFAR-10"}
RECIPE = ("train_images", "image_size", "epochs", "batch_size", "lr", "wd", "dropout", "stem", "augment")
SETTINGS = ("dataset", "network", *RECIPE)
"""What the trainings of a table of ablations share."""
MAIN_SETTINGS = (*SETTINGS, "temp_init", "temp_share", "start")
"""What the trainings of a main table share."""
CHANCE = 10.0
"""Top-1 of guessing, in %: all data sets have ten classes."""
CONFIDENCE = 0.95
SECONDS = 60
"""How long training and inference are measured, for each network."""


def write_report(results: Path, costs: Path, out: Path) -> None:
    """Write accuracy.md and accuracy.png to the folder `out` from the rows of all trainings; measure missing costs."""
    rows = read_rows(results)
    if not rows:
        raise FileNotFoundError(f"there are no rows to report in {results}")
    main = [row for row in rows if row["study"] in ("main", "longer")]
    measured = measure_costs(main, costs)
    tables = [*main_tables(main, measured), *ablation_tables(rows), *tuning_tables(rows)]
    text = "\n".join(["# Accuracy on real images", "", *tables]).rstrip()
    (out / "accuracy.md").write_text(text + "\n", encoding="utf-8")
    draw(main, measured, out / "accuracy.png")


def groups(rows: Sequence[Row], names: Sequence[str] = SETTINGS) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they share, in their order."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def top1(rows: Sequence[Row]) -> dict[str, float]:
    """Top-1 by seed; a training that diverged counts as chance.

    Raises:
        ValueError: a seed comes twice.
    """
    scores = {row["seed"]: CHANCE if row["top1"] == "diverged" else float(row["top1"]) for row in rows}
    if len(scores) < len(rows):
        raise ValueError(f"rows must differ in their seeds, got several of {rows[0]['network']} {rows[0]['method']}")
    return scores


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds, and how many of them diverged, as text."""
    diverged = sum(row["top1"] == "diverged" for row in rows)
    return f"{len(rows)}, {diverged} diverged" if diverged else str(len(rows))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, as text."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def difference(one: dict[str, float], other: dict[str, float]) -> str:
    """The mean difference of what has the same seed, with the confidence interval of Student's t, as text."""
    paired = [one[seed] - other[seed] for seed in one if seed in other]
    if not paired:
        return ""
    if len(paired) == 1:
        return f"{paired[0]:+.2f}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(paired) - 1) * stdev(paired) / len(paired) ** 0.5
    return f"{mean(paired):+.2f} ({mean(paired) - half:+.2f} to {mean(paired) + half:+.2f})"


def describe(setting: tuple[str, ...]) -> str:
    """What the trainings of a table share, in words."""
    s = dict(zip(MAIN_SETTINGS, setting, strict=False))
    stem = ", stem for small images" if s["stem"] == "small" else ""
    return (
        f"{s['network']}{stem}, {DATASETS[s['dataset']]}: {s['train_images']} training images of {s['image_size']} "
        f"pixels, {s['epochs']} epochs from scratch, batches of {s['batch_size']}, lr {s['lr']} (cosine), weight decay "
        f"{s['wd']}, dropout {s['dropout']}, augmentation {s['augment']}"
        + (f", start {s['start']}, temperature {anneal(s)}" if "temp_share" in s else "")
    )


def main_tables(main: Sequence[Row], costs: dict[tuple[str, ...], Row]) -> Iterator[str]:
    """A table for each data set and network: the methods."""
    for setting, rows in groups(main, MAIN_SETTINGS).items():
        yield f"## {describe(setting)}"
        yield ""
        yield (
            "| method | seeds | top-1, % | difference to static (95 % interval) | top-5, % | parameters | "
            "multiply-adds | training | inference |"
        )
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        by_method = groups(rows, ["method"])
        static = top1(by_method.get(("static",), []))
        for name in METHODS:
            own = by_method.get((name,), [])
            if own:
                scores, cost = top1(own), costs[cost_key(own[0])]
                top5 = [5 * CHANCE if row["top5"] == "diverged" else float(row["top5"]) for row in own]
                yield (
                    f"| {TITLES[name]} | {seeds(own)} | {spread([*scores.values()])} | "
                    f"{difference(scores, static) if name != 'static' else ''} | {spread(top5)} | "
                    f"{int(own[0]['parameters']) / 1e6:.2f}M | {float(cost['madds']) / 1e6:.1f}M | "
                    f"{float(cost['training_ratio']):.2f} | {float(cost['inference_ratio']):.2f} |"
                )
        yield ""


def ablation_tables(rows: Sequence[Row]) -> Iterator[str]:
    """What 4x is without a part, or with another setting, beside 4x itself."""
    tested = [row for row in rows if row["split"] == "test"]
    for setting, own in groups(tested).items():
        if not any(row["study"] == "ablation" for row in own):
            continue
        begun = ("temp_init", "temp_share", "start")
        variants = groups(own, ["method", *begun])
        usual, _ = Counter(tuple(row[name] for name in begun) for row in own).most_common(1)[0]
        base = top1(variants.get(("odconv_4x", *usual), []))
        yield f"## Ablations: {describe((*setting, *usual))}"
        yield ""
        yield "| network | seeds | top-1, % | difference to ODConv 4x (95 % interval) |"
        yield "| --- | --- | --- | --- |"
        for (method, *beginning), group in variants.items():
            if method in ("static", "odconv_1x", "odconv_4x") or group[0]["study"] == "ablation":
                same = tuple(beginning) == usual
                how = "" if same else differing(group[0], dict(zip(begun, usual, strict=True)))
                scores = top1(group)
                compared = "" if same and method == "odconv_4x" else difference(scores, base)
                yield f"| {TITLES[method]}{how} | {seeds(group)} | {spread([*scores.values()])} | {compared} |"
        yield ""


def differing(row: Row, usual: Row) -> str:
    """In what a training began otherwise than usual, in words."""
    start = "" if row["start"] == usual["start"] else f", start {row['start']}"
    return start + ("" if anneal(row) == anneal(usual) else f", temperature {anneal(row)}")


def tuning_tables(rows: Sequence[Row]) -> Iterator[str]:
    """What the recipe was chosen from."""
    tuning = [row for row in rows if row["study"] == "tuning"]
    shared = ("dataset", "network", "train_images", "image_size", "epochs", "batch_size")
    for (dataset, network, images, size, epochs, batch), own in groups(tuning, shared).items():
        yield (
            f"## The recipe was chosen on: {network}, {DATASETS[dataset]}, {images} training images of {size} "
            f"pixels, {epochs} epochs, batches of {batch}, measured on a tenth of the training images that was cut off"
        )
        yield ""
        yield "| method | start | lr | temperature | dropout | top-1, % |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for row in own:
            start, annealed = ("", "") if row["method"] == "static" else (row["start"], anneal(row))
            recipe = f"{start} | {row['lr']} | {annealed} | {row['dropout']}"
            yield f"| {TITLES[row['method']]} | {recipe} | {shown(row['top1'])} |"
        yield ""


def shown(score: str) -> str:
    return score if score == "diverged" else f"{float(score):.2f}"


def anneal(row: Row) -> str:
    """How the temperature falls, in words."""
    share, start = float(row["temp_share"]), float(row["temp_init"])
    if share == 0:
        return "1 throughout"
    if share <= 1:
        return f"{start:g} to 1 in the first {100 * share:g} %"
    return f"{start:g} to {1 + (start - 1) * (1 - 1 / share):.3g}"


def cost_key(row: Row) -> tuple[str, ...]:
    device = "cpu" if row["device"] == "cpu" else "cuda"
    return device, *(str(row[name]) for name in ("network", "method", "image_size", "stem", "batch_size"))


def measure_costs(main: Sequence[Row], path: Path) -> dict[tuple[str, ...], Row]:
    """Multiply-adds, and the time of a training step and of inference as ratios to the static network.

    The methods are measured in turns in one process; what `path` has is not measured again.
    """
    known = {cost_key(row): row for row in read_rows(path)}
    missing = [row for row in main if cost_key(row) not in known]
    for network, size, stem, batch in groups(missing, ["network", "image_size", "stem", "batch_size"]):
        print(f"measuring {network} at {size} pixels", flush=True)
        for row in measure(network, int(size), stem, int(batch)):
            known[cost_key(row)] = row
        save_rows(path, [*known.values()])
    if still := {row["device"] for row in main if cost_key(row) not in known}:
        raise ValueError(
            f"costs must be measured on the device of the trainings, {', '.join(still)}, which is not here"
        )
    return known


def measure(network: str, size: int, stem: str, batch: int) -> Iterator[Row]:
    """The costs of every method on one network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    models = {name: build(network, name, stem, 10).to(device) for name in METHODS}

    optimizers = {name: torch.optim.SGD(m.parameters(), 1e-6, momentum=0.9) for name, m in models.items()}

    def step(name: str) -> None:
        torch.nn.functional.cross_entropy(models[name](images), labels).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        wait(device)

    @torch.inference_mode()
    def infer(model: torch.nn.Module) -> None:
        model(images)
        wait(device)

    for model in models.values():
        try_temperature(model.train(), 30.0)
    training = alternate({name: partial(step, name) for name in models}, SECONDS, 5)
    for model in models.values():
        model.eval()
    inference = alternate({name: partial(infer, model) for name, model in models.items()}, SECONDS, 5)
    for name, model in models.items():
        row: Row = {"network": network, "method": name, "image_size": size, "stem": stem, "batch_size": batch}
        row["madds"] = odconv.profile(model, (3, size, size)).madds
        for mode, times in (("training", training), ("inference", inference)):
            own, static = percentiles(times[name]), percentiles(times["static"])
            row |= {f"{mode}_{key}": value for key, value in own.items()}
            row[f"{mode}_ratio"] = round(own["median_ms"] / static["median_ms"], 3)
        yield row | {"device": device.type, **origin()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def draw(main: Sequence[Row], costs: dict[tuple[str, ...], Row], path: Path) -> None:
    """Draw top-1 against multiply-adds, training time and inference time: a dot a seed, a bar for their mean."""
    from matplotlib.figure import Figure

    settings = groups(main, MAIN_SETTINGS)
    if not settings:
        return
    figure = Figure((12, 3.9 * len(settings)), facecolor="white", layout="constrained")
    panels = figure.subplots(len(settings), 3, squeeze=False, sharey="row")
    axis = (("madds", "multiply-adds, M", 1e-6), ("training_ratio", "time of a training step, static = 1", 1.0))
    axis += (("inference_ratio", "time of inference, static = 1", 1.0),)
    for line, (setting, rows) in zip(panels, settings.items(), strict=True):
        s = dict(zip(MAIN_SETTINGS, setting, strict=True))
        for axes, (column, label, factor) in zip(line, axis, strict=True):
            for index, (name, own) in enumerate(
                (name, [row for row in rows if row["method"] == name]) for name in METHODS
            ):
                if own:
                    x = factor * float(costs[cost_key(own[0])][column])
                    point(axes, x, [*top1(own).values()], TITLES[name], (*COLOURS, INK)[index])
            axes.set_xlabel(label, color=INK)
            tidy(axes)
        title = f"{s['network']}, {DATASETS[s['dataset']]} at {s['image_size']} pixels, {s['epochs']} epochs"
        title += f", start {s['start']}"
        line[0].set_title(title, loc="left", size=12, weight="bold", color=INK)
        line[0].set_ylabel("top-1, %", color=INK)
    named = {title: bar for axes in panels[:, 0] for bar, title in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    figure.savefig(path, dpi=110)


def point(axes: "Axes", x: float, values: list[float], title: str, colour: str) -> None:
    """A method: a dot a seed, and a bar for their mean."""
    axes.plot([x] * len(values), values, "o", color=colour, alpha=0.45, markersize=6, markeredgewidth=0)
    axes.plot([x], [mean(values)], "_", color=colour, markersize=22, markeredgewidth=3, label=title)


def tidy(axes: "Axes") -> None:
    axes.margins(x=0.15, y=0.12)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT)
