"""Eight CPU devices, no silent rank promotion, float64 where a test asks for it, each program compiled once."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many trainers, here and in child processes, but few different programs.
_cache = tempfile.TemporaryDirectory(prefix="gvpo-jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
_cache = tempfile.TemporaryDirectory(
    prefix="gvpo-jax-tests-"
)  # many trainers, few different programs
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def x64():
    """Numbers in float64, so that identities hold to rounding."""
    with jax.enable_x64(True):
        yield
