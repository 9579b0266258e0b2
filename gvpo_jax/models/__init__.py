"""Language models: one decoder as plain dicts of arrays, and Hugging Face files in and out."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from gvpo_jax.installed import check_trainer

if TYPE_CHECKING:
    from gvpo_jax.models.export import export_model
    from gvpo_jax.models.load import LoadedModel, load_model, stop_token_ids

__all__ = ["LoadedModel", "export_model", "load_model", "stop_token_ids"]

check_trainer()
# Else transformers advises everyone to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """Late: these bring in transformers, which a misspelt config should not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "export" if name == "export_model" else "load"
    return getattr(importlib.import_module(f"gvpo_jax.models.{room}"), name)
