"""The report of a preparation: a page and figures that say what was read, dropped and written.

All of it comes from the manifest and the shards; it can be made again from them at any time.
"""

from data_prep.report.facts import counts_bad
from data_prep.report.write import FIGURES, REPORT_NAME, write_report

__all__ = ["FIGURES", "REPORT_NAME", "counts_bad", "write_report"]
