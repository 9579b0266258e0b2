"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) in JAX.

This module needs nothing but jax: `from gvpo_jax import gvpo_loss` brings no other library along.
The rest lives in rooms of its own, e.g. `gvpo_jax.trainer.Trainer`.
"""

import importlib.util
import sys
from typing import Any

from gvpo_jax.loss import group, gvpo_loss, gvpo_mse, gvpo_weights, ungroup

__version__ = "0.1.0"
__all__ = ["group", "gvpo_loss", "gvpo_mse", "gvpo_weights", "ungroup"]

# What people look for here, and what brings it.
_ELSEWHERE = {
    "Trainer": "from gvpo_jax.trainer import Trainer",
    "GVPOTrainer": "from gvpo_jax.trainer import Trainer",
    "GRPOTrainer": "from gvpo_jax.trainer import Trainer",
    "train": "from gvpo_jax.trainer import Trainer, or on the command line: gvpo-jax train CONFIG",
    "Config": "from gvpo_jax.config import Config",
    "GVPOConfig": "from gvpo_jax.config import Config",
    "GRPOConfig": "from gvpo_jax.config import Config",
    "load_config": "from gvpo_jax.config_file import load_config",
    "override": "from gvpo_jax.config_file import override",
    "load_model": "from gvpo_jax.models import load_model",
    "LoadedModel": "from gvpo_jax.models import LoadedModel",
    "export_model": "from gvpo_jax.models import export_model",
    "UserError": "from gvpo_jax.errors import UserError",
    "token_logprobs": "from gvpo_jax.logprobs import token_logprobs",
    "sequence_logprobs": "from gvpo_jax.logprobs import sequence_logprobs",
    "load_reward_func": "from gvpo_jax.rewards import load_reward_func",
}
_BASELINES = ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "reinforce_pp", "rebel", "dpo")
_ELSEWHERE |= {f"{x}_loss": f"from gvpo_jax.baselines import {x}_loss" for x in _BASELINES}


def __getattr__(name: str) -> Any:
    """Tell where it is: to bring it here would load all that a trainer needs."""
    if name not in _ELSEWHERE:
        module = not name.startswith("_") and importlib.util.find_spec(f"gvpo_jax.{name}")
        hint = f"; it is a module: import gvpo_jax.{name}" if module else ""
        raise AttributeError(f"module 'gvpo_jax' has no attribute {name!r}{hint}")
    text = f"{name} is not here: {_ELSEWHERE[name]}"
    # `from gvpo_jax import X` asks with hasattr first, and puts words of its own in place of an
    # AttributeError's.
    if sys._getframe(1).f_code.co_name == "_handle_fromlist":
        raise ImportError(text)
    raise AttributeError(text)
