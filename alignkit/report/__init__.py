"""One self-contained HTML page about a run."""

from alignkit.report.page import write_report

__all__ = ["write_report"]
