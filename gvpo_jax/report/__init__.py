"""The report of a run: `write_report`."""

from gvpo_jax.installed import check_trainer

check_trainer()

from gvpo_jax.report.html import write_report  # noqa: E402

__all__ = ["write_report"]
