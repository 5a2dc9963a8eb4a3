"""What came of training runs: the report of one, and several side by side."""

from odconv.app.pages.reports.comparison import compare
from odconv.app.pages.reports.page import refresh_report, write_report
from odconv.app.pages.reports.read_run import read_run

__all__ = ["compare", "read_run", "refresh_report", "write_report"]
