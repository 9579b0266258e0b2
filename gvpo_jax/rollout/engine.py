"""What every rollout engine takes and gives, whether it samples here or on a server."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gvpo_jax.data.groups import Groups
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for an update, and how."""

    num_generations: int = setting(4, "k, completions of each prompt.", least=2)
    max_completion_length: int = setting(256, "Tokens, the end token included.", least=1)
    temperature: float = setting(1.0, "Divides the logits.", above=0)
    top_k: int = setting(
        0,
        "Keep this many tokens; 0: all. Like top_p and min_p it cuts the support that GVPO's "
        "optimum relies on.",
        least=0,
    )
    top_p: float = setting(
        1.0,
        "Keep the likeliest tokens up to this total.",
        above=0,
        most=1,
        hint="1 keeps every token",
    )
    min_p: float = setting(
        0.0, "Keep tokens at least so likely, relative to the likeliest.", least=0, most=1
    )
    repetition_penalty: float = setting(
        1.0,
        "Divides positive logits, and multiplies negative ones, of tokens that the prompt or the "
        "completion has already; 1: none.",
        above=0,
    )
    stop_token_ids: list[int] = setting([], "Tokens that end a text, besides the model's own.")
    stop: list[str] = setting(
        [],
        "Texts that end a completion. Rewards get the text before the first one; the tokens up to "
        "and including the one that completes it are trained on.",
    )
    slots: int | None = setting(
        None,
        "Completions that the in-process engine draws at a time, of all hosts; one that ends makes "
        "room for another. null: all of a batch, where the short ones wait for the longest.",
        least=1,
        free=True,
    )
    cache_dtype: Literal["model", "bfloat16", "int8"] = setting(
        "model",
        "Of the keys and values that sampling keeps; int8 takes a quarter of float32's memory. "
        "Samples bear the rounding; the update computes its own log-probs.",
    )
    adapter: Literal["merged", "apart"] = setting(
        "merged",
        "Of model.lora, while this process samples. merged: into a copy of the weights, once per "
        "rollout; apart: computed beside them at every token, some 10% slower and without a copy.",
        free=True,
    )
    demonstrations: int = setting(
        0, "How many of the k are texts from the column `solution`, not samples.", least=0
    )
    lookahead: int = setting(
        0, "Rollouts sampled ahead while the policy trains; they are that much staler.", least=0
    )
    tensor: int | None = setting(
        None,
        "Chips that share a copy of the weights, in model.dtype, while sampling; null: they stay "
        "cut as for training, and every token of a completion collects them.",
        least=1,
        free=True,
    )

    def params(self) -> "SamplingParams":
        """How training draws tokens."""
        cut = self.top_k, self.top_p, self.min_p
        return SamplingParams(self.temperature, *cut, self.repetition_penalty)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from the model's distribution."""

    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens up to this total probability; 1 keeps all
    min_p: float = 0.0  # keep tokens at least so likely, relative to the likeliest; 0 keeps all
    # Of tokens that are there already: divides positive logits, multiplies negative ones; before
    # the temperature.
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"need top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, got top_k={self.top_k}, "
                f"top_p={self.top_p}, min_p={self.min_p}"
            )

    @property
    def cuts_support(self) -> bool:
        """Whether some tokens can never be drawn, which GVPO's optimum does not allow for."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Engine(Protocol):
    """Draws completions of tokenised prompts from the policy with parameters `params`."""

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        max_completion_length: int,
        sampling: SamplingParams,
        seed: int,
        longest_prompt: int | None = None,
    ) -> Groups:
        """K completions of every prompt, of source `POLICY`, without rewards.

        A completion depends on `seed`, its prompt's id and its place among the k, not on the batch
        around it. `longest_prompt` is a hint for padding, see `gvpo_jax.data.batch.pad_prompts`.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to tell about the weights that this thread sampled from last."""
        return {}

    def routing_metrics(self, params: Any, groups: Groups) -> dict[str, float]:
        """How often experts differ between sampling `groups` with `params` and scoring them.

        Nothing where there are no experts, or where it can't be known.
        """
        return {}

    def close(self) -> None:
        """End what is under way; the engine can still be used."""
