"""The command `odconv release`: the checkpoint of a run as a small folder of weights, for others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from odconv import __version__
from odconv.app.classify import evaluate
from odconv.app.classify.released import NOTES
from odconv.app.data.transforms import MEAN, STD
from odconv.app.engine.checkpoint_io import BEST
from odconv.app.pages.reports import read_run
from odconv.app.pages.reports.read_run import Run
from odconv.app.predict.classifier import class_names
from odconv.checkpoints import find_checkpoint, save_safetensors
from odconv.hub import CONFIG, WEIGHTS, HubModel
from odconv.profiling import profile
from odconv.profiling.table import short
from odconv.system.files import check_writable
from odconv.system.text import count

Precision = Literal["float16", "float32"]

PLACES = {"out", "data", "devices", "workers", "timeout", "resume", "save_every", "logger", "profile", "fast_dev_run"}
"""Options that say where and how conveniently a run was made, and nothing of what came out."""

CARD = """---
library_name: odconv
pipeline_tag: image-classification
tags: [dynamic-convolution]
---

# {title}

An image classifier for the Python package `odconv`, which wrote this folder as version {version}:

```python
from odconv.hub import HubModel

model = HubModel.from_pretrained("path/of/this/folder")
```

```sh
odconv predict photos/ --weights path/of/this/folder
odconv visualize photos/ --weights path/of/this/folder --out look
odconv demo --weights path/of/this/folder
```

| | |
| --- | --- |
{facts}

## Data

{data}

## Recipe

The options of `odconv train` that are not its defaults:

```yaml
{recipe}```
"""


def release(
    *,
    run: str,
    out: str,
    data_note: str,
    data: str | None = None,
    classes: str | None = None,
    precision: Precision = "float16",
) -> dict[str, Any]:
    """Turn the best checkpoint of a run into a small folder of weights, for others.

    Args:
        run: Folder of a run of odconv train.
        out: Folder to write, which must be empty or not be there: the weights, what builds the network, what it is
            given and answers, and a card that says what was measured.
        data_note: What the network was trained on, and under which licence that is; for the card.
        data: Where these data are, for measuring what is written; default: where the run found them.
        classes: Text file with what to call a class in each line, in the order of their folders; default: as the
            folders are called.
        precision: Of the weights: float16 for half the size, or float32; norms, biases and temperatures keep theirs.

    Returns:
        What was measured: top1 and top5 (in %), loss, images, corrupt, seconds.

    Raises:
        ValueError: the run is none of a classifier, a weight is too large for float16, or names are not as many.
    """
    folder, told = Path(out), read_run(run)
    if "detector" in told.config or "arch" not in told.config:
        raise ValueError(f"run must be the folder of a run of odconv train, got {run}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"out must be an empty folder, or not be there, got {out}")
    network, notes = _open(told, classes)
    weights = _rounded(network.model.state_dict(), precision)
    check_writable(folder)
    save_safetensors(weights, folder / WEIGHTS)
    for name, content in ((CONFIG, network.config), (NOTES, notes)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    measured = evaluate(weights=out, data=data or told.config["data"])
    (folder / "README.md").write_text(_card(told, network, notes, measured, data_note, precision), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"written: {folder}, {size / 1e6:.1f} MB")
    return measured


def _open(run: Run, names: str | None) -> tuple[HubModel, dict[str, Any]]:
    """Return the network of a run's best checkpoint, and what goes into NOTES."""
    checkpoint = find_checkpoint(run.folder / BEST)
    options = checkpoint.options
    network = HubModel(
        options["arch"],
        **{name: options[name] for name in ("kernel_num", "reduction", "num_classes", "dropout", "stem")},
        **options["layer_options"] or {},
        weights=checkpoint,
    )
    notes = {name: options[name] for name in ("image_size", "resize_size")}
    notes["classes"] = checkpoint.notes["classes"]
    if names is not None:
        notes["names"] = class_names(names, None, len(notes["classes"]))
    return network, notes


def _rounded(state: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Return weights, kernels and matrices in another precision; a ValueError if one is too large for it."""
    dtype = getattr(torch, precision)
    rounded = {
        name: tensor.to(dtype) if tensor.ndim > 1 and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    if lost := [name for name, tensor in rounded.items() if not tensor.isfinite().all()]:
        raise ValueError(f"precision must be float32, since {lost[0]} is too large for {precision}")
    return rounded


def _card(
    run: Run,
    network: HubModel,
    notes: Mapping[str, Any],
    measured: Mapping[str, Any],
    data_note: str,
    precision: Precision,
) -> str:
    size, classes = notes["image_size"], notes.get("names", notes["classes"])
    counts = profile(network.model, (3, size, size))
    facts = {
        "measured, with the weights in this folder": f"top-1 {measured['top1']:.2f} %, top-5 {measured['top5']:.2f} %, "
        f"on the {measured['images']:,} images for evaluation",
        "the run": f"best top-1 {run.best['top1']:.2f} %, after epoch {int(run.best['epoch'])}, which these same "
        f"images chose; {run.last('top1'):.2f} % after the last; {run.progress} epochs; "
        f"odconv {run.machine.get('odconv')}, PyTorch {run.machine.get('torch')}",
        "parameters": f"{counts.parameters / 1e6:.2f}M, kernels and matrices in {precision}",
        f"multiply-adds at {size} x {size}": short(counts.madds),
        "images": f"shorter side resized to {notes['resize_size']}, the centre of {size} x {size} cropped, scaled to "
        f"0 .. 1, normalised by mean {MEAN} and deviation {STD}",
        "classes": f"{len(classes)}: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}",
    }
    recipe = {
        name: Path(value).name if name == "weights" and value else value
        for name, value in run.config.items()
        if name not in PLACES and value != run.defaults.get(name)
    }
    number = network.config["kernel_num"]
    kernels = f", {count(number, 'kernel')}" if number else ""
    return CARD.format(
        title=f"{network.config['name']}{kernels}",
        version=__version__,
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        data=data_note,
        recipe=yaml.safe_dump(recipe, sort_keys=False),
    )
