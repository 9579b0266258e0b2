"""Language models: one decoder as plain dicts of arrays, and Hugging Face files in and out."""

from gvpo_jax.models.export import export_model
from gvpo_jax.models.load import LoadedModel, load_model, stop_token_ids

__all__ = ["LoadedModel", "export_model", "load_model", "stop_token_ids"]
