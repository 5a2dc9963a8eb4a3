"""The command `odconv report`."""

from pathlib import Path


def report(runs: list[str]) -> list[Path]:
    """Write report.html to the folders of runs, finished or not.

    Args:
        runs: Folders of runs.
    """
    from odconv.app.pages.reports import read_run, write_report

    found = [read_run(folder) for folder in runs]  # all, before one is written
    reports = [write_report(run) for run in found]
    print(*reports, sep="\n", flush=True)
    return reports
