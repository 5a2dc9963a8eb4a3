"""The page `attentions.html`, and its pictures as files."""

from collections.abc import Sequence
from pathlib import Path

from odconv.app.pages.template import render_page
from odconv.app.pages.visualize.by_layer import Rows, colour_range, draw_layer
from odconv.app.pages.visualize.gallery import Example, draw_examples
from odconv.app.pages.visualize.kernels import draw_shares, draw_similarity
from odconv.app.pages.visualize.overview import draw_class_shares, draw_deviations
from odconv.app.pages.visualize.subject import Subject
from odconv.attentions.verdicts import deviation, judge_kernels, verdict
from odconv.system.files import write_text
from odconv.system.text import number, share

LAYERS = "layers"


def clear(folder: Path) -> None:
    """Remove the pictures of another network or of other images."""
    names = [folder / f"{name}.png" for name in ("overview", "classes", "kernels", "shares", "images")]
    for path in (*names, *(folder / LAYERS).glob("[0-9]*_*.png")):
        path.unlink(missing_ok=True)


def write_page(
    folder: Path, subject: Subject, indices: list[int], examples: Sequence[Example], cam_layer: str | None
) -> Path:
    """Write the page and the pictures to a folder; `indices` and `examples` are the images to draw.

    `cam_layer` is whose map says where the network looked; None where none does.
    """
    layers = subject.layers
    overview = {"overview": draw_deviations(layers)}
    kernels = {"kernels": draw_similarity(layers)}
    if subject.pictures.classes and subject.compares_classes:
        overview["classes"] = draw_class_shares(layers)
        kernels["shares"] = draw_shares(layers, subject.pictures.classes)
    drawn = {name: drawing for name, drawing in kernels.items() if drawing}
    scale = colour_range(layers)
    words = subject.pictures.classes or [str(index + 1) for index in range(len(subject.pictures.paths))]
    rows = Rows(indices, [example.pixels for example in examples], [words[index] for index in indices])
    of_layers = [draw_layer(layer, rows, scale) for layer in layers]
    clear(folder)
    for name, drawing in {**overview, **drawn, "images": draw_examples(examples)}.items():
        drawing.save(folder / f"{name}.png")
    (folder / LAYERS).mkdir(exist_ok=True)
    digits = len(str(len(layers)))
    for index, (layer, drawing) in enumerate(zip(layers, of_layers, strict=True), start=1):
        drawing.save(folder / LAYERS / f"{index:0{digits}}_{layer.name}.png")

    by_depth = sorted(range(len(layers)), key=lambda index: deviation(layers[index].whole))
    extremes = sorted({by_depth[-1], by_depth[0]}, key=by_depth.index, reverse=True)
    statistics = [row for layer in layers for row in layer.rows.values()]
    page = render_page(
        "odconv.app.pages.visualize",
        subject=subject,
        overview=overview.values(),
        kernels=drawn,
        verdict_on_kernels=judge_kernels([row for row in statistics if row["kernel_distance"] is not None]),
        extremes=[of_layers[index] for index in extremes],
        others=[drawing for index, drawing in enumerate(of_layers) if index not in extremes],
        examples=examples,
        cam_layer=cam_layer,
        rows=statistics,
        deviation=deviation,
        verdict=verdict,
        number=number,
        share=share,
    )
    path = folder / "attentions.html"
    write_text(path, page)
    return path
