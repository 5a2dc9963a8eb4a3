"""The tables of README and docs that come from measured rows.

    python -m benchmarks.tables            writes each of them between its markers
    python -m benchmarks.tables --check    says which pages differ from their rows

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`. Words behind the name, such as `epochs=10` or
`images='short side 375'`, choose some of the rows. A figure in a sentence is a link to its CSV whose title names row
and column, `[70.2](../benchmarks/results/finetune.csv "start=static lr=0.01 epoch=1: top1")`; it keeps its number of
digits, and a comma. `mode=training|inference` means either, `: madds / 1e9` another unit, and `[1.1 to 1.5]`
the least and the greatest of several rows.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from benchmarks.accuracy.networks import METHODS
from benchmarks.accuracy.report import (
    MAIN_SETTINGS,
    TITLES,
    ablation_tables,
    cost_key,
    groups,
    main_tables,
    spread,
    top1,
)
from benchmarks.common import MODELS, RESULTS, read_rows
from benchmarks.targets import fixed, table_of_targets

from odconv.profiling import PUBLISHED, Published
from odconv.profiling.table import short

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- rows: (\w+)([^\n]*) -->\n)(.*?)(<!-- end of rows -->)", flags=re.S)
NUMBER = r"-?\d[\d.,]*"
FIGURE = re.compile(
    rf"\[({NUMBER}(?: to {NUMBER})?)\](\([^()\s]*results/(\w+)\.csv \"([^\"]*): (\w+)(?: / (\w+))?\"\))"
)
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenetv2_100": "MobileNetV2 1.0"}
DETECTORS = {"faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}
DATASETS = {"imagenette": "Imagenette", "cifar10": "CIFAR-10"}
ARCHITECTURES = {
    "mobilenetv2_050": "MobileNetV2 0.5",
    "resnet18": "ResNet-18",
    "resnet18_025": "ResNet-18 of a quarter of the width",
}
Row = dict[str, str]


def rows(name: str, /, **wanted: str) -> list[Row]:
    """The rows of a CSV in benchmarks/results that have these values; `a|b` is either.

    Raises:
        ValueError: there are none.
    """
    found = [
        row
        for row in read_rows(RESULTS / f"{name}.csv")
        if all(row[key] in value.split("|") for key, value in wanted.items())
    ]
    if not found:
        raise ValueError(f"{name}.csv has no rows with {wanted}")
    return found


def row(name: str, /, **wanted: str) -> Row:
    """The one row that has these values.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = rows(name, **wanted)
    if len(found) > 1:
        raise ValueError(f"{name}.csv has {len(found)} rows with {wanted}, not one")
    return found[0]


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))


# --- speed and memory


def targets() -> str:
    return table_of_targets(MODELS, rows("networks"), read_rows(RESULTS / "gpu_networks.csv"))


BEST = (
    ("inference", "float32", "1", "224"),
    ("inference", "float32", "8", "224"),
    ("inference", "bfloat16", "4", "224"),
    ("training", "float32", "16", "224"),
    ("training", "bfloat16", "16", "224"),
    ("training", "float32", "64", "24"),
    ("training", "float32", "64", "8"),
)
"""Mode, dtype, batch and size of the images in pixels."""


def best() -> str:
    """Each side in the fastest of its ways of running: milliseconds, the way, and ratios to the static network.

    Where onnxruntime is one of the ways, also the ratios of what is fastest in PyTorch.
    """
    measured = read_rows(RESULTS / "best.csv")

    def fastest(but: str = "", **wanted: str) -> Row:
        found = [
            one for one in measured if all(one[key] == value for key, value in wanted.items()) and one["way"] != but
        ]
        return min(found, key=lambda one: float(one["median_ms"]))

    def cells(**wanted: str) -> Iterator[str]:
        static = fastest(kernel_num="", **wanted)
        yield f"{float(static['median_ms']):.4g} ms, {static['way']}"
        for n in "14":
            ours = fastest(kernel_num=n, **wanted)
            ratio = fixed(ours["ratio_to_best_static"], 2)
            yield f"**{ratio}** ({float(ours['median_ms']):.4g} ms, {ours['way']})"
        times = [float(fastest("onnxruntime", kernel_num=n, **wanted)["median_ms"]) for n in ("", "1", "4")]
        engines = wanted["mode"] == "inference" and wanted["dtype"] == "float32"
        yield f"{times[1] / times[0]:.2f}, {times[2] / times[0]:.2f}" if engines else ""

    known = {(one["model"], one["mode"], one["dtype"], one["batch"], one["size"]) for one in measured}
    return table(
        ["network, mode, dtype, batch, pixels", "static, its best way", "ODConv 1x", "ODConv 4x", "in PyTorch alone"],
        (
            [
                f"{NETWORKS[network]}, {mode}, {dtype}, {batch}, {size}",
                *cells(model=f"od_{network}", mode=mode, dtype=dtype, batch=batch, size=size),
            ]
            for network in ("resnet18", "mobilenetv2_100")
            for mode, dtype, batch, size in BEST
            if (f"od_{network}", mode, dtype, batch, size) in known
        ),
    )


