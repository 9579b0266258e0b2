"""`gvpo-jax doctor`: what is installed and there, and what will not work.

Only `about_config` needs more than jax. Nothing ends the command: a question that fails becomes a
finding.
"""
