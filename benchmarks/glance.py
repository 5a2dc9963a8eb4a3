"""Pictures of the pages, from measured rows: accuracy and price at a glance, and how networks begin.

python -m benchmarks.glance    draws docs/glance.png and docs/starts.png again
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.accuracy.report import tidy
from benchmarks.tables import NETWORKS, ROOT, row, rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from odconv.app.pages.colours import COLOURS, FAINT, INK

OURS, OTHERS, STATIC = COLOURS[0], COLOURS[1], FAINT
METHODS = {"static": "static", "dyconv_4x": "DyConv 4x", "odconv_1x": "ODConv 1x", "odconv_4x": "ODConv 4x"}
STUDY = {"static": "static", "se": "SE", "dyconv": "DyConv 4x", "odconv_1x": "ODConv 1x", "odconv_4x": "ODConv 4x"}


def draw_starts(axes: Axes) -> None:
    """Top-1 after sixty steps on digits, a dot a seed: drawn as published, and settled."""
    for place, method in enumerate(METHODS):
        found = {one["start"]: one for one in rows("starts", method=method, optimizer="sgd", lr="0.1", steps="60")}
        shown = {"": (STATIC, 0.0), "published": (OTHERS, 0.16), "settled": (OURS, -0.16)}
        for start, (colour, shift) in shown.items():
            if start in found:
                dots(axes, place + shift, [float(value) for value in found[start]["by_seed"].split()], colour)
    axes.set_xticks(range(len(METHODS)), [title.replace(" ", "\n") for title in METHODS.values()])
    axes.set_ylim(0, 104)
    axes.set_ylabel("top-1, %", color=INK)
    axes.set_title("60 steps on digits,\ntemperature 1", loc="left", size=11, color=INK)


def draw_accuracy(axes: Axes) -> None:
    """Top-1 of MobileNetV2 0.5 after twenty epochs of Imagenette from the settled start, a dot a seed."""
    for place, method in enumerate(STUDY):
        own = rows("accuracy", study="main", dataset="imagenette", epochs="20", start="settled", method=method)
        dots(axes, place, [float(one["top1"]) for one in own], STATIC if method in ("static", "se") else OURS)
    axes.set_xticks(range(len(STUDY)), [title.replace(" ", "\n") for title in STUDY.values()], size=8.5)
    axes.set_title("20 epochs of Imagenette,\ntemperature 1", loc="left", size=11, color=INK)


def dots(axes: Axes, place: float, values: list[float], colour: str) -> None:
    """A dot a seed, and a bar for their mean."""
    axes.plot([place] * len(values), values, "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
    axes.plot([place], [mean(values)], "_", color=colour, markersize=14, markeredgewidth=2.5)


def draw_price(axes: Axes) -> None:
    """Time and memory of ODConv 4x as ratios to the static network: ours, and the published form."""
    what = {("inference", "1"): "inference,\nbatch 1", ("training", "16"): "training\nstep"}
    what |= {("memory", "16"): "training\nmemory"}
    for group, (mode, batch) in enumerate(what):
        for bar, network in enumerate(NETWORKS):
            same = {"model": f"od_{network}", "kernel_num": "4", "mode": mode, "batch": batch, "compiled": "no"}
            ours, published = (
                float(row("networks", form=form, **same)["ratio_to_static"]) for form in ("ours", "published")
            )
            place = group + (bar - 1) * 0.28
            axes.bar([place], [published], 0.22, color=OTHERS, alpha=0.35)
            axes.bar([place], [ours], 0.22, color=OURS)
            axes.text(place, ours + 0.08, f"{ours:.2f}", ha="center", size=7.5, color=INK)
    axes.axhline(1, color=STATIC, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(what)), list(what.values()))
    axes.set_xlim(-0.55, len(what) - 0.45)
    axes.set_ylabel("static network = 1", color=INK)
    axes.set_title(
        "Price of ODConv 4x on a CPU: ResNet-18,\nResNet-50, MobileNetV2 1.0", loc="left", size=11, color=INK
    )


def draw_glance(path: Path) -> None:
    """Accuracy and price, for the README."""
    figure = Figure((10.4, 3.9), facecolor="white", layout="constrained")
    panels: tuple[Callable[[Axes], None], ...] = (draw_starts, draw_accuracy, draw_price)
    for axes, draw in zip(figure.subplots(1, 3, width_ratios=[1, 1.2, 1.4]), panels, strict=True):
        tidy(axes)
        draw(axes)
    named = {"odconv": OURS, "as published": OTHERS, "static, SE": STATIC}
    handles = [Line2D([], [], marker="s", linestyle="", color=colour, label=name) for name, colour in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(named), frameon=False)
    figure.savefig(path, dpi=150)


def draw_beginnings(path: Path) -> None:
    """What images have in common in a new ODConv 4x network, and how much it amplifies, by start and temperature."""
    shown = {
        f"published,\ntemperature {temperature}": ("ODConv 4x", "published", str(temperature))
        for temperature in (1, 5, 30)
    }
    shown |= {"calm": ("ODConv 4x", "calm", "1"), "settled": ("ODConv 4x, settled", "calm", "1")}
    found = [
        row("gradients", network="mobilenetv2_050", method=method, start=start, temperature=temperature)
        for method, start, temperature in shown.values()
    ]
    static = float(row("gradients", network="mobilenetv2_050", method="static")["amplification"])
    figure = Figure((10.4, 2.9), facecolor="white", layout="constrained")
    common, amplified = figure.subplots(1, 2, sharey=True)
    colours = [OTHERS if start == "published" else OURS for _, start, _ in shown.values()]
    common.barh(list(shown), [10 ** float(one["common"]) for one in found], color=colours)
    common.set_title("energy that all images have in common", loc="left", size=11, color=INK)
    amplified.barh(list(shown), [float(one["amplification"]) for one in found], color=colours)
    amplified.axvline(static, color=STATIC, linestyle="--", linewidth=1)
    amplified.set_xscale("log")
    amplified.set_title("amplification; dashed: the static network", loc="left", size=11, color=INK)
    for axes in (common, amplified):
        tidy(axes)
    common.invert_yaxis()
    common.set_xlim(0, 1)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw_glance(ROOT / "docs" / "glance.png")
    draw_beginnings(ROOT / "docs" / "starts.png")
