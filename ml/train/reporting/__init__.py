"""What a run shows and keeps: progress, ``metrics.jsonl``, TensorBoard events, ``loss.png``, ``report.html``."""

from ml.train.reporting.metrics_file import MetricsFile, read_metrics
from ml.train.reporting.plots import plot_loss
from ml.train.reporting.progress import ProgressDisplay
from ml.train.reporting.report import Report, gzip_bits_per_byte, print_report, xz_bits_per_byte
from ml.train.reporting.run import Run, read_run
from ml.train.reporting.run_report import write_report
from ml.train.reporting.tensorboard import TensorBoardWriter

__all__ = [
    "MetricsFile",
    "ProgressDisplay",
    "Report",
    "Run",
    "TensorBoardWriter",
    "gzip_bits_per_byte",
    "plot_loss",
    "print_report",
    "read_metrics",
    "read_run",
    "write_report",
    "xz_bits_per_byte",
]
