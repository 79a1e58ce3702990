"""A run or pipeline directory becomes one HTML page that opens from disk, offline, without torch."""

from klimb.report.page import write_report

__all__ = ["write_report"]
