"""How vLLM and SGLang are asked for completions and log-probs, and to load weights.

A dialect is three functions. Each is handed `post(path, body, read)`, see `Client.post`, and what
it reads is checked to the last token: what a server says wrongly must not reach the loss.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gvpo_jax.http import BadReply, TryAgain
from gvpo_jax.rollout.engine import SamplingParams
from gvpo_jax.rollout.stop import StopStrings

Post = Callable[..., Any]
ServerKind = Literal["vllm", "vllm-tpu", "sglang"]
_ROUNDING = 1e-3  # nats that a log-prob may lie above 0
_NEVER = -9999.0  # what vLLM writes for the logarithm of 0


@dataclass(frozen=True)
class Ask:
    """k completions of one prompt, and what they are checked against."""

    prompt: Sequence[int]
    k: int
    max_completion_length: int
    sampling: SamplingParams
    stop_ids: Sequence[int]
    vocab_size: int
    key: tuple[int, int] = (0, 0)  # the run's seed and the prompt's id
    stop: StopStrings | None = None  # texts that end a completion; None: there are none


class Sampled(NamedTuple):
    """A completion as a server gave it; `stopped` is what it says of the end."""

    tokens: list[int]
    logps: list[float]
    stopped: bool


class NoPromptLogps(Exception):
    """The server does not give log-probs of given tokens."""


class NoAdapters(Exception):
    """The server takes no adapters, but whole weights alone."""


class Dialect(NamedTuple):
    """What a kind of server understands."""

    # k checked samples.
    sample: Callable[[Post, Ask], list[Sampled]]
    # Log-probs of tokens[1:] at temperature 1; may raise NoPromptLogps.
    token_logps: Callable[[Post, Sequence[int]], list[float]]
    # Take the weights in the folder, forget what was cached.
    load: Callable[[Post, str], None]
    # Take the adapter in a folder under a name, and forget the one of another name; may raise
    # NoAdapters. None: there is no such thing.
    load_adapter: Callable[[Post, str, str, str | None], None] | None = None


def check(samples: list[Sampled], ask: Ask) -> list[Sampled]:
    """The samples, if they can be k completions of the prompt; else raises BadReply.

    They end with the token that completes a stop string: a server may give more. `stopped` is true
    of these and of each that ends in a stop token, also where it is the last there may be.
    """
    if len(samples) != ask.k:
        raise BadReply(f"{len(samples)} completions instead of {ask.k}")
    return [_check_sample(sample, ask) for sample in samples]


def _check_sample(sample: Sampled, ask: Ask) -> Sampled:
    tokens, logps, _ = sample
    if not tokens:
        raise BadReply("an empty completion")
    for token in tokens:
        if type(token) is not int or not 0 <= token < ask.vocab_size:
            raise BadReply(f"token id {token!r}, outside the vocabulary of {ask.vocab_size}")
    end = ask.stop.end(tokens) if ask.stop else None
    _check_end(tokens[:end], sample.stopped, end is not None, ask)
    if len(logps) != len(tokens):
        raise BadReply(f"{len(logps)} log-probs of {len(tokens)} tokens")
    _check_logps(logps, above=_NEVER)
    stopped = end is not None or tokens[-1] in ask.stop_ids
    return Sampled(tokens[:end], logps[:end], stopped)


def _check_end(tokens: list[int], stopped: bool, at_text: bool, ask: Ask) -> None:
    """at_text: a stop string ends it."""
    if len(tokens) > ask.max_completion_length:
        raise BadReply(f"{len(tokens)} tokens, where {ask.max_completion_length} are the limit")
    at_stop = [token in ask.stop_ids for token in tokens]
    if any(at_stop[:-1]):
        raise BadReply(f"more tokens after stop token {tokens[at_stop.index(True)]}")
    if at_text or at_stop[-1]:
        return
    if stopped:
        raise BadReply(
            f"stopped at token {tokens[-1]}, which is none of the stop tokens "
            f"{list(ask.stop_ids)}: add it to rollout.stop_token_ids"
        )
    if len(tokens) < ask.max_completion_length:
        raise BadReply(
            f"cut off after {len(tokens)} of {ask.max_completion_length} tokens: start the server "
            "with a longer context"
        )


def _check_logps(logps: list[Any], *, above: float = -math.inf) -> list[float]:
    for logp in logps:
        if not (isinstance(logp, int | float) and above < logp <= _ROUNDING):
            raise BadReply(f"{logp} as a log-prob")
    return logps


def seed_for(*numbers: int, bits: int) -> int:
    """A seed of so many bits from a few numbers, spread evenly."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - bits)


def _common(ask: Ask) -> dict[str, Any]:
    """Every option that changes probabilities: a server's own defaults may come from the model."""
    return {
        "temperature": ask.sampling.temperature,
        "top_p": ask.sampling.top_p,
        "top_k": ask.sampling.top_k or -1,
        "min_p": ask.sampling.min_p,
        "repetition_penalty": ask.sampling.repetition_penalty,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop_token_ids": list(ask.stop_ids),
        "skip_special_tokens": False,
        **({"stop": list(ask.stop.texts)} if ask.stop else {}),
    }


def _vllm_sample(post: Post, ask: Ask, *, seeded: bool) -> list[Sampled]:
    body = _common(ask) | {
        "prompt": list(ask.prompt),
        "n": ask.k,
        "max_tokens": ask.max_completion_length,
        "min_tokens": 0,
        "ignore_eos": True,  # the stop tokens are ours, not those that the server thinks of
        "logprobs": 1,
        "return_token_ids": True,  # from 0.10.2 on
        "return_tokens_as_token_ids": True,  # before it
    }
    if seeded:  # vLLM adds a completion's number to the seed: leave room for it
        body["seed"] = seed_for(*ask.key, bits=47) << 15
    return post("/v1/completions", body, lambda reply: check(_vllm_read(reply, ask.prompt), ask))


