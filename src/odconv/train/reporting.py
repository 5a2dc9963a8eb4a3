"""The command `odconv report`."""

from dataclasses import MISSING, fields
from pathlib import Path

from odconv.train.config import TrainConfig


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
    from odconv.report import write_report

    defaults = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
    reports = [write_report(folder, defaults) for folder in runs]
    print(*reports, sep="\n", flush=True)
    return reports
