"""Supervised fine-tuning on texts that rows bring along: alone, or as a warm start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gvpo_jax.collect.offline import OfflineGroups
from gvpo_jax.data.groups import Source, length_problem, make_group, with_reference
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.errors import UserError
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class SftConfig:
    """A warm start: supervised fine-tuning before the run, whose reference is then its result."""

    steps: int | None = setting(None, "Its updates; or ...", least=1)
    epochs: float | None = setting(
        None, "... its passes over the rows; null and null: there is no warm start.", above=0
    )
    column: str = setting(
        "solution", "With the text to learn; of a list of texts each. For loss.name=sft too."
    )
    learning_rate: float = setting(1e-5, "The highest one of the warm start.", least=0)
    batch_size: int | None = setting(None, "Rows per update; null: train.batch_size.", least=1)

    @property
    def on(self) -> bool:
        """Whether there is a warm start."""
        return self.steps is not None or self.epochs is not None


def read_solutions(
    prompts: EncodedPrompts,
    encode: Callable[[str], list[int]],
    column: str,
    max_completion_length: int,
    *,
    reference: int,
    bad_samples: Literal["error", "skip"],
) -> OfflineGroups:
    """Every text of the rows' column as a group of one completion, whose reward does not count.

    Args:
        prompts: with their rows.
        encode: a text -> token ids, end token included.
        column: a text or a list of texts.
        max_completion_length: tokens.
        reference: fingerprint of the run's; it scores none of them, as the loss does not ask.
        bad_samples: what becomes of a text that is empty or too long: `skip` counts it.

    Raises:
        UserError: naming the row, for these; where it has no text; where none is left.
    """
    groups, skipped = [], 0
    for place, (row, prompt) in enumerate(zip(prompts.rows, prompts.token_ids, strict=True)):
        name, given = getattr(row, "place", f"row {place + 1}"), row.get(column)
        texts = [given] if isinstance(given, str) else given
        if not (isinstance(texts, list) and texts and all(isinstance(x, str) for x in texts)):
            there = f"it is {str(given)[:40]!r}" if column in row else f"there are {', '.join(row)}"
            raise UserError(
                f"{name}: sft needs a text, or a list of texts, in the column {column!r}, and "
                f"{there}; sft.column names another"
            )
        for text in texts:
            try:
                ids = encode(text)
                problem = length_problem(ids, max_completion_length)
            except UserError as error:
                problem = str(error)
            if problem is None:
                group = make_group(prompt, [ids], [0.0], source=Source.DEMONSTRATION, row=place)
                groups.append(with_reference(group, group.ref_logps, reference))
            elif bad_samples == "error":
                raise UserError(
                    f"{name}, {column}: {problem}; data.bad_samples=skip leaves out what can't be "
                    "used"
                )
            else:
                skipped += 1
    if not groups:
        raise UserError(f"no row has a text in the column {column!r} that can be used")
    return OfflineGroups(groups, skipped, 0)
