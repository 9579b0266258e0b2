"""The policy in training: its state on a mesh, its updates, and its reference."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.data.batch import Batch, pad_groups
from gvpo_jax.data.groups import UNKNOWN, check_logps
from gvpo_jax.data.packing_plan import Plan, make_plan
from gvpo_jax.errors import UserError
from gvpo_jax.models.lora import Lora, adds_nothing, join, merge
from gvpo_jax.parallel.distributed import (
    gather,
    is_first,
    max_over_hosts,
    my_slice,
    to_first_host,
    to_host,
)
from gvpo_jax.parallel.layout import fill_up, group_shards, path_name, place_batch, shapes_on
from gvpo_jax.training.checkpoint import Checkpoints, Restored, fingerprint
from gvpo_jax.training.programs import Programs
from gvpo_jax.training.step import ReferenceConfig, TrainConfig, TrainState


class Policy:
    """State, update and reference of a model in training.

    Args:
        params: the start weights that are trained, on the mesh; taken over.
        programs: what computes.
        frozen: the weights beside them that stay as they are, see `gvpo_jax.models.lora`.
        lora: the form of an adapter, which `params` then is.
        quantization: how kernels of `frozen` are quantised, see `ModelConfig`.
        train: into how many parts an update is cut.
        reference: the policy that beta pulls towards.

    Attributes:
        reference: the parameters that beta pulls towards; `frozen` belongs to them too.
        updates: how many the policy has seen.
        refreshed_at: `updates` when the reference was last refreshed.
        start_fingerprint: a number that tells the start weights from others.
    """

    def __init__(
        self,
        params: Any,
        programs: Programs,
        *,
        train: TrainConfig,
        reference: ReferenceConfig,
        frozen: Any = None,
        lora: Lora | None = None,
        quantization: str = "none",
    ):
        self._programs, self._train, self._options = programs, train, reference
        self.frozen, self._lora, self._quantization = frozen, lora, quantization
        self._frozen_fingerprint = fingerprint(frozen) if lora else 0
        self._start: Any = params  # until the first update needs an optimizer state
        self._state: TrainState | None = None
        self.reference = programs.reference(params)
        self.start_fingerprint = self._fingerprint(params)
        self._reference_fingerprint = self._fingerprint(self.reference)
        self.updates = self.refreshed_at = 0

    @property
    def state(self) -> TrainState:
        """Parameters, optimizer state, number of updates."""
        if self._state is None:
            state = self._programs.init(self.params)
            self._state, self._start = state._replace(step=state.step + self.updates), None
        return self._state

    @property
    def params(self) -> Any:
        """The current parameters; the next update overwrites them."""
        if self._state is not None:
            return self._state.params
        if self._start is None:
            raise UserError("a checkpoint that can't be read took the policy's place: load it anew")
        return self._start

    def snapshot(self) -> Any:
        """The current parameters, in a copy that updates do not overwrite."""
        return copy(self.params)

    def whole(self, params: Any, base: Any = None) -> Any:
        """The model's weights with these parameters, on the first process; an adapter is merged.

        All processes call it. What the others get can't be read.

        base: what it is merged into, as NumPy arrays; default: `frozen`.

        Raises:
            UserError: `frozen` is quantised, and there is no other base.
        """
        if base is None and self._quantization != "none":
            raise UserError(
                "an adapter is not merged into quantised weights, which would lose of both: give "
                "base=, the weights before quantization"
            )
        params, base = to_first_host(params), to_first_host(self.frozen) if base is None else base
        if self._lora is None or not is_first():
            return params
        kernels, adapter = jax.device_get((base, params))
        return join(base, merge(kernels, adapter, self._lora.scale, np.float32))

    def take_programs(self, programs: Programs) -> None:
        """Compute with other programs, of the same model and optimizer, from now on."""
        self._programs = programs

    @property
    def reference_fingerprint(self) -> int:
        """Tells the reference, in its dtype, from others; `UNKNOWN` if every update changes it."""
        if self._options.name == "ema":
            return UNKNOWN
        return zlib.crc32(f"{self._reference_fingerprint} {self._programs.dtype}".encode())

    def with_reference(self, batch: Batch, known: np.ndarray | None = None) -> Batch:
        """The batch with the reference's token log-probs; see `send_to_reference`."""
        return self.send_to_reference(batch, known)()

    def send_to_reference(
        self, batch: Batch, known: np.ndarray | None = None
    ) -> Callable[[], Batch]:
        """Has the reference score a batch, in the update's micro-batches, without waiting for it.

        known: `[g]` booleans, the groups whose `ref_logps` are there already.

        Returns:
            A function that waits, and returns the batch with the reference's token log-probs; it
            raises UserError where they are NaN.
        """
        groups, k = batch.rewards.shape
        mesh = self._programs.mesh
        missing = np.arange(groups) if known is None else np.flatnonzero(~known)
        size = max(groups // self._train.micro_batches, 1)
        # All processes go through as many parts, also one that has fewer to score.
        parts = -(-max_over_hosts(len(missing)) // size)
        if parts == 0:
            return lambda: batch
        some = missing if len(missing) else np.zeros(1, np.int64)
        asked = pad_groups(Batch(*(x[some] for x in batch)), parts * fill_up(mesh, size, k))
        plan = make_plan(asked, parts=parts, shards=self._shards)
        # Few groups may be missing, or many: one program for all of a batch's size.
        whole = make_plan(batch, parts=groups // size, shards=self._shards).packed_size
        packed_size = plan.packed_size and whole and max(plan.packed_size, whole)
        names = ("prompts", "prompt_lengths", "completions", "lengths")
        sent = []
        for rows in plan.rows:
            part = place_batch(mesh, {name: getattr(asked, name)[rows] for name in names}, k)
            logps = self._programs.token_logps(self.reference, part, packed_size, self.frozen)
            sent.append((rows, logps))

        def received() -> Batch:
            scored = np.empty_like(asked.ref_logps)
            for rows, on_devices in sent:
                scored[rows] = to_host(on_devices)
            check_logps(scored, "the reference")
            ref_logps = np.array(batch.ref_logps)
            ref_logps[missing] = scored[: len(missing)]
            return batch._replace(ref_logps=ref_logps)

        return received

    def pad(self, batch: Batch, groups: int = 0) -> Batch:
        """Filled up with groups that count for nothing: to `groups`, and to divide evenly."""
        parts, (here, k) = self._train.micro_batches, batch.rewards.shape
        part = -(-max(here, groups) // parts)
        return pad_groups(batch, parts * fill_up(self._programs.mesh, part, k))

    def plan(self, batch: Batch) -> Plan:
        """How `update` is to compute the batch; all processes ask at once."""
        t = self._train
        return make_plan(
            batch, parts=t.micro_batches, completion_parts=t.completion_parts, shards=self._shards
        )

    def update(self, batch: Batch, plan: Plan | None = None) -> dict[str, jax.Array | float]:
        """One update; returns metrics still on the device, so that the caller need not wait.

        plan: of this batch, where it is there; to make one waits for the update before.
        """
        plan = plan or self.plan(batch)
        order = plan.rows.T.ravel()  # which `train_step` deals out into these parts
        arrays = {name: x[order] for name, x in batch._asdict().items()}
        placed = Batch(**place_batch(self._programs.mesh, arrays, batch.rewards.shape[1]))
        self._state, metrics = self._programs.step(
            self.state, placed, frozen=self.frozen, packed_size=plan.packed_size
        )
        self.updates += 1
        if self._options.name == "ema":
            share = 1 - self._options.decay
            self.reference = self._programs.blend(self.params, self.reference, share)
        return metrics | {"padding": plan.padding}

    def refresh_reference_if_due(self) -> None:
        """With `previous`: make the policy the reference, unless the last refresh is too recent."""
        due = self.updates - self.refreshed_at >= self._options.refresh_every
        if self._options.name == "previous" and due:
            self.reference = self._programs.reference(self.params)
            self._reference_fingerprint = self._fingerprint(self.reference)
            self.refreshed_at = self.updates

    def logps_of_all(self, params, prompts, lengths, completions) -> np.ndarray:
        """Token log-probs of groups that all processes have; each computes its part."""
        here = my_slice(len(prompts))
        arrays = {"prompts": prompts, "prompt_lengths": lengths, "completions": completions}
        part = {name: x[here] for name, x in arrays.items()}
        placed = place_batch(self._programs.mesh, part, k=1)
        return gather(to_host(self._programs.token_logps(params, placed, frozen=self.frozen)))

    def save(
        self,
        checkpoints: Checkpoints,
        step: int,
        extra: dict[str, Any],
        samples: dict[str, np.ndarray],
        score: float,
    ) -> None:
        """Saves the policy as of now; the initial reference is loaded again, not saved.

        JSON values, `extra`, and this process's arrays, `samples`, are saved along; for `score` see
        `Checkpoints.save`.
        """
        kept = ("updates", "refreshed_at", "start_fingerprint")
        own = {name: getattr(self, name) for name in kept}
        own["optimizer_state"] = _names(self.state.opt_state)
        if self._lora:
            own |= {"lora": self._form(), "quantization": self._quantization}
        trees = {"params": self.params, "state": self.state.rest()}
        if self._options.name != "initial":
            trees["reference"] = self.reference
        checkpoints.save(step, trees, extra | own, samples, score=score)

    def load(
        self, checkpoints: Checkpoints, *, params_only: bool = False, step: int | None = None
    ) -> Restored | None:
        """Takes over the newest whole checkpoint, if there is one, in place of what it held.

        params_only: what updates need beside the parameters is left on disk.
        step: that of the checkpoint to take.

        Raises:
            UserError: none of those there is whole, or it is of other start weights or of another
                adapter.
        """
        if not checkpoints.steps():
            return None
        mesh, trees = self._programs.mesh, {"params": self.params}
        trees["state"] = jax.eval_shape(self._programs.init, self.params).rest()
        if self._options.name != "initial":
            trees["reference"] = self.reference
        shapes = {name: shapes_on(mesh, tree) for name, tree in trees.items()}
        if about := checkpoints.about():
            self._check_start(about)
            names = _names(trees["state"]["opt_state"])  # earlier versions saved none
            if not params_only and about.get("optimizer_state", names) != names:
                raise UserError(
                    "the checkpoint's optimizer is another: give the one that this run began with, "
                    "or choose another run.dir"
                )
        del trees
        self._start = self._state = None  # not held beside what takes their place
        without = ("state",) if params_only else ()
        restored = checkpoints.restore(shapes, without=without, step=step)
        params, about = restored.trees["params"], restored.extra
        if params_only:
            self._start = params
        else:
            self._state = TrainState(params, **restored.trees["state"])
        self.reference = restored.trees.get("reference", self.reference)
        self._reference_fingerprint = self._fingerprint(self.reference)
        self.updates = about["updates"]
        self.refreshed_at = about["refreshed_at"]
        return restored

    def _check_start(self, about: dict[str, Any]) -> None:
        """That a checkpoint, of which these are the values, began as this policy did."""
        if (there := about.get("lora")) != self._form():
            form = ", ".join(f"model.lora.{name}={value}" for name, value in (there or {}).items())
            form = form or "model.lora.rank=null"
            raise UserError(
                f"the checkpoint is of a run with {form}: give that, or choose another run.dir"
            )
        if (kind := about.get("quantization", "none")) != self._quantization:
            raise UserError(
                f"the checkpoint is of a run with model.quantization={kind}: give that, or choose "
                "another run.dir"
            )
        if about["start_fingerprint"] != self.start_fingerprint:
            which = "model.name, or model.adapter," if there else "model.name"
            raise UserError(
                f"{which} is not the model that this run started from; bring it back, or choose "
                "another run.dir"
            )

    def _form(self) -> dict[str, Any] | None:
        """The adapter's, as JSON gives it back."""
        lora = self._lora
        return lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}

    def _fingerprint(self, params: Any) -> int:
        """Tells parameters from others, those with an adapter that adds nothing from other bases.

        Where they are kept in the same dtype, that of the base alone is the same.
        """
        if self._lora is None:
            return fingerprint(params)
        if adds_nothing(params):
            return self._frozen_fingerprint
        both = self._frozen_fingerprint, fingerprint(params), self._lora.scale
        return zlib.crc32(str(both).encode())

    @property
    def _shards(self) -> int:
        """Rows of packed tokens that this process has; 0: nothing is packed."""
        shards = group_shards(self._programs.mesh) // jax.process_count()
        return shards if self._train.packing else 0


@jax.jit
def copy(tree):
    """Arrays in memory of their own."""
    return jax.tree.map(jnp.copy, tree)


def _names(opt_state: Any) -> int:
    """A number that tells what an optimizer keeps, by its names, from what others keep."""
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(opt_state)]
    return zlib.crc32("\n".join(names).encode())
