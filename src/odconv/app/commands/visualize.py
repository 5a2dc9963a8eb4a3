"""The command `odconv visualize`."""

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

from odconv.app.classify.restore import restore
from odconv.app.data import normalise
from odconv.app.pages.visualize.gallery import explain_examples
from odconv.app.pages.visualize.gradcam import choose_layer
from odconv.app.pages.visualize.images import choose, read
from odconv.app.pages.visualize.overview import class_share
from odconv.app.pages.visualize.page import write_page
from odconv.app.pages.visualize.subject import Subject, as_labels
from odconv.app.predict.classifier import class_names
from odconv.attentions.measurement import CLASS_COLUMNS, WHOLE, Layer, answer, measure
from odconv.attentions.statistics import COLUMNS
from odconv.attentions.verdicts import KINDS, VERDICTS, deviation, verdict
from odconv.layers import PerSampleConv
from odconv.profiling.table import Table, show
from odconv.system.devices import Device, find_device
from odconv.system.files import check_writable, write_table
from odconv.system.text import count, share

BATCH = 32
"""Images in a step."""


def visualize(
    images: list[str],
    *,
    weights: str,
    out: str,
    max_images: int = 128,
    shown: int = 20,
    cam_layer: str | None = None,
    device: Device = "auto",
    **network: Any,
) -> Path:
    """Show what is dynamic in a network: its attentions on some images, as pictures and a page of them.

    Args:
        images: Files, folders, or patterns such as 'photos/*.jpg'. Subfolders of a folder are classes.
        weights: A checkpoint of odconv train, or a folder of odconv release or its name, which say what network it is;
            or another file of weights.
        out: Folder for attentions.html, attentions.csv and the pictures; files of the same names are replaced.
        max_images: Images to measure at most, evenly chosen from the classes.
        shown: Images to draw at most, evenly chosen from those.
        cam_layer: Layer whose map Grad-CAM weights; default: the last stage with at least 3 x 3 positions.
        device: Where to compute: cpu, gpu, or auto for a GPU if there is one.
        **network: What the checkpoint does not say; see :func:`odconv.app.classify.restore.restore`.

    Raises:
        ValueError: an option or weights that do not fit, no dynamic layers, or fewer than two readable images.
    """
    for name, value, least in (("max_images", max_images, 2), ("shown", shown, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    place = find_device(device)
    restored = restore(weights, **network)
    dynamic = [module for module in restored.model.modules() if isinstance(module, PerSampleConv)]
    if not dynamic:
        raise ValueError(f"{restored.arch} is static: it has no attentions to look at")
    known = restored.classes or []
    answers = class_names(None, restored.names or known, restored.num_classes)
    pictures = read(images, known, answers, max_images, restored.image_size, restored.resize_size)
    print(f"{restored.arch}: looking at {len(pictures.paths)} images", flush=True)
    model = restored.model.to(place)
    cam_layer = choose_layer(model, normalise(pictures.pixels[:1].to(place)), cam_layer)
    folder = Path(out)
    check_writable(folder)  # makes it: behind what is wrong with other options
    logits, recorded = answer(model, (normalise(batch.to(place)) for batch in pictures.pixels.split(BATCH)))
    temperature, blend = (getattr(dynamic[0].attention, name, None) for name in ("temperature", "blend"))
    subject = Subject(
        restored.arch,
        Path(weights).name,
        answers,
        None if temperature is None else temperature.item(),
        pictures,
        logits.softmax(1),
        measure(model, recorded, as_labels(pictures.classes)),
        None if blend is None else blend.item(),
    )
    show(tabulate(subject.layers))
    print(subject.sentence, *subject.notes, f"drawing {count(len(subject.layers), 'layer')}", sep="\n", flush=True)
    indices = choose(pictures.classes or [""] * len(logits), shown)
    examples = explain_examples(subject, model, place, indices, cam_layer)
    rows = (row for layer in subject.layers for row in layer.rows.values())
    write_table(folder / "attentions.csv", [*COLUMNS, *CLASS_COLUMNS], rows)
    page = write_page(folder, subject, indices, examples, cam_layer)
    print(f"written: {page}")
    return page


def tabulate(layers: Sequence[Layer]) -> Table:
    """Return a line for each attention: deviation and share of classes in the median layer, layers by verdict."""
    lines = []
    for kind in (WHOLE, *reversed(KINDS)):
        if rows := [layer.rows[kind] for layer in layers if kind in layer.rows]:
            of_classes = median([part for row in rows if not isnan(part := class_share(row))] or [nan])
            given = [verdict(row) for row in rows]
            counts = [str(given.count(word)) for word in VERDICTS[:3]]
            lines.append([kind, f"± {share(median(map(deviation, rows)))}", share(of_classes), *counts])
    return Table(["", "between images", "of classes", "layers: varies", "slightly", "static"], lines, left=1)
