"""Families of models, one declaration a file: see `gvpo_jax.models.family`."""