def detectors() -> str:
    def cells(detector: str, network: str) -> Iterator[str]:
        for mode in ("training", "inference"):
            same = {"detector": detector, "backbone": f"od_{network}", "kernel_num": "4", "mode": mode}
            static, ours = (row("detectors", form=form, **same) for form in ("static", "ours"))
            yield fixed(static["median_ms"], 0)
            yield f"{fixed(ours['median_ms'], 0)} (**{fixed(ours['ratio_to_static'], 2)}**)"
            yield fixed(ours["memory_ratio"], 2)

    columns = ["detector", "backbone", "training: static", "ODConv 4x", "memory"]
    return table(
        [*columns, "inference: static", "ODConv 4x", "memory"],
        (
            [DETECTORS[detector], NETWORKS[network], *cells(detector, network)]
            for detector in DETECTORS
            for network in ("resnet50", "mobilenetv2_100")
        ),
    )


def detect_evaluated() -> str:
    """Detectors trained on some images, and measured on the same."""
    starts = {"pretrained": "pretrained", "warm": "warm start", "new": "from nothing"}

    def line(one: Row) -> list[str]:
        backbone = f"{'ODConv 4x' if one['kernel_num'] else 'static'}, {starts[one['start']]}"
        scores = [fixed(one[name], 1) for name in ("ap", "ap50", "mask_ap", "mask_ap50")]
        seconds = fixed(one["fastest_epoch_seconds"], 0)
        return [backbone, one["images"], one["epochs"], fixed(one["train_loss"], 2), *scores, seconds]

    columns = ["backbone", "images", "epochs", "loss at the end", "box AP", "AP50", "mask AP", "AP50"]
    return table([*columns, "seconds of its fastest epoch"], map(line, rows("detect_evaluated")))


def accelerating() -> str:
    networks = {
        "resnet18 of copied ODConv2d": "ResNet-18 of copied `ODConv2d`",
        "resnet18 of copied KernelWarehouse": "ResNet-18 of KernelWarehouse's file, 1x",
        "resnet18 in the manner of FDConv": "ResNet-18 in the manner of FDConv",
        "blocks in the manner of EfficientAT": "blocks in the manner of EfficientAT",
        "tf_efficientnet_cc_b0_4e": "`tf_efficientnet_cc_b0_4e`, depth-wise for the most part",
    }

    def cell(network: str, mode: str, batch: str) -> str:
        found = rows("accelerating", network=network, mode=mode, batch=batch, form="accelerated")
        return ", ".join(fixed(one["times_as_fast"], 1 if "ODConv2d" in network else 2) for one in found)

    def kept(network: str) -> str:
        same = {"network": network, "mode": "training", "round": "1"}
        before, after = (row("accelerating", form=form, **same)["saved_mb"] for form in ("as it is", "accelerated"))
        return f"{fixed(before, 0)} to {fixed(after, 0)} MB"

    return table(
        ["", "batch of 1", "batch of 8", "training, 8", "kept for the backward pass"],
        (
            [
                title,
                *(cell(network, *what) for what in (("inference", "1"), ("inference", "8"), ("training", "8"))),
                kept(network),
            ]
            for network, title in networks.items()
        ),
    )


def warehouse() -> str:
    """KernelWarehouse and its published form, all rounds, since the machine was busy."""
    measured = {"inference, batch of 1": ("inference", "1"), "inference, batch of 8": ("inference", "8")}
    measured["training step, batch of 8"] = ("training", "8")

    def ratios(mode: str, batch: str, form: str) -> str:
        found = rows("warehouse", mode=mode, batch=batch, form=form)
        return ", ".join(fixed(one["ratio_to_static"], 2) for one in found)

    def saved(form: str) -> str:
        kept = [rows("warehouse", mode="training", form=one)[0]["saved_mb"] for one in (form, "static")]
        return fixed(kept[0], 2, kept[1])

    forms = ("ours", "published")
    lines = [[title, *(ratios(*what, form) for form in forms)] for title, what in measured.items()]
    return table(["", "ours", "published form"], [*lines, ["kept for the backward pass", *map(saved, forms)]])


