"""The attentions of single images, as one matplotlib figure (nothing global is touched, no display is needed)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from odconv.app.pages.colours import FAINT, GATES, INK, LEAST_RANGE
from odconv.app.pages.drawing import MOST_PARTS, add_bars
from odconv.attentions.kernels import usage
from odconv.layers import Attentions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

EXPLANATION = (
    "A row is an image: what stays the same down a column does not depend on the image, what changes does. "
    "± is the standard deviation.\nKernels: a bar's parts are their shares. The others: dark is low, bright is high; "
    "channels, filters and cells stand in the order of their means."
)


def plot_attentions(
    attentions: Mapping[str, Attentions],
    images: Tensor | None = None,
    titles: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
) -> "Figure":
    """Draw the attentions of some layers for some images: one block per layer, in it one row per image.

    Down a column of a block, what stays the same does not depend on the image; what changes does. How much it changes
    stands above it, as the standard deviation over the images, beside that over the channels, filters or taps.

    Args:
        attentions: what :func:`record_attentions` gave, for at most about 12 images.
        images: the images, (B, 3, H, W) or (B, 1, H, W); each is stretched to its own range. Default none.
        titles: a word or two an image, for which the column of the images is made wide enough. Default its number.
        layers: names of the layers to draw. Default four, evenly spread over the depth.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: a layer that was not recorded, or images or titles of another number.
    """
    from matplotlib.figure import Figure

    names = list(attentions)
    layers = [names[round(i * (len(names) - 1) / 3)] for i in range(4)] if layers is None and len(names) > 4 else layers
    chosen = {name: attentions[name] for name in layers or names if name in attentions}
    if missing := [name for name in layers or () if name not in attentions]:
        raise ValueError(f"layers must be some of {', '.join(names)}, got {', '.join(missing)}")
    batch = next(a.shape[0] for a in next(iter(chosen.values())) if a is not None)
    titles = [str(i + 1) for i in range(batch)] if titles is None else titles
    for name, given in {"images": images, "titles": titles}.items():
        if given is not None and len(given) != batch:
            raise ValueError(f"{name} must be as many as the recorded images = {batch}, got {len(given)}")

    kinds = [kind for kind in PANELS if any(getattr(a, kind) is not None for a in chosen.values())]
    row, head, top = 0.36, 0.95, 0.95  # inches: height of an image, of what stands above a block, above all
    first = max(1.1, 0.5 + 0.085 * max(map(len, titles)))  # relative to the panels, as an image and letters are wide
    width, height = 13.0, top + 0.2 + len(chosen) * (batch * row + head)
    figure = Figure((width, height), facecolor="white")
    figure.text(0.02, 1 - 0.34 / height, "Attentions, image by image", size=16, weight="bold", color=INK)
    figure.text(0.02, 1 - 0.85 / height, EXPLANATION, size=9, color=FAINT, linespacing=1.5)
    grid = figure.add_gridspec(
        len(chosen), 1 + len(kinds),
        width_ratios=[first, *(PANELS[kind].width for kind in kinds)],
        left=0.02, right=0.985, bottom=0.2 / height, top=1 - (top + head) / height,
        wspace=0.05, hspace=head / (batch * row),
    )  # fmt: skip
    for line, (name, recorded) in enumerate(chosen.items()):
        draw_images(empty_axes(figure, grid[line, 0], batch), name, images, titles)
        for column, kind in enumerate(kinds, start=1):
            values = getattr(recorded, kind)
            if values is not None:
                axes = empty_axes(figure, grid[line, column], batch)
                PANELS[kind].draw(axes, values)
                describe(axes, f"{kind} ({'x'.join(map(str, values.shape[1:]))})", values, PANELS[kind].unit)
    return figure


def empty_axes(figure: "Figure", place: Any, batch: int) -> "Axes":
    """Axes with a row for each image, from the top, and equal units in both directions."""
    axes = figure.add_subplot(place)
    box, (width, height) = axes.get_position(), figure.get_size_inches()
    axes.set(xlim=(0, box.width * width / (box.height * height) * batch), ylim=(batch, 0))
    axes.axis("off")
    return axes


def describe(axes: "Axes", title: str, values: Tensor, unit: str) -> None:
    """Say what a panel shows and how much of it depends on the image."""
    between_images = values.std(0, correction=0).mean()
    between_entries = values.mean(0).std(correction=0)
    write_above(axes, 31, f"{title}  {values.min():.2f} to {values.max():.2f}", size=9, weight="bold")
    write_above(axes, 18, f"between images ±{between_images:.3f}", size=8)
    write_above(axes, 6, f"between {unit} ±{between_entries:.3f}", size=8, color=FAINT)


def write_above(axes: "Axes", points: float, text: str, color: str = INK, **font: Any) -> None:
    """Text that starts at the left of the axes, some points above them."""
    axes.annotate(text, (0, 1), (0, points), xycoords="axes fraction", textcoords="offset points", color=color, **font)


def draw_images(axes: "Axes", layer: str, images: Tensor | None, titles: Sequence[str]) -> None:
    """Draw the images themselves, with the name of the layer above."""
    write_above(axes, 46, layer, size=12, weight="bold")
    for row, title in enumerate(titles):
        if images is not None:
            image = images[row].float().cpu()
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
            pixels = image.movedim(0, -1).expand(-1, -1, 3).numpy()
            axes.imshow(pixels, extent=(0, 0.9, row + 0.95, row + 0.05), aspect="auto")
        axes.text(1.1 if images is not None else 0, row + 0.5, title, va="center", size=9, color=INK)


def draw_shares(axes: "Axes", values: Tensor) -> None:
    """Draw the share of each kernel, (B, n), or of each cell, (B, m, n), as one bar per image; of many, as a strip."""
    shares = usage(values.float())
    if shares.shape[1] > MOST_PARTS:
        draw_strips(axes, shares)
    else:
        add_bars(axes, shares, 0, 0.94 * axes.get_xlim()[1], [row + 0.1 for row in range(len(values))], 0.8)


def draw_taps(axes: "Axes", values: Tensor) -> None:
    """Draw the weight of each tap, (B, *kernel_size), one grid per image; slices of 3-d kernels side by side."""
    scale = colour_scale(values)
    slices = values.reshape(len(values), -1, *(1, *values.shape[1:])[-2:]).float()  # (B, slices, rows, columns)
    cell = 0.88 / max(slices.shape[2:])
    for row, one_image in enumerate(slices):
        for index, taps in enumerate(one_image):
            left, top = index * (cell * taps.shape[1] + 0.12), row + 0.06
            box = (left, left + cell * taps.shape[1], top + cell * taps.shape[0], top)
            axes.imshow(taps.numpy(), extent=box, aspect="auto", cmap=GATES, norm=scale)


def draw_strips(axes: "Axes", values: Tensor) -> None:
    """Draw the weight of each channel or filter, (B, C), one strip per image, in the order of their means."""
    ordered = values[:, values.mean(0).argsort()].float()
    scale, right = colour_scale(values), axes.get_xlim()[1]
    for row, strip in enumerate(ordered):
        box = (0, right, row + 0.94, row + 0.06)
        axes.imshow(strip[None].numpy(), extent=box, aspect="auto", cmap=GATES, interpolation="nearest", norm=scale)


def colour_scale(values: Tensor) -> "Normalize":
    """Return a colour scale from the least to the largest value, at least LEAST_RANGE wide."""
    from matplotlib.colors import Normalize

    low, high = values.min().item(), values.max().item()
    margin = max(0.0, LEAST_RANGE - (high - low)) / 2
    return Normalize(low - margin, high + margin)


class Panel(NamedTuple):
    """How an attention is drawn, how wide, and what its entries are called."""

    draw: Callable[["Axes", Tensor], None]
    width: float
    unit: str


PANELS = {
    "kernel": Panel(draw_shares, 2.1, "kernels"),
    "spatial": Panel(draw_taps, 2.1, "taps"),
    "channel": Panel(draw_strips, 4.0, "channels"),
    "filter": Panel(draw_strips, 4.0, "filters"),
}
