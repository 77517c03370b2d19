"""A run's results as HTML pages that need nothing else, and as tables for the terminal."""

from mftjax.report.comparison import write as write_comparison
from mftjax.report.run import table, write
from mftjax.report.task import tables as task_tables
from mftjax.report.task import write as write_task

__all__ = ["table", "task_tables", "write", "write_comparison", "write_task"]
