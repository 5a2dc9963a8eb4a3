"""What came of a run: its report, and runs side by side."""

from odconv.report.comparison import compare
from odconv.report.machine import describe_machine, write_machine
from odconv.report.page import write_report
from odconv.report.run import read_run
from odconv.visualize.statistics import attention_statistics

__all__ = ["attention_statistics", "compare", "describe_machine", "read_run", "write_machine", "write_report"]
