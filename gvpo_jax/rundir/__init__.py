"""What is in a run folder, who writes it, and how it is read back."""

from gvpo_jax.installed import check_trainer

check_trainer()
