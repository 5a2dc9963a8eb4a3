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
    from odconv.detect import DetectConfig
    from odconv.report import read_run, write_report
    from odconv.train import TrainConfig
    from odconv.train.config import defaults

    kinds = [DetectConfig if "detector" in read_run(folder).config else TrainConfig for folder in runs]
    reports = [write_report(folder, defaults(kind)) for folder, kind in zip(runs, kinds, strict=True)]
    print(*reports, sep="\n", flush=True)
    return reports
