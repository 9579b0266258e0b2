"""pass@k against every choice of k completions, maj@k against all votes, checkers."""

import itertools
import json

import pytest

from gvpo_jax.collect.evaluate import EvalConfig, _summary, majority, pass_at_k
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
    metrics = _summary(records, EvalConfig(pass_at=[1, 2, 4]))
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/pass@2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["eval/pass@4"] == pytest.approx(2 / 3)
    for k in (1, 2, 4):
        name = f"eval/pass@{k}"
        assert 0 <= metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"] <= 1
    graded = [record | {"reward": 0.5} for record in records]
    for record in graded:
        del record["correct"]
    assert not any("pass@" in name for name in _summary(graded, EvalConfig(pass_at=[1, 2])))


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


@pytest.mark.parametrize(
    ("answers", "right", "chance"),
    [
        (["4", "4", "5"], [True, True, False], 1),
        (["4", "5", "5"], [True, False, False], 0),
        (["4", "5", "4", "5"], [True, False, True, False], 0.5),
        (["4", None, None, None], [True, False, False, False], 1),
        ([None, None], [False, True], 0),
        (["4", "4"], [True, False], 0.5),
        (["1", "2", "3"], [True, False, False], 1 / 3),
    ],
)
def test_majority_is_the_chance_of_a_winner_of_the_vote(answers, right, chance):
    """Against drawing a winner by hand: each answer with the most votes is as likely."""
    assert majority(answers, right) == pytest.approx(chance)
    given = [a for a in answers if a is not None]
    winners = [a for a in set(given) if given.count(a) == max(map(given.count, given))]
    of = {a: [ok for x, ok in zip(answers, right, strict=True) if x == a] for a in winners}
    drawn = [sum(of[a]) / len(of[a]) for a in winners]
    assert majority(answers, right) == pytest.approx(sum(drawn) / len(drawn) if drawn else 0)


def test_the_last_match_of_the_pattern_votes():
    texts = [
        ["1 or #### 7 ", "#### 7", "#### 8"],
        ["#### 1 #### 2", "#### 1", "#### 1"],
    ]
    rights = [[1, 1, 0], [1, 0, 0]]
    records = [
        {"group": g, "correct": bool(ok), "reward": float(ok), "completion": text}
        for g, (row, marks) in enumerate(zip(texts, rights, strict=True))
        for text, ok in zip(row, marks, strict=True)
    ]
    options = EvalConfig(num_generations=3, answer_pattern="#### *([^#]+)")
    metrics = _summary(records, options)
    assert metrics["eval/maj@3"] == pytest.approx((1 + 0) / 2)
    assert metrics["eval/maj@3_low"] <= 0.5 <= metrics["eval/maj@3_high"]
    whole = _summary(records, EvalConfig(num_generations=3, answer_pattern="[0-9]"))
    assert whole["eval/maj@3"] == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"eval.answer_pattern=\( is no regular expression"):
        override(Config(), eval__answer_pattern="(")


CHECKER = """
def short(prompt, completion, limit):
    return float(len(completion) <= limit)


def greedy(completions, **columns):
    return [1.0] * len(completions)
"""


def test_a_checker_says_what_is_right_in_place_of_the_reward(tmp_path):
    """A reward that is tricked: 1 for all; the checker knows better, and has its columns."""
    file = tmp_path / "own.py"
    file.write_text(CHECKER)
    config = override(
        Config(), run__dir=str(tmp_path / "run"), eval__checker=f"{file}:short",
        rollout__max_completion_length=6, eval__num_generations=4,
    )  # fmt: skip
    rows = [{"prompt": "ab", "limit": 0}, {"prompt": "cd", "limit": 99}]
    trainer = Trainer(config, trains=False)
    metrics, records = trainer.evaluate(rows, f"{file}:greedy")
    assert metrics["eval/reward"] == 1
    right = [len(r["completion"]) <= r["limit"] for r in records]
    assert [r["correct"] for r in records] == right
    assert metrics["eval/accuracy"] == pytest.approx(sum(right) / 8)
    assert 0.5 <= metrics["eval/accuracy"] < 1
    with pytest.raises(UserError, match="needs limit, which the held-out data does not have"):
        trainer.evaluate([{"prompt": "ab"}], f"{file}:greedy")


@pytest.mark.parametrize(
    ("settings", "reward", "told"),
    [
        ({"eval__pass_at": [2]}, 0.5, "eval.pass_at need right and wrong answers, and rewards are"),
        ({"eval__answer_pattern": "zzz"}, 1.0, "answer_pattern=zzz matches none of 8 completions"),
        ({"eval__pass_at": [2]}, 1.0, ""),
    ],
)
def test_what_says_nothing_is_warned_of(tmp_path, capfd, settings, reward, told):
    config = override(
        Config(), run__dir=str(tmp_path), rollout__max_completion_length=4, **settings
    )  # fmt: skip
    rows = [{"prompt": "ab"}, {"prompt": "cd"}]
    Trainer(config, trains=False).evaluate(rows, lambda prompt, completion: reward)
    err = capfd.readouterr().err
    assert told in err
    assert ("warning" in err) == bool(told)


GRADED = """
def graded(prompt, completion):
    return 0.5


def enough(prompt, completion):
    return 1.5


def broken(prompt, completion):
    raise KeyError("x")


def strict(completions):
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("name", "least", "told"),
    [
        ("graded", None, "eval.checker gives values up to 0.5, and only 1 counts as right"),
        ("graded", 0.5, ""),
        ("enough", None, ""),
    ],
)
def test_a_checker_of_grades_that_are_never_right_is_warned_of(tmp_path, capfd, name, least, told):
    file = tmp_path / "own.py"
    file.write_text(GRADED)
    config = override(
        Config(), run__dir=str(tmp_path), rollout__max_completion_length=4,
        eval__checker=f"{file}:{name}", eval__success_reward=least,
    )  # fmt: skip
    metrics, _ = Trainer(config, trains=False).evaluate(
        [{"prompt": "ab"}], lambda prompt, completion: 1.0
    )
    assert metrics["eval/accuracy"] == float(not told)
    err = capfd.readouterr().err
    assert told in err
    assert err.count("warning") == bool(told)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "^checker 'broken' failed on row 1: KeyError"),
        ("strict", "^checker 'strict' does not take prompts, .*: add [*][*]kwargs to its"),
    ],
)
def test_a_wrong_checker_is_called_a_checker(tmp_path, name, told):
    file = tmp_path / "own.py"
    file.write_text(GRADED)
    config = override(
        Config(), run__dir=str(tmp_path), rollout__max_completion_length=4,
        eval__checker=f"{file}:{name}",
    )  # fmt: skip
    with pytest.raises(UserError, match=told):
        Trainer(config, trains=False).evaluate([{"prompt": "ab"}], lambda prompt, completion: 1.0)
