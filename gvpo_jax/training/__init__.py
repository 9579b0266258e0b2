"""What an update is: objective, step, optimizer, the policy's state and its checkpoints."""

from gvpo_jax.installed import check_trainer

check_trainer()
