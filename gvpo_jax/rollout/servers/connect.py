"""The config section `servers`: rollouts on servers that run elsewhere."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gvpo_jax.errors import UserError
from gvpo_jax.rollout.servers.client import Fleet
from gvpo_jax.settings import setting

if TYPE_CHECKING:  # these bring in transformers, which a misspelt config should not wait for
    from gvpo_jax.models.load import LoadedModel
    from gvpo_jax.rollout.servers.engine import HttpEngine
    from gvpo_jax.rollout.servers.weight_sync import SequenceLogps


@dataclass(frozen=True)
class ServersConfig:
    """Servers that sample in place of this process; needs the extra `servers`."""

    kind: Literal["none", "vllm", "vllm-tpu", "sglang"] = setting(
        "none", "What they are; vllm-tpu is vLLM without seeds. none: this process samples."
    )
    urls: list[str] = setting(
        [], "Addresses, e.g. http://host:8000; a server works for one run at a time.", free=True
    )
    weights_dir: str | None = setting(
        None,
        "Folder for new weights, which every server sees under this path; null: `weights` in "
        "run.dir.",
        free=True,
        path="output",
    )
    weights_dtype: Literal["float32", "bfloat16"] = setting("float32", "Of the weights' files.")
    timeout: float = setting(
        600.0, "Seconds that a request may take.", least=1, most=86_400, free=True
    )
    retries: int = setting(6, "Tries of a request after the first.", least=0, most=100, free=True)
    concurrency: int = setting(
        64, "Requests under way at each server, from each process.", least=1, free=True
    )
    logp_tolerance: float = setting(
        0.05,
        "Nats a token by which a server's log-probs may differ from the trainer's, on average.",
        above=0,
        free=True,
    )
    api_key_env: str | None = setting(
        None, "Name of the environment variable that holds the servers' key.", free=True
    )

    def check(self) -> None:
        """That the settings go together.

        Raises:
            UserError: they don't.
        """
        if self.kind == "none":
            if self.urls:
                raise UserError(
                    "servers.kind=none asks no servers: choose another kind, or servers.urls=[]"
                )
            return
        if not self.urls:
            example = "[http://localhost:8000]"
            raise UserError(f"servers.kind={self.kind} needs servers.urls, e.g. {example}")
        if len(set(self.urls)) < len(self.urls):
            raise UserError("servers.urls names a server twice")
        name = self.api_key_env
        if name is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError("servers.api_key_env is the name of an environment variable, not a key")

    def connect(self) -> Fleet:
        """The servers, of which nothing is asked yet.

        Raises:
            UserError: an address is none, or there is no key where the config says.
        """
        return Fleet(
            self.urls,
            concurrency=self.concurrency,
            api_key=_key(self.api_key_env) if self.api_key_env else None,
            timeout=self.timeout,
            retries=self.retries,
        )

    def engine(
        self,
        fleet: Fleet,
        model: "LoadedModel",
        stop_ids: Sequence[int],
        logps: "SequenceLogps",
        run_dir: str,
    ) -> "HttpEngine":
        """Samples on these servers, which get new weights through a folder.

        Args:
            fleet: the servers.
            model: gives configuration and tokenizer.
            stop_ids: tokens that end a completion.
            logps: the trainer's log-probs, on every process those of all sequences.
            run_dir: where the folder is, unless `weights_dir` names another.
        """
        from gvpo_jax.rollout.servers.engine import HttpEngine
        from gvpo_jax.rollout.servers.weight_sync import WeightSync

        assert self.kind != "none"
        folder = self.weights_dir or Path(run_dir) / "weights"
        options: dict[str, Any] = {"dtype": self.weights_dtype, "tolerance": self.logp_tolerance}
        weights = WeightSync(fleet, self.kind, model, folder, logps, **options)
        vocab_size = model.config.vocab_size
        return HttpEngine(fleet, self.kind, stop_ids, vocab_size=vocab_size, weights=weights)


def _key(name: str) -> str:
    """The variable's value; no message shows either, as somebody may mistake one for the other."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError("the environment variable that servers.api_key_env names is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError("the key that servers.api_key_env names holds more than printable ASCII")
    return key
