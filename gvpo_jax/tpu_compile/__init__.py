"""`gvpo-jax compile`: a run's programs compiled for a TPU that is not there."""
