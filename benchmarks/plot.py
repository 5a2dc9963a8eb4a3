"""What the rows of layers.py and networks.py say, in pictures.

python benchmarks/plot.py    draws the pictures again from the CSVs in benchmarks/results
"""

import math
import re
from pathlib import Path
from typing import Any

from common import MODELS, RESULTS, read_rows
from targets import CPU_TARGETS, title

Row = dict[str, str]


def pyplot() -> Any:
    """matplotlib's pyplot without a display, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_layers(path: Path) -> None:
    """Ratio to the static layer by layer and batch, ours next to the published form, beside the CSV as PNG."""
    rows, plt = read_rows(path), pyplot()
    if plt is None or not rows:
        return
    ratios = {
        (row["layer"], row["kernel_num"], row["batch"], row["attentions"], row["form"]): float(row["ratio_to_static"])
        for row in rows
    }
    layers = sorted({row["layer"] for row in rows}, key=by_map)
    batches = sorted({row["batch"] for row in rows}, key=int)
    panels = []
    for n in sorted({row["kernel_num"] for row in rows}, key=int):
        panels += [(n, "all", "auto", f"n = {n}: odconv"), (n, "all", "published", f"n = {n}: published form")]
        if any(row["attentions"] == "kernel" and row["kernel_num"] == n for row in rows):
            panels.append((n, "kernel", "auto", f"n = {n}, kernel\nattention alone: odconv"))
        if any(row["form"] == "timm" and row["kernel_num"] == n for row in rows):
            panels.append((n, "kernel", "timm", f"n = {n}, kernel\nattention alone: timm"))
    wide, high = 2.6 + len(panels) * max(1.7, 0.55 + 0.42 * len(batches)), 1.9 + 0.2 * len(layers)
    figure, axes = plt.subplots(1, len(panels), figsize=(wide, high), sharey=True, squeeze=False, layout="constrained")
    colours = plt.get_cmap("RdYlGn_r").copy()
    colours.set_bad("#eeeeee")
    for axis, (n, attentions, form, heading) in zip(axes[0], panels, strict=True):
        cells = [[ratios.get((layer, n, batch, attentions, form), math.nan) for batch in batches] for layer in layers]
        picture = axis.imshow(
            [[math.log2(c) for c in line] for line in cells], cmap=colours, vmin=-3, vmax=3, aspect="auto"
        )
        for i, line in enumerate(cells):
            for j, ratio in enumerate(line):
                if math.isnan(ratio):
                    continue
                peer = ratios.get((layers[i], n, batches[j], attentions, PEERS.get((attentions, form), "")), math.inf)
                slower = ratio > 1.05 * peer
                shown = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
                dark = abs(math.log2(ratio)) > 2.2
                axis.text(
                    j, i, shown, ha="center", va="center", size=7,
                    color="white" if dark else "black", weight="bold" if slower else "normal",
                )  # fmt: skip
                if slower:
                    axis.add_patch(
                        plt.Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, color="black", linewidth=1.3)
                    )
        axis.set_title(heading, size=9)
        axis.set_xticks(range(len(batches)), batches, size=8)
        axis.set_xlabel("batch", size=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0][0].set_yticks(range(len(layers)), layers, size=7.5, family="monospace")
    bar = figure.colorbar(picture, ax=axes, ticks=range(-3, 4), shrink=0.5, aspect=40, pad=0.01, extend="both")
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"], size=8)
    bar.set_label("time over the static layer's", size=8)
    figure.suptitle(f"{rows[0]['mode']}, {where(rows)}; framed: slower than 1.05 times its neighbour", size=9)
    save(figure, path)


PEERS = {("all", "auto"): "published", ("kernel", "auto"): "timm"}  # what ours must not be slower than


def by_map(layer: str) -> tuple[int, ...]:
    """Largest maps first, then dense before depth-wise, 3x3 before 1x1, few channels before many."""
    channels, filters, side, _, taps, stride, groups = map(int, re.findall(r"\d+", layer))
    return -side, min(groups, 2), -taps, channels, filters, stride


def draw_networks(path: Path) -> None:
    """Bars of the ratio to the static network, beside the CSV as PNG."""
    rows, plt = read_rows(path), pyplot()
    if plt is None or not rows:
        return
    panels = sorted(
        {(row["model"], row["kernel_num"]) for row in rows},
        key=lambda panel: (panel[0] not in MODELS, panel[0], int(panel[1])),
    )
    plans = sorted({(row["mode"], int(row["batch"])) for row in rows}, key=lambda plan: (MODES.index(plan[0]), plan[1]))
    forms = [form for form in FORMS if any((row["form"], row["compiled"]) == form[:2] for row in rows)]
    lines = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(
        lines, 2, figsize=(2.9 + 2.1 * len(plans), 0.9 + 2.3 * lines),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    ratios = {
        (row["model"], row["kernel_num"], row["mode"], int(row["batch"]), row["form"], row["compiled"]): float(
            row["ratio_to_static"]
        )
        for row in rows
    }
    targets = {(mode, batch): (limits, mobile) for mode, batch, _, limits, mobile in CPU_TARGETS}
    width = 0.84 / len(forms)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (model, n) in zip(axes.flat, panels, strict=False):
        for k, (form, compiled, label, colour) in enumerate(forms):
            for at, (mode, batch) in enumerate(plans):
                ratio = ratios.get((model, n, mode, batch, form, compiled))
                if ratio is None:
                    continue
                x = at - 0.42 + width * (k + 0.5)
                axis.bar(x, ratio - 1, 0.92 * width, bottom=1, color=colour, label=label)
                shown = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
                axis.text(x, max(ratio, 1) * 1.03, shown, ha="center", va="bottom", size=7, bbox=PLATE)
        for at, plan in enumerate(plans):
            if plan in targets and model in MODELS and n in ("1", "4"):
                target = targets[plan]["mobilenet" in model][int(n) // 4]
                axis.hlines(target, at - 0.45, at + 0.45, color="black", linestyle=":", linewidth=1.2, label="target")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xticks(range(len(plans)), [f"{mode}\nbatch {batch}" for mode, batch in plans], size=8)
        axis.set_title(f"{title(model)}, {FAMILIES[model.partition('_')[0]]}, n = {n}", size=10)
        axis.set_xlim(-0.6, len(plans) - 0.4)
        axis.margins(y=0.12)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    figure.supylabel("ratio to the static network in the same mode", size=9)
    figure.suptitle(where(rows), size=9)
    save(figure, path)


FAMILIES = {"od": "ODConv", "cond": "CondConv", "dy": "DyConv"}
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # a figure on a line stays readable
MODES = ("inference", "training", "memory")
FORMS = (
    ("ours", "no", "odconv, eager", "#1b7f4b"),
    ("ours", "yes", "odconv, compiled", "#7cc79a"),
    ("published", "no", "published form, eager", "#c9655a"),
)


def where(rows: list[Row]) -> str:
    """Machine and versions of the newest row."""
    row = rows[-1]
    return f"{row['machine']}, {row['threads']} threads, PyTorch {row['torch']}, float32"


def save(figure: Any, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=130)
    print(f"picture in {path.with_suffix('.png')}")


if __name__ == "__main__":
    for mode in ("inference", "training"):
        draw_layers(RESULTS / f"layers_{mode}.csv")
    draw_networks(RESULTS / "networks.csv")
