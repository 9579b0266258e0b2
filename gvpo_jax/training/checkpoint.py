"""Checkpoints through Orbax, with what it leaves to us: checksums, and skipping broken steps."""

import contextlib
import dataclasses
import io
import json
import logging
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gvpo_jax.buckets import as_path, is_address, size_of
from gvpo_jax.errors import UserError, one_line
from gvpo_jax.parallel.distributed import max_over_hosts
from gvpo_jax.parallel.layout import path_name
from gvpo_jax.training.step import TrainState

_log = logging.getLogger(__name__)

# What a checkpoint is made of. 1, of version 0.1: one item "state", no number. 2: an item for each
# tree. Whatever comes later, the item `extra` stays JSON sealed by `_sealed`, with this number.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: its step, its trees by name, and what came along.

    `samples` holds what each of the processes saved, in their order.
    """

    step: int
    trees: dict[str, Any]
    extra: dict[str, Any]
    samples: list[dict[str, np.ndarray]]


class Checkpoints:
    """The numbered checkpoints of one run folder, which is made when missing.

    A context manager that awaits the last save. With `read_only` nothing is made or changed.

    Args:
        folder: on this machine, or in a bucket.
        keep: how many of the latest stay.
        keep_best: how many of those stay besides that were saved with the best scores.
        read_only: only look.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int = 2,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        self._folder = as_path(folder)
        if not is_address(folder):
            self._folder = self._folder.absolute()
        self._broken: set[int] = set()
        self._keep, self._keep_best = keep, keep_best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self, create=not read_only
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._scores = {step: self._score(step) for step in self.steps()} if keep_best else {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of these stay, as Orbax asks when another is whole."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if not math.isnan(self._scores.get(step, math.nan))]
        scored.sort(key=lambda step: (self._scores[step], step))  # of equal ones the later
        best = scored[max(len(scored) - self._keep_best, 0) :]
        kept = {*sorted(steps)[-self._keep :], *best}
        return [step in kept for step in steps]

    def steps(self) -> list[int]:
        """The numbers of all that are there, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        extra: dict[str, Any],
        samples: Mapping[str, np.ndarray] | None = None,
        *,
        score: float = math.nan,
    ) -> None:
        """Save pytrees of arrays and JSON values as one atomic step, written in the background.

        Each of the trees is an item of its own, which can be read without the others. `samples` are
        this process's NumPy arrays, whose shapes a later session can't know, e.g. a replay buffer.
        `score` is what `keep_best` compares, more is better; NaN: there is none.

        Raises:
            UserError: an earlier save failed, e.g. for a full disk.
        """
        if step in self._broken:
            with self._told():
                self._manager.delete(step)
            self._broken.discard(step)
        if step in self._manager.all_steps():
            return
        blob = _to_bytes(samples or {})
        if not math.isnan(score):
            extra, self._scores[step] = extra | {"score": score}, score
        extra = extra | {"checksums": _checksums(dict(trees)), "format": FORMAT}
        extra = _sealed(step, extra)
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
            extra=ocp.args.JsonSave(extra),
            samples=ocp.args.PyTreeSave(_rows_of_processes(blob)),
        )
        with self._told():  # a failed write in the background shows up here
            # Forced: Orbax would silently skip a step older than a broken one that is still there.
            self._manager.save(step, args=args, force=True)

    def about(self) -> dict[str, Any]:
        """The JSON values of the newest checkpoint that has some that can be read; else none."""
        return next(filter(None, map(self._about, self.steps())), {})

    def find(self, step: int | Literal["best"], scores: Mapping[int, float]) -> int:
        """The step of that number, or with the best of these scores of steps.

        Raises:
            UserError: there is none.
        """
        there = ", ".join(map(str, sorted(self.steps()))) or "none"
        if step == "best":
            scores = {step: scores[step] for step in self.steps() if step in scores}
            if not scores:
                raise UserError(
                    f"no checkpoint in {self._folder} has a score: held-out rows are answered "
                    f"where eval.every and checkpoint.every meet; there are {there}"
                )
            return max(scores, key=lambda step: (scores[step], step))
        if step not in self.steps():
            raise UserError(f"{self._folder} has no checkpoint {step}; there are {there}")
        return step

    def size(self, step: int) -> int:
        """Bytes on disk, or in the bucket."""
        if is_address(self._folder):
            return size_of(f"{self._folder}/{step}")
        files = Path(self._folder / str(step)).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def problem(self, step: int) -> str:
        """What is broken in a checkpoint, which is read in full; empty: nothing."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

        try:
            found: Any = ocp.StandardCheckpointHandler()
            folders = {folder.name: folder for folder in (self._folder / str(step)).iterdir()}
            if "params" not in folders:
                return "not looked into: it is of version 0.1"
            trees = {
                name: found.metadata(folder).tree
                for name, folder in folders.items()
                if folder.is_dir() and name not in ("extra", "samples")
            }
            self._read(step, jax.tree.map(shape, trees), ())
        except UserError as error:
            return str(error)
        except Exception as error:  # Orbax wraps what it meets in bare exceptions
            return f"broken: {one_line(_first_line(error), 80)}"
        return ""

    def restore(
        self, like: Mapping[str, Any], *, without: Sequence[str] = (), step: int | None = None
    ) -> Restored:
        """The newest whole checkpoint, or that of a step.

        A step that can't be read or whose checksums differ is passed over with a warning. It stays
        on disk until the run saves that step again.

        Args:
            like: the trees, of `jax.ShapeDtypeStruct` with shardings, as they shall come back.
            without: those that are not read, and the samples neither.
            step: the one to read.

        Raises:
            UserError: none is whole, or not that one; or a later version wrote it.
        """
        asked = self.steps() if step is None else [step]
        for step in asked:
            try:
                return self._read(step, like, without)
            except UserError:  # it may be whole
                raise
            except Exception as error:  # Orbax wraps what it meets in bare exceptions
                _log.warning(
                    "checkpoint %d is broken (%s); trying an earlier one", step, _first_line(error)
                )
                self._broken.add(step)
        if asked[1:] or not self.steps()[1:]:
            raise UserError(f"no checkpoint in {self._folder} can be read; start a new run folder")
        raise UserError(f"checkpoint {asked[0]} in {self._folder} is broken; take another")

    def wait(self) -> None:
        """Waits until everything is on disk; raises UserError where it could not be written."""
        with self._told():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What Orbax could not write, now or in the background, is the user's mistake."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"could not write a checkpoint to {self._folder}: "
                f"{one_line(_first_line(error), 200)}; "
                "those before it stay: make room, and give the same command"
            ) from None

    def close(self) -> None:
        """Waits as `wait` does, and closes the files."""
        with self._told():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _about(self, step: int) -> dict[str, Any]:
        """The JSON values of one; none where they can't be read."""
        try:
            return self._extra(step)
        except Exception:  # `restore` says what is broken
            return {}

    def _extra(self, step: int) -> dict[str, Any]:
        """The JSON values of one.

        Raises:
            UserError: a later version wrote them.
            ValueError: they are not those that were saved.
        """
        args = ocp.args.Composite(extra=ocp.args.JsonRestore())
        extra = _unsealed(step, self._manager.restore(step, args=args)["extra"])
        if (number := extra.pop("format", FORMAT)) > FORMAT:
            raise UserError(
                f"a later version of gvpo-jax wrote checkpoint {step} in {self._folder}: it has "
                f"format {number}, and this version reads up to {FORMAT}; pip install -U gvpo-jax"
            )
        return extra

    def _score(self, step: int) -> float:
        return self._about(step).get("score", math.nan)

    def _read(self, step: int, like: Mapping[str, Any], without: Sequence[str]) -> Restored:
        extra = self._extra(step)
        has = {entry.name for entry in (self._folder / str(step)).iterdir()}
        wanted = {name: tree for name, tree in like.items() if name not in without}
        format_1 = "params" not in has
        asked = {"state": _trees_of_format_1(like)} if format_1 else wanted
        items: dict[str, Any] = {name: ocp.args.StandardRestore(x) for name, x in asked.items()}
        if "samples" in has and not without:  # format 1 has them in some runs only
            as_numpy = {"npz": ocp.RestoreArgs(restore_type=np.ndarray)}
            items["samples"] = ocp.args.PyTreeRestore(restore_args=as_numpy)
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        trees = read["state"] if format_1 else {name: read[name] for name in wanted}
        _verify(extra.pop("checksums"), trees)
        if format_1:
            train = trees.pop("train")
            trees |= {"params": train.params, "state": train.rest()}
            extra = {"updates": step} | extra
        rows = np.asarray(read["samples"]["npz"]) if "samples" in items else ()
        samples = [_from_bytes(row.tobytes()) for row in rows]
        return Restored(step, trees, extra, samples)


