"""Sampling on servers that run elsewhere: vLLM, also on TPU, and SGLang."""

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gvpo_jax.data.groups import Groups, Source, make_groups
from gvpo_jax.parallel.distributed import raise_together
from gvpo_jax.rollout.engine import SamplingParams
from gvpo_jax.rollout.servers.client import Client, Fleet
from gvpo_jax.rollout.servers.dialects import (
    DIALECTS,
    Ask,
    Dialect,
    NoPromptLogps,
    Sampled,
    ServerKind,
)
from gvpo_jax.rollout.servers.weight_sync import SyncReport, WeightSync

_log = logging.getLogger(__name__)
_RESCORED = 4  # completions that show what kind of log-probs a server gives
_CERTAIN = -0.05  # nats a token: closer to 0, all kinds of log-probs look alike


class HttpEngine:
    """Rollout engine over servers; prompt i of a run goes to server i modulo their number.

    A completion depends on the seed, its prompt's id and its place among the k as far as the server
    keeps to seeds: vLLM does (not on TPU), SGLang with --enable-deterministic-inference.

    Log-probs are those at temperature 1, before truncation. Where the sampling is another one, a
    server is tried on its first completions: if its log-probs are not those that it gives for the
    same tokens as a prompt, they are NaN, that is unknown (SGLang without
    SGLANG_RETURN_ORIGINAL_LOGPROB=1, vLLM with --logprobs-mode processed_logprobs).

    Args:
        fleet: the servers.
        kind: what they understand; "vllm-tpu" is vLLM without seeds.
        stop_ids: tokens that end a completion and belong to it.
        vocab_size: token ids are below it.
        weights: brings `params` to the servers before they sample; default: they keep theirs.
    """

    def __init__(
        self,
        fleet: Fleet,
        kind: ServerKind,
        stop_ids: Sequence[int],
        *,
        vocab_size: int,
        weights: WeightSync | None = None,
    ):
        self._fleet, self._dialect = fleet, DIALECTS[kind]
        self._stop_ids, self._vocab_size = tuple(stop_ids), vocab_size
        self._weights = weights
        self._gives_logps: dict[tuple[int, SamplingParams], bool] = {}
        # Evaluation and a rollout ahead of time may want different weights on the same servers.
        self._one_at_a_time, self._of_thread = threading.Lock(), threading.local()
        self._sync: SyncReport | None = None

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
        """See `Engine.generate`.

        Raises:
            UserError: a server can't be reached, gives something else than k completions, or does
                not have these `params`.
        """
        del longest_prompt  # nothing is padded
        limits = num_generations, max_completion_length, sampling, self._stop_ids, self._vocab_size
        asks = [
            Ask([int(token) for token in prompt], *limits, key=(seed, int(prompt_id)))
            for prompt, prompt_id in zip(prompts, prompt_ids, strict=True)
        ]
        samples, known = raise_together(lambda: self._ask(params, prompts, asks))
        return _as_groups(prompts, samples, known, max_completion_length)

    def _ask(
        self, params: Any, prompts: Sequence[Sequence[int]], asks: Sequence[Ask]
    ) -> tuple[list[list[Sampled]], list[bool]]:
        """What the servers sampled, and whether its log-probs are those of `Groups`."""
        homes = [ask.key[1] % len(self._fleet.clients) for ask in asks]
        with self._one_at_a_time:
            if self._weights:
                self._sync = self._weights.bring(params, prompts) or self._sync
                self._of_thread.sync = self._sync
            tasks = [
                (home, functools.partial(_sample, self._dialect, ask))
                for home, ask in zip(homes, asks, strict=True)
            ]
            groups = self._fleet.map(tasks)
            known: dict[int, bool] = {}
            for home, ask, group in zip(homes, asks, groups, strict=True):
                if home not in known:
                    known[home] = self._logps_known(home, ask, group)
        return groups, [known[home] for home in homes]

    def metrics(self) -> dict[str, float]:
        """How the weights came that this thread sampled from last; nothing before that."""
        sync = self.last_sync
        if sync is None:
            return {}
        return {
            "sync/logp_difference/mean": sync.difference,
            "sync/logp_difference/max": sync.largest,
            "sync/write_seconds": sync.write_seconds,
            "sync/load_seconds": sync.load_seconds,
        }

    @property
    def last_sync(self) -> SyncReport | None:
        """The report of those weights; None before that."""
        return getattr(self._of_thread, "sync", None)

    def close(self) -> None:
        """End what is under way, see `Fleet.close`."""
        self._fleet.close()

    def _logps_known(self, home: int, ask: Ask, samples: list[Sampled]) -> bool:
        """Whether a server's log-probs are those that `Groups` hold."""
        if ask.sampling == SamplingParams():
            return True
        known = self._gives_logps.get((home, ask.sampling))
        if known is None:
            compare = functools.partial(_same_as_prompt, self._dialect, ask, samples)
            (known,) = self._fleet.map([(home, compare)])
            if known is None:
                return False
            self._gives_logps[home, ask.sampling] = known
            if not known:
                _log.warning(
                    "%s gives log-probs that are not those at temperature 1 before truncation: "
                    "those of its samples count as unknown",
                    self._fleet.clients[home].url,
                )
        return known


def _poster(client: Client, about: str) -> Callable[..., Any]:
    return functools.partial(client.post, about=about)


def _sample(dialect: Dialect, ask: Ask, client: Client) -> list[Sampled]:
    return dialect.sample(_poster(client, f"prompt {ask.key[1]}"), ask)


def _same_as_prompt(
    dialect: Dialect, ask: Ask, samples: list[Sampled], client: Client
) -> bool | None:
    """Whether the log-probs are those of the same tokens given as a prompt; None: can't be told."""
    post = _poster(client, f"log-probs of prompt {ask.key[1]}")
    said: list[float] = []
    scored: list[float] = []
    for tokens, logps, _ in samples[:_RESCORED]:
        try:
            scores = dialect.token_logps(post, [*ask.prompt, *tokens])
        except NoPromptLogps:
            return False
        said += logps
        scored += scores[-len(tokens) :]
    if np.mean(scored) > _CERTAIN:
        return None
    difference = np.array(said) - np.array(scored)
    # Rounding averages out, and temperature and truncation do not.
    return bool(abs(difference.mean()) < 0.01 and abs(difference).mean() < 0.05)


def _as_groups(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sampled]],
    known: Sequence[bool],
    max_completion_length: int,
) -> Groups:
    shape = (len(groups), len(groups[0]), max_completion_length)
    completions, logps = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, stopped = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for g, group in enumerate(groups):
        for i, sample in enumerate(group):
            n = lengths[g, i] = len(sample.tokens)
            completions[g, i, :n] = sample.tokens
            logps[g, i, :n] = np.minimum(sample.logps, 0) if known[g] else np.nan
            stopped[g, i] = sample.stopped
    return make_groups(
        prompts, completions, lengths, source=Source.POLICY, stopped=stopped, old_logps=logps
    )
