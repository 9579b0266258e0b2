"""Rollouts on servers, as a run has them: the engine that its config asks for."""

import os
from collections.abc import Sequence
from pathlib import Path

from gvpo_jax.config import Config
from gvpo_jax.errors import UserError
from gvpo_jax.models import LoadedModel
from gvpo_jax.parallel.distributed import from_first_host, to_first_host
from gvpo_jax.rollout.servers.client import Fleet
from gvpo_jax.rollout.servers.engine import HttpEngine
from gvpo_jax.rollout.servers.weight_sync import SequenceLogps, WeightSync


def connect(config: Config) -> Fleet:
    """The servers of a config, of which nothing is asked yet.

    Raises:
        UserError: an address is none, or there is no key where the config says.
    """
    r = config.rollout
    return Fleet(
        r.servers,
        concurrency=r.concurrency,
        api_key=_key(r.api_key_env) if r.api_key_env else None,
        timeout=r.timeout,
        retries=r.retries,
    )


def server_engine(
    config: Config, fleet: Fleet, model: LoadedModel, stop_ids: Sequence[int], logps: SequenceLogps
) -> HttpEngine:
    """Samples on servers, which get new weights through a folder that process 0 writes.

    logps: the trainer's log-probs, on every process those of all sequences, see `sequence_logps`.
    """
    r = config.rollout
    assert r.engine != "in_process"
    weights = WeightSync(
        fleet,
        r.engine,
        model,
        r.weights_dir or Path(config.run.dir) / "weights",
        logps,
        dtype=r.weights_dtype,
        tolerance=r.logp_tolerance,
        gather=to_first_host,
        lead=from_first_host,
    )
    vocab_size = model.config.vocab_size
    return HttpEngine(fleet, r.engine, stop_ids, vocab_size=vocab_size, weights=weights)


def _key(name: str) -> str:
    """The variable's value; no message shows either, as somebody may mistake one for the other."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError("the environment variable that rollout.api_key_env names is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError("the key that rollout.api_key_env names holds more than printable ASCII")
    return key
