"""Rewards for form, length and repetition, against TRL's."""

import numpy as np
import pytest
from trl.rewards import (
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from gvpo_jax.errors import UserError
from gvpo_jax.rewards import compute_rewards
from gvpo_jax.rewards.shaping import repetition_penalty, soft_overlong_punishment, think_format

TEXTS = [
    "<think>a</think>b",
    "<think>\na\n</think>\nb",
    "<think></think>",
    " <think>a</think>",
    "<think>a<think>b</think>c",
    "<think>a</think><think>b</think>",
    "<think>a",
    "a</think>b",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_form_is_judged_as_by_trl(text):
    assert think_format([""], [text]) == think_format_reward([[{"content": text}]])
    assert think_format([""], [[{"role": "assistant", "content": text}]]) == think_format(
        [""], [text]
    )


def given(rewards, ids):
    """Through the caller, as in a run."""
    some = ["x"] * len(ids)
    return compute_rewards(
        [rewards], prompts=some, completions=some, completion_ids=ids, columns={"solution": some}
    )


@pytest.mark.parametrize(("most", "margin"), [(100, 20), (100, 0), (10, 10)])
def test_long_completions_are_punished_as_by_trl(most, margin):
    ids = [[1] * n for n in (0, 1, 5, 10, 79, 80, 81, 90, 100, 101, 300)]
    ours = given(soft_overlong_punishment(most, margin), ids)
    np.testing.assert_allclose(ours.rewards, get_soft_overlong_punishment(most, margin)(ids))
    assert list(ours.by_func) == ["soft_overlong"]


@pytest.mark.parametrize(("n", "most"), [(1, -1.0), (2, -0.5), (3, -1.0)])
def test_repetitions_are_punished_as_by_trl(n, most):
    rng = np.random.default_rng(0)
    ids = [list(map(int, rng.integers(0, 4, length))) for length in range(12)]
    ours = given(repetition_penalty(n, most), ids)
    np.testing.assert_allclose(ours.rewards, get_repetition_penalty_reward(n, most)(ids))
    assert ours.rewards.min() < 0
    assert list(ours.by_func) == ["repetition"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: repetition_penalty(0),
        lambda: repetition_penalty(3, 1.0),
        lambda: soft_overlong_punishment(10, 11),
        lambda: soft_overlong_punishment(10, -1),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make):
    with pytest.raises(UserError, match="must be"):
        make()
