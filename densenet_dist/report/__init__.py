"""What a run looks like: its page, and pictures beside it."""

from densenet_dist.report.curves import plot_curves
from densenet_dist.report.writing import report_at_end, write_report

__all__ = ["plot_curves", "report_at_end", "write_report"]