def export() -> str:
    def line(threads: str, model: str) -> list[str]:
        found = {form: row("export", form=form, model=model, batch="1", threads=threads) for form in forms}
        times = [f"{fixed(one['median_ms'], 1)} ({fixed(one['ratio_to_static'], 2)})" for one in found.values()]
        static, read = fixed(found["static"]["median_ms"], 1), fixed(found["loop"]["read_ms"], 1)
        return [f"`{model}`", threads, static, *times[1:], read]

    forms = ("static", "loop", "one", "product")
    columns = ["network", "threads", "static", "`loop`", "`--batch_one`", "`product`", "reading the kernels"]
    return table(columns, (line(threads, f"od_{network}") for threads in "12" for network in NETWORKS))


def quantising() -> str:
    def line(model: str) -> list[str]:
        float32, int8 = (
            row("quantising", measured="latency", model=model, precision=precision) for precision in ("float32", "int8")
        )
        size, time = fixed(int8["megabytes"], 1), fixed(int8["median_ms"], 1)
        smaller = fixed(int8["megabytes"], 2, unit=float32["megabytes"])
        ratios = (fixed(int8[f"ratio_to_{other}"], 2) for other in ("float32", "static"))
        return [f"`{model}`", size, smaller, f"{time} ms", *ratios]

    columns = [
        "network, ODConv 4x",
        "file, MB",
        "of float32",
        "time of one image",
        "of float32",
        "of the static network",
    ]
    return table(columns, (line(f"od_{network}") for network in NETWORKS))


def serving() -> str:
    def line(one: Row) -> list[str]:
        form = {"static": "", "int8": ", int8"}.get(one["form"], f", `{one['form']}`")
        together = "1" if one["max_batch"] == "1" else f"up to {one['max_batch']}"
        times = ", ".join(fixed(one[key], 2, unit="1000") for key in ("p50_ms", "p90_ms", "p99_ms"))
        figures = fixed(one["mean_batch"], 1), fixed(one["requests_per_s"], 1), fixed(one["ratio_to_static"], 2)
        return [f"`{one['model']}`{form}", together, *figures, times]

    columns = ["network", "images together", "formed, mean", "requests a second", "of static", "p50, p90, p99, s"]
    return table(columns, map(line, rows("serving")))


# --- accuracy


def accuracy(**wanted: str) -> str:
    """The methods on one data set, in one of the settings of benchmarks.accuracy."""
    costs = {cost_key(one): one for one in read_rows(RESULTS / "accuracy_costs.csv")}
    chosen = [one for one in rows("accuracy", **wanted) if one["study"] in ("main", "longer")]
    (found,) = "\n".join(main_tables(chosen, costs)).split("## ")[1:]
    return found.partition("\n\n")[2].strip()


def ablations() -> str:
    (found,) = "\n".join(ablation_tables(read_rows(RESULTS / "accuracy.csv"))).split("## ")[1:]
    return found.partition("\n\n")[2].strip()


def top1_by_method(**wanted: str) -> str:
    """A line for each setting of benchmarks.accuracy, a column for each method."""
    chosen = [one for one in rows("accuracy", **wanted) if one["study"] in ("main", "longer")]
    trained = [name for name in METHODS if any(one["method"] == name for one in chosen)]
    lines = []
    for setting, own in groups(chosen, MAIN_SETTINGS).items():
        s = dict(zip(MAIN_SETTINGS, setting, strict=True))
        by_method = groups(own, ["method"])
        scores = [spread([*top1(by_method[(name,)]).values()]) if (name,) in by_method else "" for name in trained]
        lines.append([f"{ARCHITECTURES[s['network']]}, {DATASETS[s['dataset']]}, {s['epochs']} epochs", *scores])
    return table(["", *(TITLES[name] for name in trained)], lines)


