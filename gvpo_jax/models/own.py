"""A model from elsewhere: its functions, parameters and tokenizer, for `Trainer(config, model)`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderFns
from gvpo_jax.models.load import checked_stop_ids

Hidden = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """A model that this package did not load.

    Attributes:
        functions: what it computes: its own `DecoderFns`, or those of `plain_functions`.
        params: its parameters, nested dicts and lists of float32 arrays. One whose path and shape
            are as in the table of `gvpo_jax.parallel.layout`, such as `layers/0/q/kernel`, is cut
            over the devices; the others are copied to each.
        tokenizer: a tokenizer of transformers.
        max_length: tokens that a text may have, prompt and completion together.
        stop_token_ids: the tokens that end a completion, beside the tokenizer's end token.
        name: for messages and reports.
    """

    functions: DecoderFns
    params: Any
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stop_token_ids: tuple[int, ...] = ()
    name: str = "own model"

    def __post_init__(self) -> None:
        """Raises UserError where the tokenizer is none of transformers."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                "OwnModel(tokenizer=...) takes a tokenizer of transformers, such as "
                "AutoTokenizer.from_pretrained(...) or PreTrainedTokenizerFast(...), got "
                f"{type(self.tokenizer).__name__}"
            )

    def stop_ids(self, more: Sequence[int] = ()) -> tuple[int, ...]:
        """Every token that ends a completion, and `more`.

        Raises:
            UserError: one is no token id that the embedding has a row for.
        """
        end: Any = self.tokenizer.eos_token_id
        ids = [*([] if end is None else [end]), *self.stop_token_ids, *more]
        return checked_stop_ids(ids, self.vocab_size, self.name)

    @property
    def vocab_size(self) -> int:
        """Rows of the output embedding."""
        return jax.eval_shape(self.functions.head, self.params).shape[0]


def plain_functions(hidden: Hidden, head: Callable[[Any], jax.Array]) -> DecoderFns:
    """What `Trainer` needs of a model, from two functions of its parameters: simple, but slow.

    The model needs no cache and knows of no groups: a prompt is computed anew for each of its
    completions, and a completion for each of its tokens. For speed offer `DecoderFns` with a cache.

    Args:
        hidden: `(params, tokens [b, s]) -> [b, s, d]`, the hidden states before the head. Each may
            depend on the tokens up to its own place alone; what lies behind a text is padding.
        head: `params -> [v, d]`, the output embedding: logits are `hidden @ head.T`.
    """

    def prefill(params, prompts_gp, lengths_g):
        prefix = {"prompts": prompts_gp, "lengths": lengths_g}
        return _at(hidden(params, prompts_gp), lengths_g - 1), prefix

    def empty_cache(groups: int, k: int, max_completion_length: int):
        return jnp.zeros((groups, k, max_completion_length), jnp.int32)  # the tokens so far

    def decode(params, tokens_gk, lengths_g, prefix, cache, before_gk, place):
        cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens_gk[..., None], place, axis=2)
        size = cache.shape[2]  # of a ring, in which a completion may begin anywhere
        order = (place - before_gk[..., None] + jnp.arange(size)[None, None]) % size
        completions = jnp.take_along_axis(cache, order, axis=2)
        texts, lengths = _joined(prefix["prompts"], lengths_g, completions)
        last = _at(hidden(params, texts), lengths + before_gk.reshape(-1))
        return last.reshape(*tokens_gk.shape, -1), cache

    def completion_hidden(params, prompts_gp, lengths_g, completions_gkt):
        g, k, t = completions_gkt.shape
        texts, lengths = _joined(prompts_gp, lengths_g, completions_gkt[..., :-1])
        before = lengths[:, None] - 1 + jnp.arange(t)[None]
        states = jnp.take_along_axis(hidden(params, texts), before[..., None], axis=1)
        return states.reshape(g, k, t, -1)

    return DecoderFns(prefill, empty_cache, decode, completion_hidden, head)


def _joined(prompts_gp, lengths_g, completions_gkt):
    """Texts `[g * k, p + t]`, each a prompt without its padding and a completion; `[g * k]`."""
    (g, p), (_, k, t) = prompts_gp.shape, completions_gkt.shape
    prompts, lengths = (jnp.repeat(x, k, axis=0) for x in (prompts_gp, lengths_g))
    both = jnp.concatenate([prompts, completions_gkt.reshape(g * k, t)], axis=1)
    place = jnp.broadcast_to(jnp.arange(p + t)[None], (g * k, p + t))
    source = jnp.where(place < lengths[:, None], place, place + p - lengths[:, None])
    return jnp.take_along_axis(both, jnp.minimum(source, p + t - 1), axis=1), lengths


def _at(states_bsd, place_b):
    """The hidden state `[b, d]` at one place of each row."""
    return jnp.take_along_axis(states_bsd, place_b[:, None, None], axis=1)[:, 0]
