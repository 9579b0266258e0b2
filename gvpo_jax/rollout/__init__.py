"""Sampling completions: the engine protocol and the engine that runs in this process."""

from gvpo_jax.rollout.engine import FINISH_LENGTH, FINISH_STOP, Engine, Rollout, SamplingParams
from gvpo_jax.rollout.inprocess import InProcessEngine

__all__ = ["FINISH_LENGTH", "FINISH_STOP", "Engine", "InProcessEngine", "Rollout", "SamplingParams"]