def _trees_of_format_1(like: Mapping[str, Any]) -> dict[str, Any]:
    """The only item that a checkpoint had."""
    reference = {name: tree for name, tree in like.items() if name == "reference"}
    return {"train": TrainState(like["params"], **like["state"])} | reference


def _sealed(step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with the step that they are of, and a checksum of it all."""
    content = {**extra, "of_step": step}
    return {**content, "checksum": _json_checksum(content)}


def _unsealed(step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The values again; those of format 1 have no checksum. Raises ValueError if it differs."""
    content = dict(extra)
    checksum = content.pop("checksum", None)
    if checksum is not None and checksum != _json_checksum(content):
        raise ValueError("checksum of the counters differs")
    if content.pop("of_step", step) != step:
        raise ValueError("its folder has the number of another step")
    return content


def _json_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _verify(expected: Mapping[str, int], trees: Any) -> None:
    """That the trees are those that were saved, as far as they were read."""
    found = _checksums(trees)
    wrong = [name for name in found if expected.get(name) != found[name]]
    roots = {name.partition("/")[0] for name in found}
    missing = [name for name in expected if name.partition("/")[0] in roots and name not in found]
    if wrong or missing:
        raise ValueError(f"checksum of {', '.join([*wrong, *missing][:3])} differs")


def sweep(folder: epath.Path) -> None:
    """Remove what killed saves left half-written; only for the one process that writes there."""
    for path in folder.glob("*.orbax-checkpoint-tmp*") if folder.exists() else ():
        with contextlib.suppress(OSError):
            path.rmtree()


def fingerprint(tree: Any) -> int:
    """One number for a whole tree of arrays: equal trees give equal numbers on any mesh."""
    total = 0
    for name, value in sorted(_checksums(tree).items()):
        total = (total * 31 + value + len(name)) % 2**32
    return total


def _to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Their CRC, their length and the arrays."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    content = file.getvalue()
    return _HEADER.pack(zlib.crc32(content), len(content)) + content


def _from_bytes(blob: bytes) -> dict[str, np.ndarray]:
    crc, length = _HEADER.unpack_from(blob)
    content = blob[_HEADER.size : _HEADER.size + length]
    if zlib.crc32(content) != crc:
        raise ValueError("checksum of the samples differs")
    with zipfile.ZipFile(io.BytesIO(content)) as parts:
        if sum(part.file_size for part in parts.infolist()) > len(content):
            raise ValueError("its samples claim to be larger than what holds them")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _rows_of_processes(blob: bytes) -> dict[str, Any]:
    """An array [processes, bytes] of which each process has its row."""
    width = max_over_hosts(len(blob))
    row = np.zeros((1, width), np.uint8)
    row[0, : len(blob)] = np.frombuffer(blob, np.uint8)
    if jax.process_count() == 1:
        return {"npz": row}
    by_process = {device.process_index: device for device in reversed(jax.devices())}
    devices = [by_process[process] for process in range(jax.process_count())]
    layout = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(devices), ("process",)), jax.sharding.PartitionSpec("process")
    )
    return {"npz": jax.make_array_from_process_local_data(layout, row)}


_HEADER = struct.Struct("<IQ")


def _checksums(tree: Any) -> dict[str, int]:
    """A checksum of every leaf's bits, by path, computed where the leaf lies."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    sums = np.asarray(_sums(list(leaves.values())))
    return dict(zip(leaves, sums.tolist(), strict=True))


@jax.jit
def _sums(leaves):
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(leaf):
    """Sum of all elements' bits, scrambled with their places: a flipped bit always shows.

    The scrambling, a bijection for every place, is the 32-bit finalizer of MurmurHash3.
    """
    if leaf.dtype in (jnp.bool_, jnp.uint4):
        leaf = leaf.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # The place number, axis by axis: flattening would gather a sharded array on every device.
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    x = bits ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
