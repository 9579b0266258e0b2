"""pass@k, against every choice of k completions."""

import itertools
import json

import pytest

from gvpo_jax.collect.evaluate import _summary, pass_at_k
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.errors import UserError
from gvpo_jax.trainer import Trainer


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n, right):
    marks = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        choices = [any(chosen) for chosen in itertools.combinations(marks, k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_is_a_mean_over_prompts_with_its_interval():
    rights = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    records = [
        {"group": g, "correct": bool(x), "reward": float(x)}
        for g, r in enumerate(rights)
        for x in r
    ]
    metrics = _summary(records, [1, 2, 4])
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/pass@2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["eval/pass@4"] == pytest.approx(2 / 3)
    for k in (1, 2, 4):
        name = f"eval/pass@{k}"
        assert 0 <= metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"] <= 1
    graded = [record | {"reward": 0.5} for record in records]
    for record in graded:
        del record["correct"]
    assert not any("pass@" in name for name in _summary(graded, [1, 2]))


@pytest.mark.parametrize("pass_at", [[0], [1, 5]])
def test_more_than_there_are_is_refused(pass_at):
    with pytest.raises(UserError, match=rf"eval.pass_at has {pass_at[-1]}: give numbers from 1 to"):
        override(Config(), eval__num_generations=4, eval__pass_at=pass_at)


def test_an_evaluation_gives_what_was_asked_for(tmp_path):
    config = override(
        Config(), run__dir=str(tmp_path), eval__num_generations=4, eval__pass_at=[1, 4],
        rollout__max_completion_length=4,
    )  # fmt: skip
    metrics, _ = Trainer(config, trains=False).evaluate(
        [{"prompt": "ab"}, {"prompt": "cd"}], lambda prompt, completion: float("e" in completion)
    )
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/pass@4"] >= metrics["eval/pass@1"]
    json.dumps(metrics)
