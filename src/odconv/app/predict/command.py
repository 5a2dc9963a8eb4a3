"""The command `odconv predict`."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from odconv.app.engine.config import check
from odconv.app.predict.loading import load_classifier
from odconv.app.predict.predictions import Prediction, Predictions
from odconv.app.predict.rows import SUFFIXES, shown, writing_rows
from odconv.system.files import check_writable

MANY = 50
"""Images for which a bar is shown."""


def predict(
    images: list[str],
    *,
    weights: str,
    top: int = 5,
    out: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    **network: Any,
) -> Predictions:
    """Say what is on images: the most probable classes of each.

    Photographs are turned upright as EXIF notes it. Files that cannot be read are named and left out.

    Args:
        images: Files, folders, or patterns such as 'photos/*.jpg'.
        weights: A checkpoint of odconv train, an exported file, a folder of odconv release or its name, owner/name on
            the Hub, or another file of weights.
        top: How many classes to say of each.
        out: File to write to instead of the terminal, .csv or .json.
        batch_size: Images that the network is given at a time; default: 64 on a GPU, 4 elsewhere.
        workers: Threads that read images ahead; default: by the number of CPU cores, at most 8.
        **network: What the file of weights does not say; see :func:`odconv.app.predict.load_classifier`.

    Returns:
        What was counted and timed.

    Raises:
        ValueError: an option or weights that do not fit, or no image at all can be read.
        OSError: the weights cannot be read, or `out` cannot be written.
        ImportError: a package is missing.
    """
    check({"top": top, "batch_size": batch_size, "workers": workers})
    if out is not None:
        if Path(out).suffix not in SUFFIXES:
            raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {out}")
        check_writable(Path(out).parent)
        if Path(out).is_dir():
            raise IsADirectoryError(f"out must be a file, got the folder {out}")
    # a limit of twice as many pixels holds without it
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    classifier = load_classifier(weights, **network)
    predictions = Predictions(classifier, images, top=top, batch_size=batch_size, workers=workers)
    console = Console(markup=False, emoji=False, highlight=False)
    start = time.perf_counter()
    with _progress(console, predictions) as advance, writing_rows(out, predictions, console) as write:
        for result in predictions:
            if isinstance(result, Prediction):
                write(result)
            else:
                print(shown(result.reason), file=sys.stderr)
            advance()
        if not predictions.read:
            raise ValueError("none of the images can be read")
    print(_summary(predictions, time.perf_counter() - start), flush=True)
    return predictions


@contextmanager
def _progress(console: Console, predictions: Predictions) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, for many images."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal or len(predictions.paths) < MANY
    bar = Progress(*columns, console=console, transient=True, disable=hidden, redirect_stderr=sys.stderr.isatty())
    with bar:
        task = bar.add_task("", total=len(predictions.paths))
        yield lambda: bar.advance(task)


def _summary(predictions: Predictions, seconds: float) -> str:
    images = f"{predictions.read} image{'s' * (predictions.read != 1)}"
    left_out = f", {len(predictions.unreadable)} left out that cannot be read" if predictions.unreadable else ""
    times = f"{predictions.waited:.1f} s waiting for images, {predictions.computed:.1f} s computing"
    return f"{images} in {seconds:.1f} s, {predictions.read / seconds:.1f} images/s: {times}{left_out}"
