"""What a run looks like: its page, and pictures beside it."""

from densenet_dist.report.writing import report_at_end, write_report

__all__ = ["report_at_end", "write_report"]
