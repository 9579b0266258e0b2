"""What the machine gives at most, measured: a large matrix product, and a copy.

python experiments/bench/ceilings.py cpu float32
"""

import json
import statistics
import sys
import time


def main() -> None:
    device, dtype = sys.argv[1:]
    import jax
    import jax.numpy as jnp

    side, entries = (8192, 2**30) if device == "gpu" else (2048, 2**26)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    y = jnp.zeros(entries, jnp.dtype(dtype))
    size = y.nbytes
    # In place: else it would be new pages that are measured.
    answer = {
        "matmul_flops": 2 * side**3 / median(jax.jit(lambda x: x @ (x / side)), x),
        "copy_bytes_per_second": 2 * size / median(jax.jit(lambda y: y + 1, donate_argnums=0), y),
    }
    print(json.dumps(answer))


def median(function, x, rounds: int = 9) -> float:
    """Seconds; each round works on what the one before gave."""
    import jax

    x = jax.block_until_ready(function(x))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        x = jax.block_until_ready(function(x))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
