"""Several processes, as a TPU pod has one per host: starting them, and what they tell each other.

Every process runs the same program. Of each batch it holds the groups whose devices are its own:
it builds, decodes and scores those alone. What all must know is gathered, and is small.
With one process everything here hands its arguments back.
"""

import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gvpo_jax.errors import UserError
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other."""

    initialize: Literal["auto", "always", "never"] = setting(
        "auto",
        "auto joins where an address is given or the environment tells of several processes "
        "(JAX_COORDINATOR_ADDRESS, SLURM, Open MPI, TPU pods on GKE); always lets JAX find out by "
        "itself, as on TPU pods made with gcloud; never stays alone.",
        free=True,
    )
    coordinator_address: str | None = setting(
        None, "HOST:PORT of process 0; needs the next two.", free=True
    )
    num_processes: int | None = setting(None, "How many there are.", least=1, free=True)
    process_id: int | None = setting(None, "Which one this is, from 0.", least=0, free=True)
    initialization_timeout: int = setting(
        120, "Seconds to wait for the others.", least=1, free=True
    )
    heartbeat_timeout: int = setting(
        100, "Seconds after which a silent process counts as dead.", least=1, free=True
    )

    def start(self) -> None:
        """Join the other processes; call it before anything touches a device.

        Where the others do not come in time the program ends, with a line and status 2. Raises
        UserError where half of the settings are missing, or the coordinator is not reached in time.
        """
        if "proxy" in os.environ.get("JAX_PLATFORMS", ""):
            return _start_pathways()
        address = self.coordinator_address
        if 0 < [address, self.num_processes, self.process_id].count(None) < 3:
            raise UserError(
                "distributed.coordinator_address, num_processes and process_id belong together: "
                "give all three, or none"
            )
        if (self.process_id or 0) >= (self.num_processes or 1):
            raise UserError(
                f"distributed.process_id={self.process_id} must be less than "
                f"distributed.num_processes={self.num_processes}"
            )
        wanted = self.initialize == "always" or address is not None or _in_a_cluster()
        if self.initialize == "never" or not wanted or jax.distributed.is_initialized():
            return
        if address is not None:
            host, port = _host_and_port(address)
            if self.process_id:
                _wait_for(host, port, self.initialization_timeout)
        self._join()

    def _join(self) -> None:
        seconds = self.initialization_timeout
        where = self.coordinator_address or "the coordinator that JAX looked for"
        late = f"the other processes did not come to {where} within {seconds} s"
        watch = threading.Timer(seconds, _give_up, [late])
        watch.daemon = True
        watch.start()
        try:
            jax.distributed.initialize(
                self.coordinator_address,
                self.num_processes,
                self.process_id,
                initialization_timeout=seconds + 10,  # the watch goes first
                heartbeat_timeout_seconds=self.heartbeat_timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"could not join the other processes at {where} within {seconds} s: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None
        finally:
            watch.cancel()


def is_first() -> bool:
    """Whether this process logs and writes what one process writes."""
    return jax.process_index() == 0


def my_slice(groups: int) -> slice:
    """The groups of a batch that this process builds: equal parts, in the processes' order.

    Raises:
        UserError: they do not divide.
    """
    processes, here = jax.process_count(), jax.process_index()
    if groups % processes:
        raise UserError(
            f"{groups} new groups do not divide over {processes} processes; use a multiple"
        )
    return slice(groups // processes * here, groups // processes * (here + 1))


def my_items(items: Sequence[Any]) -> list[Any]:
    """This process's part of a list, as long as everyone's: the last item fills up the end."""
    processes = jax.process_count()
    size = -(-len(items) // processes)
    filled = [*items, *[items[-1]] * (size * processes - len(items))]
    return filled[jax.process_index() * size : (jax.process_index() + 1) * size]


def to_devices(local: Any, shardings: Any) -> Any:
    """Arrays of this process's rows, laid out as parts of the arrays of all rows."""
    if jax.process_count() == 1:
        return jax.device_put(local, shardings)
    return jax.tree.map(
        lambda x, s: multihost_utils.host_local_array_to_global_array(x, s.mesh, s.spec),
        local,
        shardings,
    )


