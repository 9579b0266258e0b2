"""The report of a run, and pictures of several: `write_report`, `write_curves_svg`."""

from gvpo_jax.report.html import write_report
from gvpo_jax.report.picture import write_curves_svg

__all__ = ["write_curves_svg", "write_report"]
