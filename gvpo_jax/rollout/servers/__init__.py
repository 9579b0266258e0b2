"""Rollouts on vLLM and SGLang servers, and how new weights reach them."""