DIGITS = {
    "static": "static",
    "condconv_8x": "CondConv 8x",
    "dyconv_4x": "DyConv 4x",
    "odconv_1x": "ODConv 1x",
    "odconv_4x": "ODConv 4x",
}
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
NEW = DIGITS | {"kernelwarehouse_1x": "KernelWarehouse 1x", "kernelwarehouse_4x": "KernelWarehouse 4x"}


def starts_by_method(start: str, column: str, **training: str) -> list[str]:
    """Return a figure of each method's new networks, after a training, as cells."""

    def cell(method: str) -> str:
        found = {one["start"]: one[column] for one in rows("starts", method=method, **training)}
        # the static network has no start, KernelWarehouse no settled options: those of the layers are all
        return fixed(found.get("") or found.get(start) or found["calm"], 1)

    return [cell(method) for method in NEW]


def starts() -> str:
    titles = {
        "settled": "settled: `odconv.convert(warm_start=False)`, `odl_` networks",
        "calm": "calm: the layers as they are, `od_`, `dy_`, `cond_` and `kw_` networks",
        "published": "published",
    }
    return table(
        ["start", *NEW.values()],
        (
            [title, *starts_by_method(start, "top1", optimizer="sgd", lr="0.1", steps="60")]
            for start, title in titles.items()
        ),
    )


def rates() -> str:
    """New networks after short trainings at other rates: as they are, or with batch norm's statistics recomputed."""
    trainings = [
        ("sgd", "0.01", "300", "top1"),
        ("sgd", "0.2", "60", "top1"),
        ("adamw", "0.0001", "600", "top1"),
        ("adamw", "0.001", "240", "top1"),
        ("adamw", "0.004", "60", "top1"),
        ("adamw", "0.004", "60", "recomputed"),
    ]
    return table(
        ["optimizer, rate, steps", "start", *NEW.values()],
        (
            [
                f"{OPTIMIZERS[optimizer]}, {lr}, {steps}{', recomputed' if column == 'recomputed' else ''}",
                start,
                *starts_by_method(start, column, optimizer=optimizer, lr=lr, steps=steps),
            ]
            for optimizer, lr, steps, column in trainings
            for start in ("settled", "calm")
        ),
    )


def warm() -> str:
    """Warm starts in a short training at a high rate, at the pace that they have and at the full one."""
    paces = {
        "warm": "as `odconv.convert` begins",
        "full": '`temperature=1`, `kernel_gain=1`, for CondConv `init="published"`',
    }

    def line(optimizer: str, lr: str, pace: str) -> list[str]:
        found = {(one["method"], one["pace"]): one for one in rows("warm", optimizer=optimizer, lr=lr)}
        cells = (found.get((method, pace)) or found.get((method, "")) for method in DIGITS)
        rate = f"{OPTIMIZERS[optimizer]}, {lr}"
        return [rate, paces[pace], *(fixed(one["top1"], 1) if one else "" for one in cells)]

    runs = groups(rows("warm"), ["optimizer", "lr"])
    order = sorted(runs, key=lambda run: (run[0] != "sgd", float(run[1])))
    return table(
        ["optimizer, rate", "pace", *DIGITS.values()],
        (
            line(*run, pace)
            for run in order
            for pace in paces
            if any(one["pace"] == pace for one in rows("warm", optimizer=run[0], lr=run[1]))
        ),
    )


def gradients() -> str:
    """How new networks begin: MobileNetV2 0.5 in full, of ResNet-18 what it amplifies."""

    def shown(value: str, form: str) -> str:
        if not value:
            return ""
        number = float(value)
        if number >= 1e5:
            return f"{number:.1e}".replace("e+0", "e")
        return f"{number:,.0f}" if number >= 1000 else f"{number:{form}}"

    def line(one: Row) -> list[str]:
        same = {key: one[key] for key in ("method", "start", "temperature")}
        other = row("gradients", network="resnet18", **same)
        temperature = one["temperature"] if "ODConv" in one["method"] or one["method"] == "DyConv" else ""
        return [
            *(one["method"], one["start"], temperature),
            *(shown(one["logit_std"], ".2g"), one["entropy"], shown(one["common"], ".2g")),
            *(shown(one["gradient_norm"], ".3g"), shown(one["amplification"], ".3g")),
            *(shown(other["common"], ".2g"), shown(other["amplification"], ".1f")),
        ]

    columns = ["MobileNetV2 0.5", "start", "temperature", "logits", "entropy", "common energy", "gradient"]
    columns += ["amplification", "ResNet-18: common energy", "amplification"]
    return table(columns, map(line, rows("gradients", network="mobilenetv2_050")))


