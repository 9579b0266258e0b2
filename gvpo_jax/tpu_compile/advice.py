"""What to change where a program does not fit, or could be faster."""

from typing import Any

from gvpo_jax.config import Config


def to_fit(config: Config, rows: list[dict[str, Any]], mesh: dict[str, int]) -> list[str]:
    """Settings that lower memory, those that cost least first."""
    c, r, found = config, config.rollout, []
    misfits = {row["name"] for row in rows if not row["fits"]}
    if c.model.dtype == "float32":
        found.append("model.dtype=bfloat16: activations and KV cache take half")
    if misfits & {"train step", "reference scoring"}:
        if c.model.remat == "none":
            found.append("model.remat=layer: layers are computed again instead of kept")
        parts = c.train.batch_size // c.train.micro_batches
        if parts % 2 == 0 and (parts // 2) % (mesh["data"] * mesh["fsdp"]) == 0:
            found.append(
                f"train.micro_batches={2 * c.train.micro_batches}: half as many groups at once"
            )
        elif c.train.completion_parts < r.num_generations:
            found.append(
                f"train.completion_parts={2 * c.train.completion_parts}: half of each group's "
                "completions at once, for one more forward pass"
            )
    if mesh["data"] > 1:
        found.append("mesh.data=1 mesh.fsdp=-1: parameters and moments are cut over all devices")
    if r.lookahead:
        found.append("rollout.lookahead=0: one copy of the parameters less")
    if any(name.startswith("rollout") for name in misfits):
        if r.slots is None:
            found.append("rollout.slots=N: N completions are drawn at a time, and no more are kept")
        if c.train.steps_per_generation > 1:
            found.append(
                "train.steps_per_generation lower: a rollout samples fewer prompts at once"
            )
        if r.cache_dtype != "int8":
            found.append("rollout.cache_dtype=int8: keys and values in half of bfloat16's memory")
        found.append("train.batch_size, or mesh.tensor > 1: less KV cache on a device")
    found.append("rollout.max_completion_length and data.max_prompt_length: shorter")
    found.append("a topology with more chips: parameters, moments and the batch are cut finer")
    return found


def to_speed_up(config: Config, rows: list[dict[str, Any]]) -> list[str]:
    """What a run that fits could do better."""
    slow = [row["name"] for row in rows if row["bound"] in ("ici", "dcn")]
    if "rollout: decode" in slow and config.rollout.tensor is None:
        return [
            "rollout.tensor=N: decoding waits for weights; let each N chips hold a copy to sample "
            "with, the fewest that it fits on"
        ]
    return []
