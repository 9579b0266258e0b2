"""Eight CPU devices, no silent rank promotion, every program compiled once."""

import gc
import os
import signal
import subprocess
import sys
import tempfile

# A shell that starts pytest in the background has it ignore Ctrl-C, and so all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Half of the tests' time would be LLVM's; not all versions of XLA know the other flags. Cut into 32
# parts, as is the default, a program takes a sixth more of the processor's time to compile.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]


def known(flags: list[str]) -> bool:
    """Whether XLA takes them: it ends the process where it doesn't."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    return subprocess.run(probe, env=environment, capture_output=True).returncode == 0


if "GVPO_TESTS_XLA_FLAGS" not in os.environ:  # pytest-xdist's workers find them here
    given = [*os.environ.get("XLA_FLAGS", "").split(), *(QUICK if known(QUICK) else QUICK[:1])]
    os.environ["GVPO_TESTS_XLA_FLAGS"] = " ".join(given)
os.environ["XLA_FLAGS"] = (
    os.environ["GVPO_TESTS_XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
)
# Many trainers, here and in child processes, but few different programs.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the one of the process above them
    _cache = tempfile.TemporaryDirectory(prefix="gvpo-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    # Of the functions that runs were trained with; the user's own stays as it is.
    _state = tempfile.TemporaryDirectory(prefix="gvpo-jax-tests-state-")
    os.environ["XDG_STATE_HOME"] = _state.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402  (reads the lines above)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What all modules hold stays; to look for garbage in it takes most of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def x64():
    """Numbers in float64, so that identities hold to rounding."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(True):
            yield
    else:  # before jax 0.8, with which the loss is tested too
        from jax.experimental import enable_x64

        with enable_x64():
            yield