def finetune() -> str:
    titles = {"static": "static", "warm_1x": "ODConv 1x, warm", "warm_4x": "ODConv 4x, warm"}
    titles |= {"cold_1x": "ODConv 1x, cold", "cold_4x": "ODConv 4x, cold"}
    runs = groups(rows("finetune"), ["lr", "init", "temp_init", "start"])
    order = sorted(runs, key=lambda run: (float(run[0]), run[1], -float(run[2]), list(titles).index(run[3])))
    warm_first = sorted(order, key=lambda run: run[3].startswith("cold"))

    def line(run: tuple[str, ...]) -> list[str]:
        lr, init, temperature, start = run
        constant = float(temperature) <= 5  # as the starts have it; what falls begins above
        falls = "" if start == "static" else f"{float(temperature):g}{'' if constant else ' to 1'}"
        return [titles[start], lr, init, falls, *(fixed(epoch["top1"], 1) for epoch in runs[run])]

    columns = ["start", "learning rate", "attentions", "temperature", "epoch 1", "2", "3"]
    return table(columns, map(line, warm_first))


def weights() -> str:
    def line(one: Row) -> list[str]:
        scores = (f"{fixed(one[score], 2)} %" for score in ("top1", "top5"))
        return [f"[`{one['name']}`](../weights/{one['name']})", f"`{one['network']}`", one["megabytes"], *scores]

    return table(["name", "network", "MB", "top-1", "top-5"], map(line, rows("weights")))


# --- many processes

KERNELS = {"static": "", "1x": "1", "2x": "2", "4x": "4"}
STEP, BACKWARD = Decimal("0.1"), Decimal(2) / 3  # seconds, and the part of them in which DDP sends
IMAGES, KILOBYTES = 1_281_167, Decimal("115.4")  # of ImageNet to train on
DECODED = "short side 375, quality 98"


def of_form(network: str, form: str) -> Row:
    """The values that tell a network's rows in communication.csv."""
    return {"model": network if form == "static" else f"od_{network}", "kernel_num": KERNELS[form]}


def bandwidth() -> str:
    """What hides the gradients of p processes behind the backward pass of a step."""

    def line(network: str, form: str) -> list[str]:
        static, own = (
            Decimal(row("communication", kind="gradients", **of_form(network, one))["bytes"])
            for one in ("static", form)
        )
        needed = (2 * Decimal(p - 1) / p * own / (BACKWARD * STEP) for p in (8, 1024))
        sizes = fixed(str(own), 1, "1e6"), fixed(str(own / static), 2)
        return [network, form, *sizes, *(fixed(str(one), 2, "1e9") for one in needed)]

    networks = ("resnet18", "resnet50", "resnet101", "mobilenetv2_100")
    columns = ["network", "form", "gradients, MB", "to static", "8 GPUs, GB/s", "1,024 GPUs, GB/s"]
    return table(columns, (line(network, form) for network in networks for form in KERNELS))


def reading() -> str:
    """What feeds GPUs that take so many images a second each."""
    ways, gpus = ("pil", "simplejpeg in place", "simplejpeg bytes"), (8, 64, 1024)
    same = {"images": DECODED, "mode": "training", "kind": "loader"}
    decoded = [Decimal(row("decoding", way=way, **same)["images_per_second"]) for way in ways]

    def line(rate: int) -> list[str]:
        figures = [(rate / core, 1) for core in decoded] + [(rate * KILOBYTES / 1000, 1)]
        figures += [(p * rate * KILOBYTES / 10**6, 2) for p in gpus]
        figures += [(Decimal(IMAGES) / (p * rate), 1) for p in gpus]
        return [f"{rate:,}", *(fixed(str(figure), digits) for figure, digits in figures)]

    columns = ["*r*, images a second a GPU", "cores a GPU, `pil`", *(f"`{way}`" for way in ways[1:])]
    columns += ["data a GPU, MB/s", *(f"{p:,} GPUs, GB/s" for p in gpus)]
    columns += ["epoch on 8, s", "on 64, s", "on 1,024, s"]
    return table(columns, map(line, (500, 1000, 2000, 5000)))


