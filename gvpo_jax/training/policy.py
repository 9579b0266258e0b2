"""The policy on its mesh: sampling, scoring and updating as compiled functions over one state."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gvpo_jax.config import Config
from gvpo_jax.data.batch import Batch, pad_groups
from gvpo_jax.data.groups import UNKNOWN
from gvpo_jax.data.packing_plan import Plan, make_plan
from gvpo_jax.errors import UserError
from gvpo_jax.models import LoadedModel, load_model, stop_token_ids
from gvpo_jax.parallel.distributed import (
    check_rows,
    gather,
    max_over_hosts,
    my_slice,
    raise_together,
    to_devices,
    to_host,
)
from gvpo_jax.parallel.mesh import batch_axes, batch_shardings, group_shards, shardings
from gvpo_jax.rollout import InProcessEngine, Rollout, SamplingParams
from gvpo_jax.rollout.servers.connect import connect, server_engine
from gvpo_jax.rollout.servers.weight_sync import sequence_logps
from gvpo_jax.training.checkpoint import fingerprint
from gvpo_jax.training.programs import constrain, make_programs, mesh_on
from gvpo_jax.training.step import TrainState


class Policy:
    """A model in training and its reference, laid out on a mesh.

    Attributes:
        model: what was loaded, without its parameters: they are in `state`.
        state: parameters, optimizer state, number of updates.
        reference: the parameters that beta pulls towards.
        updates: how many the policy has seen.
        refreshed_at: `updates` when the reference was last refreshed.
        start_fingerprint: a number that tells the start weights from others.
    """

    def __init__(self, config: Config, model: LoadedModel | None = None):
        c = config
        self._config = c
        self.mesh = mesh_on(c)
        self._check_batch()
        fleet = None if c.rollout.engine == "in_process" else raise_together(lambda: connect(c))
        if model is None:
            model = load_model(c.model.name, place=self._place_param)
        self.model = dataclasses.replace(model, params={})
        self._check_lengths()
        self.stop_ids = tuple(dict.fromkeys((*stop_token_ids(model), *c.rollout.stop_token_ids)))
        self._programs = make_programs(c, model.config, self.mesh)
        params = _place_tree(self.mesh, model.params)
        self.state: TrainState = self._programs.init(_copy(params))
        self.reference = self._programs.reference(params)
        self.start_fingerprint = fingerprint(params)
        self._reference_fingerprint = fingerprint(self.reference)
        self.updates = self.refreshed_at = 0
        logps = sequence_logps(self._sequence_logps, multiple=group_shards(self.mesh))
        self._servers = server_engine(c, fleet, self.model, self.stop_ids, logps) if fleet else None
        sampling = self._programs.sampling
        self._engine = self._servers or InProcessEngine(
            sampling.model,
            self.stop_ids,
            slots=c.rollout.slots,
            shards=group_shards(sampling.mesh),
            processes=jax.process_count(),
            place=functools.partial(self._place, mesh=sampling.mesh),
            prepare=sampling.params,
            constrain=functools.partial(constrain, sampling.mesh),
            fetch=to_host,
            agree=max_over_hosts,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        sampling: SamplingParams,
        seed: int,
        longest_prompt: int | None = None,
        params: Any = None,
    ) -> Rollout:
        """k completions of each tokenised prompt; any number of prompts.

        params: of the policy that samples, see `snapshot`; default: the current policy.
        """
        sample = functools.partial(
            self._engine.generate,
            self.state.params if params is None else params,
            num_generations=num_generations,
            max_completion_length=self._config.rollout.max_completion_length,
            sampling=sampling,
            seed=seed,
            longest_prompt=longest_prompt,
        )
        if self._servers:
            return raise_together(lambda: sample(prompts, prompt_ids))
        n = len(prompts)
        missing = -n % self._unit(n, num_generations, self._programs.sampling.mesh)
        rollout = sample(
            [*prompts, *[prompts[0]] * missing], [*prompt_ids, *[prompt_ids[0]] * missing]
        )
        return Rollout(*(x[:n] for x in rollout))

    def sync_metrics(self) -> dict[str, float]:
        """How servers came by the weights that this thread sampled from last, if there are any."""
        sync = self._servers and self._servers.last_sync
        if sync is None:
            return {}
        return {
            "sync/logp_difference/mean": sync.difference,
            "sync/logp_difference/max": sync.largest,
            "sync/write_seconds": sync.write_seconds,
            "sync/load_seconds": sync.load_seconds,
        }

    def close(self) -> None:
        """End what is under way on servers; the policy can still be used."""
        if self._servers:
            self._servers.close()

    def snapshot(self) -> Any:
        """The current parameters, in a copy that updates do not overwrite."""
        return _copy(self.state.params)

    @property
    def reference_fingerprint(self) -> int:
        """Tells the reference, in its dtype, from others; `UNKNOWN` if every update changes it."""
        if self._config.reference.name == "ema":
            return UNKNOWN
        return zlib.crc32(f"{self._reference_fingerprint} {self._config.model.dtype}".encode())

    def with_reference(self, batch: Batch, known: np.ndarray | None = None) -> Batch:
        """The batch with the reference's token log-probs; see `send_to_reference`."""
        return self.send_to_reference(batch, known)()

    def send_to_reference(
        self, batch: Batch, known: np.ndarray | None = None
    ) -> Callable[[], Batch]:
        """Has the reference score a batch, in the update's micro-batches, without waiting for it.

        known: `[g]` booleans, the groups whose `ref_logps` are there already.

        Returns:
            A function that waits, and returns the batch with the reference's token log-probs.
        """
        groups, k = batch.rewards.shape
        missing = np.arange(groups) if known is None else np.flatnonzero(~known)
        size = max(groups // self._config.train.micro_batches, 1)
        # All processes go through as many parts, also one that has fewer to score.
        parts = -(-max_over_hosts(len(missing)) // size)
        if parts == 0:
            return lambda: batch
        wanted = parts * (size + -size % self._unit(size, k))
        some = missing if len(missing) else np.zeros(1, np.int64)
        asked = pad_groups(Batch(*(x[some] for x in batch)), wanted)
        plan = make_plan(asked, parts=parts, shards=self._shards, gather=gather)
        # Few groups may be missing, or many: one program for all of a batch's size.
        whole = make_plan(batch, parts=groups // size, shards=self._shards, gather=gather)
        packed_size = (
            plan.packed_size and whole.packed_size and max(plan.packed_size, whole.packed_size)
        )
        names = ("prompts", "prompt_lengths", "completions", "lengths")
        sent = []
        for rows in plan.rows:
            part = {name: getattr(asked, name)[rows] for name in names}
            placed = self._place(part, k)
            sent.append((rows, self._programs.token_logps(self.reference, placed, packed_size)))

        def received() -> Batch:
            scored = np.empty_like(asked.ref_logps)
            for rows, on_devices in sent:
                scored[rows] = to_host(on_devices)
            ref_logps = np.array(batch.ref_logps)
            ref_logps[missing] = scored[: len(missing)]
            return batch._replace(ref_logps=ref_logps)

        return received

    def pad(self, batch: Batch, groups: int = 0) -> Batch:
        """Filled up with groups that count for nothing: to `groups`, and to divide evenly."""
        parts, (here, k) = self._config.train.micro_batches, batch.rewards.shape
        part = -(-max(here, groups) // parts)
        return pad_groups(batch, parts * (part + -part % self._unit(part, k)))

    def completion_ids(self, text: str) -> list[int]:
        """A completion given as text, as token ids with the end token."""
        ids = list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = self.model.tokenizer.eos_token_id  # a model may name several; this one ends its texts
        return [*ids, *([end] if isinstance(end, int) else self.stop_ids[:1])]

    def plan(self, batch: Batch) -> Plan:
        """How `update` is to compute the batch; all processes ask at once."""
        t = self._config.train
        return make_plan(
            batch,
            parts=t.micro_batches,
            completion_parts=t.completion_parts,
            shards=self._shards,
            gather=gather,
        )

    def update(self, batch: Batch, plan: Plan | None = None) -> dict[str, jax.Array | float]:
        """One update; returns metrics still on the device, so that the caller need not wait.

        plan: of this batch, where it is there; to make one waits for the update before.
        """
        k, plan = batch.rewards.shape[1], plan or self.plan(batch)
        order = plan.rows.T.ravel()  # which `split_groups` deals out into these parts
        placed = self._place({name: x[order] for name, x in batch._asdict().items()}, k)
        self.state, metrics = self._programs.step(self.state, Batch(**placed), plan.packed_size)
        self.updates += 1
        if self._config.reference.name == "ema":
            self.reference = self._programs.blend(
                self.reference, self.state.params, self._config.reference.decay
            )
        return metrics | {"padding": plan.padding}

    def refresh_reference_if_due(self) -> None:
        """Make the current policy the reference, unless the last refresh is too recent."""
        if self.updates - self.refreshed_at >= self._config.reference.refresh_every:
            self.reference = self._programs.reference(self.state.params)
            self._reference_fingerprint = fingerprint(self.reference)
            self.refreshed_at = self.updates

    def checkpoint(self) -> dict[str, Any]:
        """The trees that a checkpoint holds; the initial reference is loaded again, not saved."""
        trees: dict[str, Any] = {"train": self.state}
        if self._config.reference.name != "initial":
            trees["reference"] = self.reference
        return trees

    def checkpoint_like(self) -> dict[str, Any]:
        """Shapes and shardings of `checkpoint()`."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.checkpoint()
        )

    def load_checkpoint(self, trees: dict[str, Any], refreshed_at: int) -> None:
        """Take over what `checkpoint()` gave."""
        self.state = trees["train"]
        self.reference = trees.get("reference", self.reference)
        self._reference_fingerprint = fingerprint(self.reference)
        self.updates, self.refreshed_at = int(self.state.step), refreshed_at

    @property
    def _shards(self) -> int:
        """Rows of packed tokens that this process has; 0: nothing is packed."""
        shards = group_shards(self.mesh) // jax.process_count()
        return shards if self._config.train.packing else 0

    def _sequence_logps(self, params, prompts, lengths, completions) -> np.ndarray:
        """Token log-probs of groups that all processes have; each computes its share."""
        here = my_slice(len(prompts))
        part = {
            "prompts": prompts[here],
            "prompt_lengths": lengths[here],
            "completions": completions[here],
        }
        return gather(to_host(self._programs.token_logps(params, self._place(part, k=1))))

    def _place(self, arrays: dict[str, Any], k: int, mesh: Mesh | None = None) -> dict[str, Any]:
        """This process's rows of a batch's arrays, on devices."""
        groups = len(arrays["prompts"]) * jax.process_count()
        return to_devices(arrays, batch_shardings(mesh or self.mesh, arrays, groups, k))

    def _unit(self, groups: int, k: int, mesh: Mesh | None = None) -> int:
        """What this process's groups must be a multiple of, to lie evenly on the mesh."""
        mesh, processes = mesh or self.mesh, jax.process_count()
        try:
            over_groups, _ = batch_axes(mesh, groups * processes, k)
            check_rows(NamedSharding(mesh, PartitionSpec(over_groups or None)), groups * processes)
            return 1
        except UserError:
            return -(-group_shards(mesh) // processes)

    def _place_param(self, path: str, array: np.ndarray) -> jax.Array:
        return _place_tree(self.mesh, {path: array})[path]

    def _check_batch(self) -> None:
        t, k = self._config.train, self._config.rollout.num_generations
        groups = t.batch_size // t.micro_batches
        try:
            over_groups, _ = batch_axes(self.mesh, groups, k)
            check_rows(NamedSharding(self.mesh, PartitionSpec(over_groups or None)), groups)
        except UserError as error:
            raise UserError(f"train.batch_size / train.micro_batches = {groups}: {error}") from None
        my_slice(t.batch_size - self._config.replay.groups)

    def _check_lengths(self) -> None:
        total = self._config.data.max_prompt_length + self._config.rollout.max_completion_length
        limit = self.model.config.max_position_embeddings
        if total > limit:
            raise UserError(
                f"data.max_prompt_length + rollout.max_completion_length = {total} tokens, but "
                f"{self.model.name} was made for {limit}; lower one of them"
            )


def _place_tree(mesh, tree):
    def place(x, sharding):
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings(mesh, tree))


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)
