"""What the first batches of a run show of a set-up in which little can be learnt."""

from collections.abc import Mapping, Sequence
from typing import Any

FIRST = 3  # batches that are looked at
CHAT_HINT = (
    "completions of chat prompts are lists of messages: "
    "gvpo_jax.rewards.completion_text(completion) gives the text"
)


def early_signs(
    metrics: Sequence[Mapping[str, float]],
    records: Sequence[Mapping[str, Any]],
    max_completion_length: int,
) -> list[str]:
    """A line for each thing that is wrong with all of the first batches, and what to change.

    Args:
        metrics: one for each batch.
        records: of all their completions; none where nothing was sampled.
        max_completion_length: the limit that completions had.
    """
    lines, n = [], len(metrics)
    first = f"the first {n} batches" if n > 1 else "the first batch"
    if all(batch.get("frac_reward_zero_std") == 1 for batch in metrics):
        lines.append(
            f"all rewards within a group were equal in {first}, which "
            "teaches nothing: look at the reward function and at completions/, or take other "
            "prompts, a higher rollout.temperature or more rollout.num_generations"
        )
    if all(batch.get("completions/clipped_ratio") == 1 for batch in metrics):
        lines.append(
            f"all completions of {first} were cut at "
            f"rollout.max_completion_length={max_completion_length} tokens: raise it, or ask for "
            "shorter answers in the prompt"
        )
    chats = [r.get("rewards") or {} for r in records if isinstance(r.get("prompt"), list)]
    for name in chats[0] if chats else ():
        values = {rewards.get(name) for rewards in chats}
        if len(values) == 1:
            got = "nothing" if values == {None} else f"{values.pop():g}"
            lines.append(
                f"reward {name!r} gave {got} for each of the first {len(chats)} completions; "
                f"if it expects texts: {CHAT_HINT}"
            )
    return lines
