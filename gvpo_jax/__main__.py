"""`python -m gvpo_jax` is the command `gvpo-jax`."""

import sys

from gvpo_jax.cli import main

sys.exit(main())
