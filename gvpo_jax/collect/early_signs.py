"""What the data and the first batches show of a set-up in which little can be learnt."""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_jax.data.prompts import EncodedPrompts

FIRST = 3  # batches that are looked at
CHAT_HINT = (
    "completions of chat prompts are lists of messages: "
    "gvpo_jax.rewards.completion_text(completion) gives the text"
)


def data_signs(
    prompts: EncodedPrompts, held_out: EncodedPrompts | None, *, batch: int, evaluates: bool
) -> list[str]:
    """A line for each thing about the rows that users would want to know.

    Args:
        prompts: of the training rows.
        held_out: those of the held-out rows.
        batch: how many of the former make a batch.
        evaluates: whether evaluations during the run are asked for.
    """
    lines, n = [], len(prompts.rows)
    if evaluates and held_out is None:
        lines.append(
            "eval.every asks for evaluations, but there are no held-out rows: give data.eval_path, "
            "eval.sets or data.tasks, and data.eval_size above 0, or in Python eval_dataset; or "
            "set eval.every=0"
        )
    if n < batch:
        lines.append(
            f"there are {n} prompts for batches of {batch}: a batch holds the same ones several "
            "times; give more rows, or a smaller train.batch_size"
        )
    asked = [tuple(ids) for ids in held_out.token_ids] if held_out else []
    trained = set(asked).intersection(map(tuple, prompts.token_ids))
    if held_out and (known := sum(ids in trained for ids in asked)):
        lines.append(
            f"{known} of {len(held_out.rows)} held-out prompts are also trained on: their score "
            "says nothing of new ones"
        )
    return lines


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