def communication() -> str:
    """All-reduce, steps with and without it, and SyncBN, of two processes."""

    def milliseconds(one: Row) -> str:
        return fixed(one["median_ms"], 1 if float(one["median_ms"]) < 100 else 0)

    def line(network: str, form: str) -> list[str]:
        same = of_form(network, form)
        alone, norms = (row("communication", kind=kind, **same) for kind in ("all-reduce", "sync_bn"))
        static = row("communication", kind="all-reduce", **of_form(network, "static"))
        steps = {one["way"]: one for one in rows("communication", kind="step", **same)}
        exposed = (f"{fixed(steps[way]['exposed'], 1, '0.01')} %" if way in steps else "" for way in changes)
        each = str(Decimal(norms["median_ms"]) / int(norms["messages"]))
        return [
            *(network, form, steps["plain"]["batch"], fixed(alone["bytes"], 1, "1e6"), milliseconds(alone)),
            *(fixed(alone["median_ms"], 1, static["median_ms"]), milliseconds(steps["none"])),
            *(milliseconds(steps["plain"]), *exposed),
            *(norms["messages"], milliseconds(norms), fixed(each, 2)),
        ]

    changes = ("plain", "bucket view", "buckets of 5 MB", "bf16", "fp16")
    columns = ["network", "form", "images", "gradients, MB", "all-reduce alone, ms", "to static", "step without, ms"]
    columns += ["step with, ms", "exposed", *changes[1:], "SyncBN, messages", "SyncBN alone, ms", "a message, ms"]
    networks = ("mobilenetv2_050", "resnet18", "resnet50")
    return table(columns, (line(network, form) for network in networks for form in ("static", "4x")))


def decoding() -> str:
    """Images a second of one core."""
    ways = ("pil", "simplejpeg in place", "simplejpeg bytes", "pil draft", "opencv bytes")

    def line(mode: str, images: str, kind: str) -> list[str]:
        found = {one["way"]: one for one in rows("decoding", images=images, mode=mode, kind=kind)}
        rates = (f"{int(found[way]['images_per_second']):,}" if way in found else "" for way in ways)
        one = found["pil"]
        return [f"{mode}, {images}" + ", loader" * (kind == "loader"), one["files"], one["kilobytes"], *rates]

    sides = (f"short side {side}, quality {quality}" for side, quality in ((375, 90), (375, 98), (1200, 90)))
    whole = [(mode, images, "whole") for images in ("sample", *sides) for mode in ("training", "evaluation")]
    loaded = [(mode, DECODED, "loader") for mode in ("training", "evaluation")]
    columns = ["images a second of a core", "files", "kB", *(f"`{way}`" for way in ways)]
    return table(columns, (line(*one) for one in [*sorted(whole, key=lambda one: one[0] != "training"), *loaded]))


def decoding_steps() -> str:
    """What the steps of reading an image take."""

    def cell(step: str, way: str) -> str:
        name = step if step == "read" else f"{way}: {step}"
        same = {"images": DECODED, "mode": "training", "kind": "step"}
        return next((one["median_ms"] for one in rows("decoding", **same) if one["way"] == name), "")

    steps = ("read", "decode", "crop and resize", "flip half of them", "to tensor", "to float", "normalise")
    ways = ("pil", "simplejpeg")
    return table(
        ["step, ms an image", *(f"`{way}`" for way in ways)], ([step, *(cell(step, w) for w in ways)] for step in steps)
    )


# --- counts


def published() -> str:
    """The published networks: what is counted here, and what the authors print."""

    def line(network: Published) -> list[str]:
        found = costs(network.name, network.kernel_num)
        madds, same = int(found["madds"]), int(found["madds_as_published"])
        counted = short(madds) if madds == same else f"{short(madds)} ({short(same)})"
        printed = network.madds * 1e6 if network.madds else 0
        beside = counted, short(printed), f"{round(same / printed - 1, 3) + 0.0:+.1%}"  # no -0.0
        accuracy = f"{network.top1:.2f}", f"{network.top5:.2f}"
        return [
            f"`{network.name}`",
            found["kernel_num"],
            f"{fixed(found['parameters'], 2, '1e6')}M",
            *beside,
            *accuracy,
        ]

    columns = ["network", "n", "parameters", "multiply-adds", "published", "difference", "top-1", "top-5"]
    return table(columns, (line(network) for network in PUBLISHED if network.madds))


def costs(model: str, kernel_num: int | None, **wanted: str) -> Row:
    """What a network costs."""
    return row("costs", model=model, kernel_num=str(kernel_num or ""), **wanted)


