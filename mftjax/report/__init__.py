"""A run's results as HTML pages that need nothing else, and as tables for the terminal."""

from mftjax.report.comparison import tables as comparison_tables
from mftjax.report.comparison import write as write_comparison
from mftjax.report.continual import tables as continual_tables
from mftjax.report.continual import write as write_continual
from mftjax.report.run import table, write
from mftjax.report.task import tables as task_tables
from mftjax.report.task import write as write_task
from mftjax.report.transfer import tables as transfer_tables
from mftjax.report.transfer import write as write_transfer

__all__ = [
  "comparison_tables",
  "continual_tables",
  "table",
  "task_tables",
  "transfer_tables",
  "write",
  "write_comparison",
  "write_continual",
  "write_task",
  "write_transfer",
]
