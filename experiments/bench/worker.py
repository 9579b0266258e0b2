"""One contestant at one task, in a process of its own; rounds are asked for on standard input.

Answers are lines of JSON on the descriptor that was standard output; all else that is printed goes
to standard error.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    contestant, task, name, folder, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    from workloads import workload

    module = importlib.import_module(contestant)
    once, check = getattr(module, task)(workload(name, task), Path(folder), device)
    first = timed(once)
    answer(first_seconds=first["seconds"], check=check)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        answer(**timed(once))
    answer(**peak(device))


def timed(once) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    once()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def peak(device: str) -> dict[str, float]:
    """GiB of memory at most: of the process, or on the device."""
    if device == "gpu" and "torch" in sys.modules and "jax" not in sys.modules:
        import torch

        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    if device == "gpu":
        import jax

        return {"peak_gib": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30}
    status = Path("/proc/self/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak_gib": int(kib) / 2**20}


if __name__ == "__main__":
    main()
