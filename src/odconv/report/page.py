"""The page: what a run did, as one file of HTML that needs nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odconv.files import replacing
from odconv.report import content
from odconv.report.pictures import draw_attentions, draw_curves, draw_kernels
from odconv.report.run import Run, read_run
from odconv.visualize.pages import render_page
from odconv.visualize.verdicts import deviation, judge_kernels, summarize, verdict
from odconv.words import number, share


def write_report(folder: str | Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write report.html to the folder of a run, finished or not, from what is in the folder.

    Args:
        folder: the folder, with config.yaml, metrics.csv, attentions.csv, result.json and machine.json; what is missing
            or cannot be read is said in the report.
        defaults: values of options where nobody sets them; those that differ stand first. Default: not known.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
        OSError: the report cannot be written.
    """
    run = read_run(folder)
    page = render(run, defaults or {})
    path = run.folder / "report.html"
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def render(run: Run, defaults: Mapping[str, Any]) -> str:
    """The page of a run, as text."""
    last_epoch = run.attentions[-1]["epoch"] if run.attentions else 0
    last = [row for row in run.attentions if row["epoch"] == last_epoch]
    changed, unchanged = content.options(run, defaults)
    return render_page(
        "odconv.report",
        run=run,
        title=content.title(run),
        sentence=content.sentence(run),
        numbers=content.numbers(run),
        curves=list(draw_curves(run)),
        throughput=content.throughput(run),
        epochs=content.epochs(run),
        attention_epoch=int(last_epoch),
        summaries=summarize(last),
        kernels=judge_kernels(last),
        attention_maps=[*draw_attentions(run.attentions), *draw_kernels(run.attentions)],
        attentions=last,
        faults=content.faults(run),
        changed=changed,
        unchanged=unchanged,
        defaults=defaults,
        machine=content.machine(run),
        deviation=deviation,
        verdict=verdict,
        number=number,
        share=share,
    )