def methods() -> str:
    """What each method mixes, and what that makes of ResNet-18."""
    pieces = "pieces of cells that layers share, by signed shares"
    gates = "n kernels, by a softmax; taps, channels and filters, by sigmoids"
    lines: tuple[tuple[str, str, list[Row], str], ...] = (
        ("static", "", [costs("resnet18", None)], ""),
        ("CondConv, n = 8", "n kernels, by sigmoids", [costs("cond_resnet18", 8)], "`CondConv1d` to `3d`, `cond_`"),
        ("DyConv, n = 4", "n kernels, by a softmax", [costs("dy_resnet18", 4)], "`DyConv`, `dy_`"),
        ("ODConv, n = 1 / 4", gates, [costs("od_resnet18", n) for n in (1, 4)], "`ODConv`, `od_`, `odl_`"),
        ("KernelWarehouse, 1x / 4x", pieces, [costs("kw_resnet18", None, budget=b) for b in "14"], "`KWConv`, `kw_`"),
    )

    def figures(found: list[Row]) -> str:
        parameters, madds = ([one[column] for one in found] for column in ("parameters", "madds"))
        return f"{' / '.join(fixed(one, 2, '1e6') for one in parameters)} M, " + (
            f"{' / '.join(fixed(one, 3, '1e9') for one in madds)} G"
        )

    return table(
        ["", "what a sample's kernel is mixed of, and by", "ResNet-18: parameters, multiply-adds", "layers, networks"],
        ([method, mixed, figures(found), names] for method, mixed, found, names in lines),
    )


def gflops() -> str:
    """What ultralytics says of its networks."""

    def line(name: str, title: str) -> list[str]:
        found = [costs(name, n) for n in (None, 1, 4)]
        return [title, *(fixed(one["gflops"], 2) for one in found), fixed(found[-1]["madds"], 2, "5e8")]

    columns = ["network", "static", "n = 1", "n = 4", "twice the multiply-adds of `odconv.profile`, n = 4"]
    return table(columns, (line(name, title) for name, title in (("yolov8n", "YOLOv8n"), ("yolo11n", "YOLO11n"))))


def detector_sizes() -> str:
    """Parameters of the published detectors, in millions."""
    printed = {"faster_rcnn": ("43.80", "108.91", "21.13", "29.14"), "mask_rcnn": ("46.45", "111.56", "23.78", "31.80")}
    backbones = {"resnet50": None, "od_resnet50": 4, "mobilenetv2_100": None, "od_mobilenetv2_100": 4}

    def line(detector: str, backbone: str, n: int | None, authors: str) -> list[str]:
        own = int(costs(f"{detector} {backbone}", n)["parameters"])
        channels = 1280 if "mobilenet" in backbone else 2048
        numbers = (fixed(str(count), 3, "1e6") for count in (own, own + 1000 * (channels + 1)))
        return [f"`{backbone}`" + (f", `kernel_num={n}`" if n else ""), f"`{detector}`", *numbers, authors]

    return table(
        ["backbone", "detector", "here", "with the classifier", "published"],
        (
            line(detector, *backbone, authors)
            for detector, column in printed.items()
            for backbone, authors in zip(backbones.items(), column, strict=True)
        ),
    )


