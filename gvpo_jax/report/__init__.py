"""The report of a run: `write_report`."""

from gvpo_jax.report.html import write_report

__all__ = ["write_report"]
