"""The report of a run, `write_report`, and of several, `write_comparison`."""

from gvpo_jax.installed import check_trainer

check_trainer()

from gvpo_jax.report.comparison import write_comparison  # noqa: E402
from gvpo_jax.report.html import write_report  # noqa: E402

__all__ = ["write_comparison", "write_report"]
