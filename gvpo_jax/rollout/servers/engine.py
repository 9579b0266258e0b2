"""Sampling on servers that run elsewhere: vLLM, also on TPU, and SGLang."""

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_jax.data.groups import Groups, Source, make_groups
from gvpo_jax.models.load import LoadedModel
from gvpo_jax.models.lora import Lora
from gvpo_jax.parallel.distributed import raise_together, to_first_host
from gvpo_jax.rollout.engine import Engine, SamplingParams
from gvpo_jax.rollout.servers.client import Client, Fleet
from gvpo_jax.rollout.servers.connect import ServersConfig
from gvpo_jax.rollout.servers.dialects import (
    DIALECTS,
    Ask,
    NoPromptLogps,
    Post,
    Sampled,
    ServerKind,
    of_adapter,
)
from gvpo_jax.rollout.servers.weight_sync import SequenceLogps, SyncReport, WeightSync
from gvpo_jax.rollout.stop import StopStrings

_log = logging.getLogger(__name__)
_RESCORED = 4  # completions that show what kind of log-probs a server gives
_CERTAIN = -0.05  # nats a token: closer to 0, all kinds of log-probs look alike


@dataclass(eq=False, repr=False)
class HttpEngine(Engine):
    """Rollout engine over servers; prompt i of a run goes to server i modulo their number.

    A completion depends on the seed, its prompt's id and its place among the k as far as the server
    keeps to seeds: vLLM does (not on TPU), SGLang with --enable-deterministic-inference.

    Log-probs are those at temperature 1, before truncation. Where the sampling is another one, a
    server is tried on its first completions: if its log-probs are not those that it gives for the
    same tokens as a prompt, they are NaN, that is unknown (SGLang without
    SGLANG_RETURN_ORIGINAL_LOGPROB=1, vLLM with --logprobs-mode processed_logprobs).
    """

    fleet: Fleet
    kind: ServerKind  # what the servers understand; "vllm-tpu" is vLLM without seeds
    stop_ids: Sequence[int]  # tokens that end a completion and belong to it
    vocab_size: int  # token ids are below it
    # Brings `params` to the servers before they sample; None: they keep theirs.
    weights: WeightSync | None = None
    stop: StopStrings | None = None  # texts that end a completion; None: there are none

    def __post_init__(self) -> None:
        self._dialect = DIALECTS[self.kind]
        self._gives_logps: dict[tuple[int, SamplingParams], bool | None] = {}  # None: can't be told
        # Evaluation and a rollout ahead of time may want different weights on the same servers.
        self._one_at_a_time, self._of_thread = threading.Lock(), threading.local()

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
        limits = num_generations, max_completion_length, sampling, self.stop_ids, self.vocab_size
        asks = [
            Ask([int(token) for token in prompt], *limits, (seed, int(prompt_id)), self.stop)
            for prompt, prompt_id in zip(prompts, prompt_ids, strict=True)
        ]
        return _as_groups(asks, raise_together(lambda: self._ask(params, asks)))

    def _ask(self, params: Any, asks: Sequence[Ask]) -> list[list[Sampled]]:
        """What the servers sampled; log-probs that are not those of `Groups` are NaN."""
        homes = [ask.key[1] % len(self.fleet.clients) for ask in asks]
        with self._one_at_a_time:
            if self.weights:
                self._of_thread.sync = self.weights.bring(params, [ask.prompt for ask in asks])
            work = [functools.partial(self._sample, ask) for ask in asks]
            groups = self.fleet.map(list(zip(homes, work, strict=True)))
            known: dict[int, bool] = {}
            for home, ask, group in zip(homes, asks, groups, strict=True):
                if home not in known:
                    known[home] = self._logps_known(home, ask, group)
        return [
            group if known[home] else [x._replace(logps=[np.nan] * len(x.tokens)) for x in group]
            for home, group in zip(homes, groups, strict=True)
        ]

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
        self.fleet.close()

    def _sample(self, ask: Ask, client: Client) -> list[Sampled]:
        return self._dialect.sample(self._asking(client, f"prompt {ask.key[1]}"), ask)

    def _asking(self, client: Client, about: str) -> Post:
        post = functools.partial(client.post, about=about)
        return of_adapter(post, self.weights.adapter if self.weights else None)

    def _logps_known(self, home: int, ask: Ask, samples: list[Sampled]) -> bool:
        """Whether a server's log-probs are those that `Groups` hold."""
        if ask.sampling == SamplingParams():
            return True
        this = home, ask.sampling
        if self._gives_logps.get(this) is None:
            compare = functools.partial(self._same_as_prompt, ask, samples)
            (self._gives_logps[this],) = self.fleet.map([(home, compare)])
            if self._gives_logps[this] is False:
                _log.warning(
                    "%s gives log-probs that are not those at temperature 1 before truncation: "
                    "those of its samples count as unknown",
                    self.fleet.clients[home].url,
                )
        return bool(self._gives_logps[this])

    def _same_as_prompt(self, ask: Ask, samples: list[Sampled], client: Client) -> bool | None:
        """Whether the log-probs are those of the same tokens as a prompt; None: can't be told."""
        post = self._asking(client, f"log-probs of prompt {ask.key[1]}")
        said: list[float] = []
        scored: list[float] = []
        for tokens, logps, _ in samples[:_RESCORED]:
            try:
                scores = self._dialect.token_logps(post, [*ask.prompt, *tokens])
            except NoPromptLogps:
                return False
            said += logps
            scored += scores[-len(tokens) :]
        if np.mean(scored) > _CERTAIN:
            return None
        difference = np.array(said) - np.array(scored)
        # Rounding averages out, and temperature and truncation do not.
        return bool(abs(difference.mean()) < 0.01 and abs(difference).mean() < 0.05)


def http_engine(
    config: ServersConfig,
    fleet: Fleet,
    model: LoadedModel,
    stop_ids: Sequence[int],
    logps: SequenceLogps,
    run_dir: str,
    stop: StopStrings | None = None,
    whole: Callable[[Any], Any] = to_first_host,
    lora: Lora | None = None,
) -> HttpEngine:
    """Samples on these servers, of any kind but "none", which get new weights through a folder.

    It lies in `run_dir`, unless `config.weights_dir` names another; `model` gives it configuration
    and tokenizer. `logps` are the trainer's, on every process those of all sequences; for `whole`
    and `lora` see `WeightSync`.
    """
    assert config.kind != "none"
    weights = WeightSync(
        fleet,
        config.kind,
        model,
        Path(config.weights_dir or Path(run_dir) / "weights"),
        logps,
        whole,
        lora,
        dtype=config.weights_dtype,
        tolerance=config.logp_tolerance,
    )
    vocab_size = model.config.vocab_size
    return HttpEngine(fleet, config.kind, stop_ids, vocab_size, weights, stop)


def _as_groups(asks: Sequence[Ask], groups: Sequence[Sequence[Sampled]]) -> Groups:
    shape = (len(asks), asks[0].k, asks[0].max_completion_length)
    completions, logps = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, stopped = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for g, i in np.ndindex(lengths.shape):
        tokens, said, stopped[g, i] = groups[g][i]
        n = lengths[g, i] = len(tokens)
        completions[g, i, :n] = tokens
        logps[g, i, :n] = np.minimum(said, 0)
    prompts = [ask.prompt for ask in asks]
    return make_groups(
        prompts, completions, lengths, source=Source.POLICY, stopped=stopped, old_logps=logps
    )