def to_host(tree: Any) -> Any:
    """NumPy arrays of this process's rows of arrays on devices."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(
            multihost_utils.global_array_to_host_local_array(x, x.sharding.mesh, x.sharding.spec)
        ),
        tree,
    )


def to_first_host(tree: Any) -> Any:
    """Arrays on all devices as arrays that the first process can read in full; None elsewhere.

    One after the other: a device needs room for one of them.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(_to_first_host, tree)


def gather(local: Any) -> Any:
    """NumPy arrays of all processes' rows, one process's after the other, on each of them."""
    if jax.process_count() == 1:
        return local
    # As bytes: on the way JAX would make 32 bits of 64.
    data = jax.tree.map(lambda x: np.ascontiguousarray(x)[..., None].view(np.uint8), local)
    data = multihost_utils.process_allgather(data, tiled=True)
    return jax.tree.map(lambda y, x: y.view(x.dtype)[..., 0], data, local)


def max_over_hosts(number: int) -> int:
    """The largest of this number over all processes."""
    return int(gather(np.array([number])).max())


def raise_together(work: Callable[[], Any]) -> Any:
    """What `work` gives, or the first process's error on every one: none waits for a dead one.

    Raises:
        UserError: as `work` raises it here, or for whatever it raises elsewhere.
    """
    if jax.process_count() == 1:
        return work()
    result, message, own, page = None, "", None, None
    try:
        result = work()
    except UserError as error:
        message, page = str(error), error.page
    except Exception as error:  # a bug, or no memory: the others must not wait for this process
        message, own = f"{type(error).__name__}: {error}", error
    text = np.frombuffer(message.encode(errors="replace")[:512].ljust(512, b"\0"), np.uint8)
    for process, row in enumerate(gather(text[None])):
        if row.any():
            if own is not None:
                raise own
            told = bytes(row).rstrip(b"\0").decode(errors="replace")
            if process == jax.process_index():
                raise UserError(told, page=page)
            raise UserError(f"host {process}: {told}")
    return result


def from_first_host(work: Callable[[], Any]) -> Any:
    """What `work` gives, or raises, in the first process, which alone does it, on every one."""
    result = raise_together(lambda: work() if is_first() else None)
    if jax.process_count() == 1:
        return result
    data = np.frombuffer(pickle.dumps(result), np.uint8)
    size = max_over_hosts(len(data))
    told = gather(np.pad(data, (0, size - len(data)))[None])
    return pickle.loads(told[0].tobytes())


def _to_first_host(x: jax.Array) -> np.ndarray | None:
    assert isinstance(x.sharding, NamedSharding)
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    copied = jax.device_put(x, everywhere)
    jax.block_until_ready(copied)  # who reads nothing would run ahead and hold many at once
    return np.asarray(copied.addressable_data(0)) if is_first() else None


def _give_up(message: str) -> None:
    """Ends the program: JAX would abort it, without an error to catch."""
    print(f"gvpo-jax: error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"distributed.coordinator_address={address}: write HOST:PORT")
    return host, int(port)


def _wait_for(host: str, port: int, seconds: int) -> None:
    """Until the coordinator can be reached: JAX would end the process without a word to catch."""
    deadline, problem = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(
        f"could not reach the coordinator at {host}:{port} within {seconds} s ({problem}); is "
        "process 0 running, and distributed.initialization_timeout long enough?"
    )


def _in_a_cluster() -> bool:
    env = os.environ
    tasks = (env.get(name) or 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    return (
        any(int(number) > 1 for number in tasks)
        or "JAX_COORDINATOR_ADDRESS" in env
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    )


def _start_pathways() -> None:
    try:
        import pathwaysutils  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            "JAX_PLATFORMS=proxy asks for Pathways: pip install pathwaysutils"
        ) from None
    pathwaysutils.initialize()
