"""A reward model as a reward function: scored in JAX, on the devices of this process."""

import functools
import json
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gvpo_jax.errors import UserError
from gvpo_jax.rewards.attempt import attempt
from gvpo_jax.rewards.call import RewardError
from gvpo_jax.settings import setting

_SHORTEST = 64  # tokens that texts are filled up to; longer ones to a power of two


@dataclass(frozen=True)
class RewardModelConfig:
    """How reward models are computed; they are named in `rewards.funcs`."""

    batch_size: int = setting(
        8,
        "Completions scored at a time, rounded up to fill the devices of a process.",
        least=1,
        free=True,
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "Of weights and computation.")


class RewardModel:
    """A reward function: the one output of a `...ForSequenceClassification` model.

    The text of a chat is made by the reward model's own chat template; else it is the prompt and
    the completion, one after the other. No token is added, as TRL adds none. The weights are read
    at the first call, and lie cut over the devices of this process; other processes score theirs.

    Args:
        name: of a folder, or on the Hugging Face hub.
        options: how it is computed.

    Raises:
        UserError: there is no such reward model, or it is not supported.
    """

    def __init__(self, name: str, options: RewardModelConfig | None = None):
        from gvpo_jax.models.reward_model import SCORE, open_reward_model

        self._files, self._options = open_reward_model(name), options or RewardModelConfig()
        self.__name__ = Path(name).name
        self._lock = threading.Lock()
        head = zlib.crc32(self._files.tensors.read(SCORE).tobytes())
        # What tells it from others, see `functions.code_fingerprint`; not where it lies.
        self.own_code = json.dumps([repr(self._files.config), head, self._options.dtype])

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any
    ) -> list[float | Exception]:
        """Scores of n completions; an exception in the place of one that can't be scored.

        Raises:
            UserError: the weights can't be used, or the tokenizer has no chat template.
        """
        samples = zip(prompts, completions, strict=True)
        read = [attempt(self._ids, *sample) for sample in samples]
        for error in read:  # of the model itself: leaving rows out would hide it
            if isinstance(error, UserError) and not isinstance(error, RewardError):
                raise error
        ids: list[list[int]] = [[] if isinstance(x, Exception) else x for x in read]
        longest = self._files.config.max_position_embeddings
        found: list[float | Exception] = [
            x
            if isinstance(x, Exception)
            else RewardError(f"{len(x)} tokens; {self.__name__} was made for 1 to {longest}")
            for x in read
        ]
        fits = [i for i, x in enumerate(ids) if 0 < len(x) <= longest]
        fits.sort(key=lambda i: len(ids[i]))
        with self._lock:
            size = self._scorer.batch_size(self._options.batch_size)
            for first in range(0, len(fits), size):
                rows = fits[first : first + size]
                scores = self._scorer.scores([ids[i] for i in rows], size)
                for i, score in zip(rows, scores, strict=True):
                    found[i] = float(score)
        return found

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        """The text's tokens up to the last that is no padding: the reward is read there."""
        tokenizer, pad = self._files.tokenizer, self._files.pad_token_id
        if isinstance(prompt, str):
            text = prompt + completion
        elif tokenizer.chat_template is None:
            raise UserError(
                f"the reward model {self._files.name} has no chat template, and the prompts are "
                "chats: give one whose tokenizer has a template, or prompts that are texts"
            )
        else:
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        ids: list[int] = tokenizer(str(text), add_special_tokens=False)["input_ids"]
        rows = self._files.config.vocab_size
        if strange := [x for x in ids if not 0 <= x < rows]:
            raise RewardError(  # of this row: a completion may spell any token
                f"the reward model {self._files.name} has no embedding for token {strange[0]} of "
                f"its tokenizer: {rows} rows"
            )
        while ids and ids[-1] == pad and any(x != pad for x in ids):
            ids.pop()
        return ids

    @functools.cached_property
    def _scorer(self) -> "_Scorer":
        return _Scorer(self._files, self._options.dtype)


class _Scorer:
    """The weights on the devices of this process, and the compiled function."""

    def __init__(self, files: Any, dtype: Literal["float32", "bfloat16"]):
        import jax
        import jax.numpy as jnp

        from gvpo_jax.models.config import ModelConfig
        from gvpo_jax.parallel.layout import place_params
        from gvpo_jax.parallel.mesh import MeshConfig

        self._mesh = MeshConfig().mesh(jax.local_devices())
        kind = jnp.dtype(dtype)

        def place(path: str, x: np.ndarray) -> Any:
            return place_params(self._mesh, {path: x.astype(kind)})[path]

        self._params, head = files.params(place)
        decoder = ModelConfig(dtype=dtype).functions(files.config, self._mesh, "model")

        def scores(params: Any, tokens: Any, lengths: Any) -> Any:
            (last, _), head = decoder.prefill(params["decoder"], tokens, lengths), params["head"]
            return (last.astype(kind) @ head).astype(jnp.float32)

        self._params = {"decoder": self._params, "head": jnp.asarray(head, kind)}
        self._scores = jax.jit(scores)

    def batch_size(self, wanted: int) -> int:
        """Rows that divide over the devices, at least as many as are wanted."""
        from gvpo_jax.parallel.layout import group_shards

        shards = group_shards(self._mesh)
        return -(-wanted // shards) * shards

    def scores(self, ids: Sequence[Sequence[int]], size: int) -> np.ndarray:
        """Of at most `size` texts, which are filled up to that many and to a common length."""
        import jax

        from gvpo_jax.parallel.layout import batch_shardings

        longest = max(len(x) for x in ids)
        width = max(_SHORTEST, 1 << (longest - 1).bit_length())
        tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for row, x in enumerate(ids):
            tokens[row, : len(x)], lengths[row] = x, len(x)
        arrays = {"prompts": tokens, "prompt_lengths": lengths}
        placed = jax.device_put(arrays, batch_shardings(self._mesh, arrays, size, 1))
        scores = self._scores(self._params, placed["prompts"], placed["prompt_lengths"])
        return np.asarray(scores)[: len(ids)]
