"""The settings of a run that is over in seconds, for the tests of the trainer."""

import dataclasses

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.models.load import LoadedModel, load_model


def one_layer() -> LoadedModel:
    """The debug model's first layer alone, which compiles in three quarters of the time."""
    model = load_model("debug")
    shape = dataclasses.replace(model.config, num_layers=1)
    params = model.params | {"layers": {0: model.params["layers"][0]}}
    return dataclasses.replace(model, config=shape, params=params)


def config(run_dir, **settings):
    base = {
        "run__dir": str(run_dir),
        "rollout__num_generations": 4,
        "rollout__max_completion_length": 6,
        "data__max_prompt_length": 32,
        "optimizer__learning_rate": 3e-3,
        "train__steps": 4,
        "train__batch_size": 2,
        "eval__batch_size": 4,
        "eval__success_reward": 0.5,
        "mesh__fsdp": 1,
        "log__completions_every": 1,
    }
    return override(Config(), **base | settings)
