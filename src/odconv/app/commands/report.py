"""The command `odconv report`."""

from pathlib import Path


def report(runs: list[str]) -> list[Path]:
    """Write report.html to the folders of runs, finished or not.

    Args:
        runs: Folders of runs.

    Returns:
        The reports.

    Raises:
        FileNotFoundError: a folder that is missing or holds no run.
        OSError: a report cannot be written.
    """
    from odconv.app.pages.reports import read_run, write_report

    for folder in runs:
        read_run(folder)  # all, before one is written
    reports = [write_report(folder) for folder in runs]
    print(*reports, sep="\n", flush=True)
    return reports
