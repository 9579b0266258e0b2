"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) in JAX.

This module needs nothing but jax: `from gvpo_jax import gvpo_loss` brings no other library along.
The rest lives in rooms of its own, e.g. `gvpo_jax.trainer.Trainer`.
"""

from gvpo_jax.loss import group, gvpo_loss, gvpo_mse, gvpo_weights, ungroup

__version__ = "0.1.0"
__all__ = ["group", "gvpo_loss", "gvpo_mse", "gvpo_weights", "ungroup"]
