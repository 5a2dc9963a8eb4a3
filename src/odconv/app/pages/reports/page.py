"""The page: what a run did, as one file of HTML that needs nothing else."""

from pathlib import Path

from odconv.app.pages.reports import content
from odconv.app.pages.reports.pictures import draw_attentions, draw_curves, draw_kernels
from odconv.app.pages.reports.read_run import Run, read_run
from odconv.app.pages.template import render_page
from odconv.attentions.verdicts import deviation, judge_kernels, summarize, verdict
from odconv.system.files import write_text
from odconv.system.text import number, share


def write_report(run: Run) -> Path:
    """Write report.html to the folder of a run, finished or not; what is missing or cannot be read is said in it."""
    path = run.folder / "report.html"
    write_text(path, render(run))
    return path


def refresh_report(folder: str | Path) -> None:
    """Write the report of a finished run unless it is younger than the result: a run may be killed between the two."""
    report, result = Path(folder, "report.html"), Path(folder, "result.json")
    if not report.exists() or report.stat().st_mtime_ns < result.stat().st_mtime_ns:
        print(write_report(read_run(folder)))


def render(run: Run) -> str:
    """Return the page of a run, as text."""
    last_epoch = run.attentions[-1]["epoch"] if run.attentions else 0
    last = [row for row in run.attentions if row["epoch"] == last_epoch]
    changed, unchanged = content.options(run)
    return render_page(
        "odconv.app.pages.reports",
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
        defaults=run.defaults,
        machine=content.machine(run),
        deviation=deviation,
        verdict=verdict,
        number=number,
        share=share,
    )
