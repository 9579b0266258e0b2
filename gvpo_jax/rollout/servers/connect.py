"""The config section `servers`: rollouts on servers that run elsewhere."""

import os
import re
from dataclasses import dataclass
from typing import Literal

from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.rollout.servers.client import Fleet
from gvpo_jax.settings import setting


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

    @explained_by(Page.SERVERS)
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

    @explained_by(Page.SERVERS)
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


def _key(name: str) -> str:
    """The variable's value; no message shows either, as somebody may mistake one for the other."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError("the environment variable that servers.api_key_env names is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError("the key that servers.api_key_env names holds more than printable ASCII")
    return key
