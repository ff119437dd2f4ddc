"""What a run or a sweep did, as a page, a Markdown file and a table: from its files alone."""

from tasft.report.sweep import write_sweep_report
from tasft.report.write import write_card, write_report

__all__ = ["write_card", "write_report", "write_sweep_report"]
