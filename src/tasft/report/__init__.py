"""What a run did, as a page, a Markdown file and a table: from its files alone."""

from tasft.report.write import write_report

__all__ = ["write_report"]
