"""Sampling completions: what an engine is, and the engine that runs in this process."""

from gvpo_jax.rollout.engine import Engine, SamplingParams
from gvpo_jax.rollout.inprocess import InProcessEngine, SamplingModel

__all__ = ["Engine", "InProcessEngine", "SamplingModel", "SamplingParams"]