def _vllm_read(reply: Any, prompt: Sequence[int]) -> list[Sampled]:
    samples = []
    for choice in sorted(reply["choices"], key=lambda choice: choice["index"]):
        logprobs = choice["logprobs"]
        named = [_token_id(name) for name in logprobs["tokens"]]
        tokens = choice.get("token_ids")
        if tokens is None:
            tokens = [token for token in named if token is not None]
        if len(tokens) < len(named):
            raise BadReply("no token ids: it takes vLLM 0.10.2 or later")
        if None not in named and tokens != named:
            raise BadReply("log-probs of other tokens than those sampled")
        if choice.get("prompt_token_ids") not in (None, list(prompt)):
            raise BadReply("the server changed the prompt")
        stopped = _stopped(choice["finish_reason"])
        samples.append(Sampled(tokens, logprobs["token_logprobs"], stopped))
    return samples


def _vllm_token_logps(post: Post, tokens: Sequence[int]) -> list[float]:
    body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1}

    def read(reply: Any) -> list[float]:
        (choice,) = reply["choices"]
        rows = choice.get("prompt_logprobs")
        if not rows:
            raise NoPromptLogps
        pairs = zip(tokens[1:], rows[1:], strict=True)
        return _check_logps([row[str(token)]["logprob"] for token, row in pairs])

    return post("/v1/completions", body, read)


def _vllm_load(post: Post, folder: str) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    remedy = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment"
    post("/collective_rpc", body, if_missing=remedy)
    post("/reset_prefix_cache", {}, _vllm_was_reset, if_missing=remedy)


def _vllm_load_adapter(post: Post, folder: str, name: str, old: str | None) -> None:
    body = {"lora_name": name, "lora_path": folder}
    post("/v1/load_lora_adapter", body, if_missing=NoAdapters())
    if old is not None:
        post("/v1/unload_lora_adapter", {"lora_name": old})


def of_adapter(post: Post, name: str | None) -> Post:
    """Asks for what a model with the adapter of this name says; None: without one."""
    if name is None:
        return post
    return lambda path, body, *rest, **options: post(path, body | {"model": name}, *rest, **options)


def _vllm_was_reset(reply: Any) -> None:
    if isinstance(reply, dict) and reply.get("success") is False:  # older versions say nothing
        raise TryAgain("the prefix cache is in use")


def _token_id(name: str) -> int | None:
    _, found, number = name.partition("token_id:")
    return int(number) if found else None


def _sglang_sample(post: Post, ask: Ask) -> list[Sampled]:
    # k requests, not n=k: that would give all of them one seed, and a server with
    # --enable-deterministic-inference the same completion k times.
    common = _common(ask) | {
        "max_new_tokens": ask.max_completion_length,
        "min_new_tokens": 0,
        "ignore_eos": not ask.stop_ids,  # here it switches all stop tokens off
    }
    seeds = (seed_for(*ask.key, place, bits=31) for place in range(ask.k))
    body = {
        "input_ids": [list(ask.prompt)] * ask.k,
        "sampling_params": [common | {"sampling_seed": seed} for seed in seeds],
        "return_logprob": True,
    }
    return post("/generate", body, lambda reply: check([_sglang_read(one) for one in reply], ask))


def _sglang_read(reply: Any) -> Sampled:
    told = reply["meta_info"]
    triples = told["output_token_logprobs"]
    tokens = [token for _, token, *_ in triples]
    if reply.get("output_ids", tokens) != tokens:
        raise BadReply("log-probs of other tokens than those sampled")
    stopped = _stopped(told["finish_reason"]["type"])
    return Sampled(tokens, [logp for logp, *_ in triples], stopped)


def _sglang_token_logps(post: Post, tokens: Sequence[int]) -> list[float]:
    body = {
        "input_ids": list(tokens),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }

    def read(reply: Any) -> list[float]:
        triples = reply["meta_info"].get("input_token_logprobs")
        if not triples:
            raise NoPromptLogps
        if [token for _, token, *_ in triples] != list(tokens):
            raise BadReply("log-probs of other tokens than those asked for")
        return _check_logps([logp for logp, *_ in triples[1:]])

    return post("/generate", body, read)


def _sglang_load(post: Post, folder: str) -> None:
    post("/update_weights_from_disk", {"model_path": folder}, _sglang_was_loaded)
    post("/flush_cache", {})


def _sglang_was_loaded(reply: Any) -> None:
    if reply["success"] is not True:
        raise BadReply(f"the server did not load: {reply.get('message')}")


def _stopped(reason: str | None) -> bool:
    if reason not in ("stop", "length"):
        raise TryAgain(f"the server gave up on it: {reason}")
    return reason == "stop"


_VLLM = Dialect(
    functools.partial(_vllm_sample, seeded=True), _vllm_token_logps, _vllm_load, _vllm_load_adapter
)
DIALECTS: dict[str, Dialect] = {
    "vllm": _VLLM,
    # tpu-inference refuses requests with a seed.
    "vllm-tpu": _VLLM._replace(sample=functools.partial(_vllm_sample, seeded=False)),
    "sglang": Dialect(_sglang_sample, _sglang_token_logps, _sglang_load),
}
