"""Ministral: Mistral with a list of which layers have a window."""

import dataclasses

from gvpo_jax.models.families import mistral

FAMILY = dataclasses.replace(
    mistral.FAMILY,
    model_type="ministral",
    architecture="MinistralForCausalLM",
)
