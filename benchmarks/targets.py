"""What dynamic networks may cost, and the table of what they do; no imports of ours, for scripts and modules alike."""

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal

TITLES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenetv2_100": "MobileNetV2 1.0"}
Row = dict[str, str]

# mode, batch, what it is, and the targets for n = 1 and n = 4 (MobileNetV2's own where it has some)
CPU_TARGETS = (
    ("inference", 1, "CPU, inference, batch 1", (1.25, 1.5), (1.4, 1.6)),
    ("inference", 8, "CPU, inference, batch 8", (1.3, 1.6), (1.3, 1.6)),
    ("inference", 32, "CPU, inference, batch 32", (1.3, 1.6), (1.3, 1.6)),
    ("training", 16, "CPU, training step, batch 16", (1.5, 1.8), (1.5, 1.8)),
    ("memory", 16, "CPU, peak training memory, batch 16", (1.15, 1.3), (1.15, 1.3)),
)
GPU_TARGETS = (
    ("training", 128, "GPU, bfloat16, training step, batch 128", (1.25, 1.5), (1.25, 1.5)),
    ("inference", 1, "GPU, inference, batch 1, CUDA graphs", (1.2, 1.4), (1.4, 1.6)),
    ("inference", 128, "GPU, inference, batch 128", (1.2, 1.4), (1.2, 1.4)),
    ("memory", 128, "GPU, peak training memory, batch 128", (1.15, 1.3), (1.15, 1.3)),
)


def title(model: str) -> str:
    """The network's usual name."""
    return TITLES.get(model.partition("_")[2], model)


def fixed(value: str, digits: int, unit: str = "1") -> str:
    """A number of a row in some unit, rounded as one does by hand: halves go up."""
    return str((Decimal(value) / Decimal(unit)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def table_of_targets(models: Sequence[str], cpu: list[Row], gpu: list[Row]) -> str:
    """The targets and what was measured, as a table in Markdown: ratios to the static network in the same mode.

    Args:
        models: the dynamic networks, MobileNetV2 last.
        cpu: the rows of networks.csv.
        gpu: the rows of gpu_networks.csv, none as long as there are none.
    """
    lines = [
        "| | network | n = 1: target | measured | published form | n = 4: target | measured | published form |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for targets, rows, look_up in ((CPU_TARGETS, cpu, on_cpu), (GPU_TARGETS, gpu, on_gpu)):
        for mode, batch, what, usual, mobile in targets:
            found = {
                (model, n): look_up(
                    [row for row in rows if (row["model"], row["kernel_num"]) == (model, n)], mode, batch
                )
                for model in models
                for n in ("1", "4")
            }
            if not any(found.values()):
                own = [f" ({title(models[-1])}: {m:g})" if m != u else "" for u, m in zip(usual, mobile, strict=True)]
                cells = [f"{target:g}{other} | not yet measured | " for target, other in zip(usual, own, strict=True)]
                lines.append(f"| {what} | all three | {'| '.join(cells)}|")
                continue
            for model in models:
                limits = mobile if "mobilenet" in model else usual
                cells = []
                for n, target in zip(("1", "4"), limits, strict=True):
                    cells += [f"{target:g}", *measured(found[model, n], target)]
                lines.append(f"| {what} | {title(model)} | {' | '.join(cells)} |")
    return "\n".join(lines)


Found = dict[tuple[str, str], tuple[float, str]]  # ratio and the two values it is made of, by form and way


def measured(found: Found, target: float) -> tuple[str, str]:
    """Ours in every way it was measured, the best first, bold where it reaches the target; and the published form."""
    ours = sorted((ratio, way, values) for (form, way), (ratio, values) in found.items() if form == "ours")
    published = min((ratio for (form, _), (ratio, _) in found.items() if form == "published"), default=None)
    if not ours:
        return "not yet measured", ""
    shown = []
    for place, (ratio, way, values) in enumerate(ours):
        number = f"**{fixed(str(ratio), 2)}**" if place == 0 and ratio <= target else fixed(str(ratio), 2)
        shown.append(f"{number} {way} ({values})" if way else f"{number} ({values})")
    return ", ".join(shown), "" if published is None else fixed(str(published), 1)


def on_cpu(rows: list[Row], mode: str, batch: int) -> Found:
    """The rows of networks.py for this mode and batch."""
    value, unit = ("peak_mb", "MB") if mode == "memory" else ("median_ms", "ms")
    chosen = [row for row in rows if (row["mode"], row["batch"]) == (mode, str(batch))]
    return pairs(
        chosen, lambda row: "compiled" if row["compiled"] == "yes" else "eager", value, unit, "ratio_to_static"
    )


def on_gpu(rows: list[Row], mode: str, batch: int) -> Found:
    """The rows of gpu.py for this mode and batch; memory stands in the rows of training."""
    timed = "training" if mode == "memory" else mode
    chosen = [row for row in rows if (row["mode"], row["batch"]) == (timed, str(batch))]
    if mode == "memory":
        return pairs(chosen, lambda row: row["way"], "peak_mb", "MB", "peak_ratio_to_static")
    return pairs(chosen, lambda row: row["way"], "median_ms", "ms", "ratio_to_static")


def pairs(rows: list[Row], way_of: Callable[[Row], str], value: str, unit: str, ratio: str) -> Found:
    static = {way_of(row): row for row in rows if row["form"] == "static"}
    found: Found = {}
    for row in rows:
        way = way_of(row)
        form = "published" if row["form"] == "published" else "ours"
        if row["form"] == "static" or way not in static or not row[ratio]:
            continue
        number, values = float(row[ratio]), f"{float(row[value]):.4g} / {float(static[way][value]):.4g} {unit}"
        if not math.isnan(number):
            found[form, way] = min(found.get((form, way), (math.inf, "")), (number, values))
    return found