def counters() -> str:
    """What other people's counters say of an ODConv 4x ResNet-18, by themselves and with a line of ours."""
    prefix = "odconv.profiling.counters"
    lines = (  # counter, how it is written, what it says by itself, the line, what it says then
        ("FlopCounterMode", "torch {version} `FlopCounterMode`", "{madds} G (twice that, in FLOPs)", "", ""),
        (
            "Lightning",
            "Lightning {version} summary, with `example_input_array`",
            "{madds} G (twice that, in FLOPs), {parameters} M",
            "",
            "",
        ),
        (
            "thop",
            "thop {version}",
            "{madds} G, {parameters} M",
            f"`thop.profile(model, (x,), custom_ops={prefix}.thop_ops())`",
            "{madds} G, {parameters} M; batch norm counts two an element",
        ),
        (None, "ultralytics-thop 2.2.3", "see above", "the same; `odconv.yolo` does it for ultralytics", ""),
        (
            "ptflops pytorch",
            'ptflops {version}, "pytorch"',
            "{madds} G, {parameters} M",
            f"`custom_modules_hooks={prefix}.ptflops_hooks()`",
            "{madds} G, with batch norm, activations and biases",
        ),
        ("ptflops aten", 'ptflops {version}, "aten"', "{madds} G, {parameters} M", "the same", "{madds} G"),
        (
            "calflops",
            "calflops {version}",
            "{madds} GMACs, {parameters} M",
            f"`calflops.pytorch_ops.MODULE_HOOK_MAPPING.update({prefix}.calflops_hooks())` before",
            "{madds} GMACs",
        ),
        (
            "torchinfo",
            "torchinfo {version}",
            "{madds} G, {parameters} M, {megabytes} MB",
            f"`print({prefix}.torchinfo_statistics(summary(model, (1, 3, 224, 224), verbose=0)))`",
            "{madds} G, {parameters} M, {megabytes} MB",
        ),
        (
            "torchsummary",
            "torchsummary {version}",
            "{parameters} M; it counts no multiply-adds",
            "",
            "it lists weights and biases alone: the mixed bias of DyConv and CondConv, `kernel_bias`, is missing",
        ),
        (
            "fvcore",
            "fvcore {version}, mmengine {mmengine}",
            "{madds} G",
            "",
            "they trace the network, which then unfolds the maps by a convolution, and count no products with gates; "
            "the fewer filters a layer has, the more this adds (k*k / O)",
        ),
    )

    def figures(one: Row) -> dict[str, str]:
        units = {"madds": ("1e9", 3), "parameters": ("1e6", 2), "parameter_bytes": ("1e6", 1)}
        shown = {key: fixed(one[key], digits, unit) for key, (unit, digits) in units.items() if one[key]}
        shown["megabytes"] = shown.pop("parameter_bytes", "")
        return shown | {"version": version(one), "mmengine": version(row("counters", counter="mmengine"))}

    def version(one: Row) -> str:
        (found,) = re.findall(r"^\d+\.\d+\.\d+", one["version"])
        return found

    def cells(counter: str | None, name: str, itself: str, line: str, then: str) -> list[str]:
        if counter is None:
            return [name, itself, line, then]
        alone, *more = sorted(rows("counters", counter=counter), key=lambda one: one["line"])
        by_itself, with_line = figures(alone), figures(more[0] if more else alone)
        return [name.format(**by_itself), itself.format(**by_itself), line, then.format(**with_line)]

    return table(["counter", "by itself", "with", "then it says"], (cells(*line) for line in lines))


TABLES: dict[str, Callable[..., str]] = {
    make.__name__: make
    for make in (
        best, targets, detectors, detect_evaluated, accelerating, warehouse, export, quantising, serving, accuracy,
        ablations, top1_by_method, starts, rates, gradients, finetune, warm, counters, bandwidth, reading,
        communication, decoding, decoding_steps, weights, published, methods, gflops, detector_sizes,
    )
}  # fmt: skip


def written(page: str) -> str:
    """The page with its tables and figures as the rows have them."""

    def write(found: re.Match[str]) -> str:
        begin, name, words, _, end = found.groups()
        return f"{begin}\n{TABLES[name](**values(words))}\n\n{end}"

    def look_up(found: re.Match[str]) -> str:
        shown, link, name, words, column, unit = found.groups()
        figures, wanted = shown.split(" to "), values(words)
        chosen = [row(name, **wanted)] if len(figures) == 1 else rows(name, **wanted)
        measured = sorted((one[column] for one in chosen), key=Decimal)
        found = (like(old, new, unit or "1") for old, new in zip(figures, (measured[0], measured[-1]), strict=False))
        return f"[{' to '.join(found)}]{link}"

    return FIGURE.sub(look_up, MARKED.sub(write, page))


def like(old: str, new: str, unit: str) -> str:
    """A value of a row in some unit, with the digits and the comma of the figure that stands there."""
    number = Decimal(fixed(new, len(old.partition(".")[2]), unit))
    return f"{number:,}" if "," in old else str(number)


def values(words: str) -> Row:
    """The values by their columns, of words such as `epochs=10 images='short side 375'`."""
    return dict(word.split("=") for word in shlex.split(words))


def differing() -> list[Path]:
    """The pages that differ from the rows."""
    return [page for page in PAGES if written(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    args = parser.parse_args()
    for page in (pages := differing()):
        print(f"{page.relative_to(ROOT)} {'differs from its rows' if args.check else 'written'}")
        if not args.check:
            page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    if args.check and pages:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
