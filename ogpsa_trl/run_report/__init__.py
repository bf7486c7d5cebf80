"""The report of a training run: one HTML page, from what the run leaves in its folder."""

from ogpsa_trl.run_report.page import write_report
from ogpsa_trl.run_report.settings import save_run_settings

__all__ = ["save_run_settings", "write_report"]
