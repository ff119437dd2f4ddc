"""What was measured, as a page, a Markdown file and a table: from files alone."""

from tasft.report.results import results
from tasft.report.sweep import write_sweep_report
from tasft.report.write import write_card, write_comparison, write_model_report, write_plain_card, write_report

__all__ = [
    "results",
    "write_card",
    "write_comparison",
    "write_model_report",
    "write_plain_card",
    "write_report",
    "write_sweep_report",
]
