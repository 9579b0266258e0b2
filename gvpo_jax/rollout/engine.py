"""What every rollout engine takes and gives, whether it samples here or on a server."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

FINISH_LENGTH, FINISH_STOP = 0, 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from the model's distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this total probability; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"need top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, got top_k={self.top_k}, "
                f"top_p={self.top_p}, min_p={self.min_p}"
            )

    @property
    def cuts_support(self) -> bool:
        """Whether some tokens can never be drawn, which GVPO's optimum does not allow for."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Rollout(NamedTuple):
    """k completions of each of g prompts, on the host.

    Attributes:
        completions: `[g, k, t]` int32 token ids, meaningless past a completion's length.
        lengths: `[g, k]` int32 tokens, the sampled stop token included.
        finish: `[g, k]` int32, `FINISH_STOP` or `FINISH_LENGTH`.
        logps: `[g, k, t]` float32 log-probs in nats under the model itself, that is at temperature
            1 and before any truncation; 0 past the length.
    """

    completions: np.ndarray
    lengths: np.ndarray
    finish: np.ndarray
    logps: np.ndarray


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
    ) -> Rollout:
        """k completions of every prompt.

        A completion depends on `seed`, its prompt's id and its place among the k, not on the batch
        around it. `longest_prompt` is a hint for padding, see `gvpo_jax.data.batch.pad_prompts`.
        """
        ...
