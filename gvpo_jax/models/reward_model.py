"""Reward models: decoders that give a text one number (`...ForSequenceClassification`).

Folders and hub names as of `load_model`; the weights are read by `RewardModelFiles.params`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.hf_config import decoder_config, text_values
from gvpo_jax.models.hf_files import open_safetensors, read_json
from gvpo_jax.models.hf_tensors import Place, TensorSource, check_finite, read_params, text_tensors
from gvpo_jax.models.load import download, local_path, read_tokenizer

_ENDING = "ForSequenceClassification"
SCORE = "score.weight"  # [1, d]


@dataclasses.dataclass(frozen=True)
class RewardModelFiles:
    """A reward model whose weights are still on disk."""

    name: str
    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int | None  # the reward is read before these, where a text ends in some
    tensors: TensorSource

    @property
    def weights(self) -> int:
        """How many numbers its tensors hold."""
        return sum(math.prod(shape) for shape in self.tensors.shapes.values())

    def params(self, place: Place) -> tuple[dict[str, Any], np.ndarray]:
        """The decoder's parameters, each as `place(path, array)` gives it, and the head, `[d]`.

        Raises:
            UserError: a tensor is missing, unexpected or mis-shaped, or not finite.
        """
        score = self.tensors.read(SCORE)
        check_finite(score, f"{self.name}: tensor {SCORE}")
        shapes = {name: x for name, x in self.tensors.shapes.items() if name not in _HEADS}
        rest = dataclasses.replace(self.tensors, shapes=shapes)
        return read_params(self.config, rest, place=place), score[0]


_HEADS = (SCORE, "lm_head.weight")


@explained_by(Page.REWARD_MODELS)
def open_reward_model(name: str) -> RewardModelFiles:
    """A reward model by the name of a folder or on the hub.

    Raises:
        UserError: it is not there, is none, or is of a family or a form that is not supported.
    """
    folder = local_path(name) or download(name)
    values = read_json(folder / "config.json") if folder.is_dir() else None
    if values is None:
        raise UserError(f"{name} is no reward model: it is no folder with a config.json")
    config = _decoder(folder, values)
    tensors = open_safetensors(folder)
    if "text_config" in values:
        tensors = text_tensors(tensors)
    shape = tensors.shapes.get(SCORE)
    if shape is None:
        raise UserError(f"{name} is no reward model: it has no tensor {SCORE}")
    if shape != (1, config.hidden_size):
        raise UserError(
            f"{name} gives {shape[0]} numbers for a text ({SCORE} is {list(shape)}); a reward "
            f"model gives one, and its {SCORE} is [1, {config.hidden_size}]"
        )
    pad = text_values(values).get("pad_token_id")
    return RewardModelFiles(name, config, read_tokenizer(folder), pad, tensors)


def _decoder(folder: Path, values: Mapping[str, Any]) -> DecoderConfig:
    architectures = values.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    if not any(str(architecture).endswith(_ENDING) for architecture in architectures):
        raise UserError(
            f"{folder} is no reward model that can be read: its architecture is "
            f"{' '.join(map(str, architectures)) or 'not given'}, not one that ends in {_ENDING}"
        )
    silent = {key: value for key, value in values.items() if key != "architectures"}
    try:
        config = decoder_config(silent)
    except UserError as error:
        raise UserError(f"{folder}/{error}") from error
    # The head is another, and nothing scales what it is given.
    return dataclasses.replace(
        config, tie_embeddings=True, logits_scaling=None, final_logit_softcapping=None
    )
