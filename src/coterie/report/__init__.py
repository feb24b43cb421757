"""The report of a run: metrics.json for programs, report.html and a Markdown summary for people."""

from coterie.report.metrics import assemble_metrics
from coterie.report.page import write_report
from coterie.report.words import report_markdown, verdict_line

__all__ = ["assemble_metrics", "report_markdown", "verdict_line", "write_report"]
