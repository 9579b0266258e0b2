"""Calling, adding up and bounding reward functions."""

import ast
import asyncio
import decimal
import functools
import importlib
import importlib.util
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.rewards import RewardError, batched, compute_rewards, load_reward_func, per_sample
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rewards.functions import code_fingerprint
from gvpo_jax.rewards.math import math_verify
from gvpo_jax.rewards.numbers import exact_number
from gvpo_jax.rewards.reasoning_gym import (
    RUNS_ANSWERS,
    reasoning_gym_reward,
    reasoning_gym_score,
)
from gvpo_jax.rewards.workers import WorkerPool, run_each

NAN = math.nan


def run(funcs, weights=None, *, n=3, on_error: Any = "raise", **columns):
    """compute_rewards() over n completions "0", "1", ... of one prompt."""
    return compute_rewards(
        funcs,
        weights,
        prompts=["p"] * n,
        completions=[str(i) for i in range(n)],
        completion_ids=[[i] for i in range(n)],
        columns=columns,
        on_error=on_error,
    )


def gives(*values):
    def constant(**_):
        return list(values)

    return constant


# The call and the sum


def test_the_call_is_trls():
    calls = []

    def reward(prompts, completions, completion_ids, **kwargs):
        calls.append((prompts, completions, completion_ids, kwargs))
        return [0.0] * len(completions)

    messages = [[{"role": "assistant", "content": text}] for text in "ab"]
    compute_rewards(
        [reward],
        prompts=["p", "q"],
        completions=messages,
        completion_ids=[[1], [2, 3]],
        columns={"solution": [7, 8], "task": ["s", "t"]},
    )
    columns = {"solution": [7, 8], "task": ["s", "t"]}
    assert calls == [(["p", "q"], messages, [[1], [2, 3]], columns)]


def test_rewards_are_the_weighted_sum_and_are_kept_by_function():
    def first(**_):
        return [1, 0, True]

    def second(**_):
        return np.asarray([0.5, -1.0, 2.0], np.float32)

    scores = run([first, second], [2.0, 0.5])
    np.testing.assert_array_equal(scores.rewards, [2.25, -0.5, 3.0])
    assert scores.rewards.dtype == np.float64
    np.testing.assert_array_equal(scores.by_func["first"], [1, 0, 1])
    np.testing.assert_array_equal(scores.by_func["second"], [0.5, -1, 2])
    assert (scores.abstained, scores.failed) == (0, 0)
    np.testing.assert_array_equal(run([first, second]).rewards, [1.5, -1, 3])


def test_functions_of_one_name_are_told_apart():
    scores = run([gives(1), functools.partial(gives(2)), gives(3)], n=1)
    assert {name: x.tolist() for name, x in scores.by_func.items()} == {
        "constant": [1],
        "constant#2": [2],
        "constant#3": [3],
    }


def test_abstaining_leaves_the_row_to_the_others():
    scores = run([gives(None, 1, None), gives(5, 5, None)], [3.0, 1.0])
    np.testing.assert_array_equal(scores.rewards, [5, 8, NAN])
    np.testing.assert_array_equal(scores.by_func["constant"], [NAN, 1, NAN])
    assert (scores.abstained, scores.failed) == (1, 0)


@pytest.mark.parametrize("weights", [[1.0], [1.0, NAN], [1.0, 2.0, 3.0]])
def test_weights_must_fit_the_functions(weights):
    with pytest.raises(UserError, match="a finite weight per reward function: 2"):
        run([gives(1), gives(2)], weights, n=1)


def test_arguments_must_fit_each_other():
    with pytest.raises(ValueError, match=r"unequal length.*'solution': 2"):
        run([gives(1, 2, 3)], solution=[1, 2])
    with pytest.raises(UserError, match=r"column 'completions'.*rename"):
        run([gives(1, 2, 3)], completions=[1, 2, 3])
    with pytest.raises(UserError, match="no reward function"):
        run([])


# Async functions


def test_async_functions_run_at_the_same_time_and_keep_their_places():
    started = []

    async def meet(name, value):
        started.append(name)
        for _ in range(500):  # each waits until it has seen the other start
            if len(started) == 2:
                return [value]
            await asyncio.sleep(0.01)
        raise TimeoutError("ran alone")

    async def left(**_):
        return await meet("left", 1.0)

    class Right:
        async def __call__(self, **_):
            return await meet("right", 2.0)

    scores = run([left, gives(10), Right()], n=1)
    assert [x.item() for x in scores.by_func.values()] == [1, 10, 2]
    assert scores.rewards.tolist() == [13]


def test_score_works_inside_a_running_event_loop():
    async def reward(**_):
        return [4.0]

    async def notebook():
        return run([reward], n=1)

    assert asyncio.run(notebook()).rewards.tolist() == [4]


def test_async_failure_is_a_failure():
    async def broken(**_):
        raise KeyError("oops")

    with pytest.raises(RewardError, match=r"'broken'.*KeyError.*oops"):
        run([broken])
    assert run([broken], on_error="skip").failed == 3


def test_what_is_bound_to_an_event_loop_works_on_every_call():
    class Client:  # as those of aiohttp and openai
        loop = None

        async def ask(self, text):
            self.loop = self.loop or asyncio.get_running_loop()
            reply = self.loop.create_future()
            self.loop.call_later(0.001, reply.set_result, float(text))
            return await reply

    client, limit = Client(), asyncio.Semaphore(1)

    async def judge(completions, **_):
        async def one(text):
            async with limit:
                return await client.ask(text)

        return await asyncio.gather(*map(one, completions))

    async def asks(prompt, completion):
        return await client.ask(completion)

    for _ in range(3):
        assert run([judge, batched(asks)]).rewards.tolist() == [0, 2, 4]


async def one_async(prompt, completion, answer):
    return float(completion == answer)


class AsyncJudge:
    async def __call__(self, prompt, completion, answer):
        return await one_async(prompt, completion, answer)


@pytest.mark.parametrize(
    "func",
    [
        one_async,
        AsyncJudge(),
        functools.partial(one_async),
        lambda prompt, completion, answer: one_async(prompt, completion, answer),
        lambda completions, answer, **_: [
            one_async("", *pair) for pair in zip(completions, answer, strict=True)
        ],
    ],
    ids=["function", "object", "partial", "not async itself", "list"],
)
def test_what_is_to_be_awaited_is(func):
    scores = run([batched(func)], answer=["1", "1", "2"])
    assert scores.rewards.tolist() == [0, 1, 1]


def test_an_async_function_of_one_sample_is_an_async_reward_function():
    rewards = asyncio.run(batched(one_async)(["p"] * 2, ["1", "2"], answer=["1", "1"]))
    assert rewards == [1, 0]


def test_an_async_reward_may_ask_others():
    async def both(**_):
        return run([batched(one_async), gives(1, 1, 1)], answer=["1"] * 3).rewards

    assert run([both]).rewards.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    "error", [SystemExit("bye"), asyncio.CancelledError("bye"), GeneratorExit("bye")]
)
def test_a_reward_that_leaves_fails_its_rows(error):
    async def leaves(prompt, completion):
        if completion == "1":
            raise error
        return 1.0

    async def leaves_in_a_task(completions, **_):
        return await asyncio.gather(*(leaves("", text) for text in completions))

    def plainly(prompt, completion):
        if completion == "1":
            raise error
        return 1.0

    for func in (leaves, plainly):
        with pytest.raises(RewardError, match=f"failed on row 1: .*{type(error).__name__}: bye"):
            run([batched(func)])
        assert np.isnan(run([batched(func)], on_error="skip").rewards).tolist() == [
            False,
            True,
            False,
        ]
    with pytest.raises(RewardError, match="'leaves_in_a_task' failed on the call with rows 0 to 2"):
        run([leaves_in_a_task])
    assert run([batched(one_async)], answer=["1"] * 3).rewards.tolist() == [0, 1, 0]  # it goes on


# Own copies


def test_a_function_changes_what_it_is_handed_for_itself_alone():
    chat, notes, ids = [{"role": "user", "content": "hi"}], [["a"]] * 3, [[1], [2], [3]]
    answers = [[{"role": "assistant", "content": text}] for text in "abc"]
    seen = []

    def spoils(prompts, completions, completion_ids, notes):
        for prompt, completion, tokens, note in zip(
            prompts, completions, completion_ids, notes, strict=True
        ):
            prompt.append(completion.pop())
            prompt[0]["content"] = ""
            tokens.clear()
            note.append("b")
            seen.append((len(prompt), len(note)))
        completions.clear()
        return [0.0, 0.0, 0.0]

    async def also(prompt, completion, notes):
        return spoils([prompt], [completion], [[]], [notes])[0]

    def counts(prompt, completion, completion_ids, notes):
        return 100.0 * len(prompt) + 10 * len(completion) + len(completion_ids) + len(notes)

    scores = compute_rewards(
        [spoils, batched(also), batched(counts)],
        prompts=[chat] * 3,  # one object, as a group's are
        completions=answers,
        completion_ids=ids,
        columns={"notes": notes},
    )
    assert scores.rewards.tolist() == [112, 112, 112]
    assert seen == [(2, 2)] * 6
    assert chat == [{"role": "user", "content": "hi"}]
    assert (notes, ids) == ([["a"]] * 3, [[1], [2], [3]])
    assert [answer[0]["content"] for answer in answers] == ["a", "b", "c"]


def test_what_can_not_be_copied_is_handed_over_as_it_is():
    lock = threading.Lock()

    def same(door, **_):
        return [entry is lock for entry in door]

    assert run([same], door=[lock] * 3).rewards.tolist() == [1, 1, 1]


# Failures


@pytest.mark.parametrize("answer", [[1.0, 2.0], [1.0] * 4, None, 3.0, "abc", iter([1, 2, 3])])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_wrong_length_always_raises(answer, on_error):
    def short(**_):
        return answer

    with pytest.raises(RewardError, match=r"'short' must return a list with one entry per.* 3"):
        run([short], on_error=on_error)


def test_exception_names_function_and_row():
    def picky(prompt, completion):
        if completion == "1":
            raise KeyError("no such thing")
        return 1.0

    with pytest.raises(RewardError, match=r"'picky' failed on row 1: KeyError.*no such thing"):
        run([per_sample(picky)])
    scores = run([per_sample(picky), gives(5, 5, 5)], on_error="skip")
    np.testing.assert_array_equal(scores.rewards, [6, NAN, 6])  # not 5: that sum lacks a term
    np.testing.assert_array_equal(scores.by_func["picky"], [1, NAN, 1])
    assert (scores.abstained, scores.failed) == (0, 1)


def test_exception_out_of_the_call_fails_all_rows():
    def broken(**_):
        return 1 / 0

    with pytest.raises(RewardError, match=r"'broken' failed on.*rows 0 to 2.*ZeroDivisionError"):
        run([broken])
    scores = run([broken, gives(1, 1, 1)], on_error="skip")
    assert np.isnan(scores.rewards).all()
    assert (scores.abstained, scores.failed) == (0, 3)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_function_with_other_parameters_is_told_which_it_may_have(on_error):
    def other(completions, answer):
        return 0.0

    with pytest.raises(
        UserError, match=r"'other' does not take prompts, completion_ids: add [*][*]kwargs"
    ):
        run([gives(1, 1, 1), other], on_error=on_error)


def test_a_wrapped_function_is_judged_by_what_is_called():
    def of_texts(func):
        @functools.wraps(func)
        def reward(prompts, completions, **columns):
            return [func(text) for text in completions]

        return reward

    @of_texts
    def one(text):
        return 1.0

    assert run([one]).rewards.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "func",
    [
        lambda prompt, completion, **columns: float(columns["answer"] == completion),
        lambda prompt, completion, **columns: float(
            sorted(columns) == ["answer", "completion_ids"]
        ),
        lambda prompts, completions, **columns: [float(len(columns) == 2)] * 3,
    ],
)
def test_a_function_that_takes_any_column_gets_all(func):
    assert run([batched(func)], answer=["0", "1", "2"]).rewards.tolist() == [1, 1, 1]


@functools.lru_cache
def cached(prompt, completion):
    return float(completion)


@functools.wraps(cached)
def wrapped(*args, **kwargs):
    return cached(*args, **kwargs)


def with_default(prompt, completion, scale=1.0):
    return scale * float(completion)


def with_column(prompt, completion, answer):
    return float(completion == answer)


@pytest.mark.parametrize(
    ("func", "expected"),
    [
        (cached, [0, 1, 2]),
        (wrapped, [0, 1, 2]),
        (with_default, [0, 1, 2]),
        (functools.partial(with_default, scale=2.0), [0, 2, 4]),
        (with_column, [0, 1, 0]),
    ],
)
def test_a_function_of_one_sample_may_have_more_to_it(func, expected):
    assert run([batched(func)], answer=["1", "1", "1"]).rewards.tolist() == expected


def test_a_row_without_a_column_keeps_the_default():
    def with_default(prompt, completion, answer="1"):
        return float(completion == answer)

    def required(prompt, completion, answer):
        return float(completion == answer)

    lists = {"answer": ["1", None, "x"]}
    for func, expected in ((with_default, [1, 1, 0]), (required, [1, 0, 0])):
        rewards = compute_rewards(
            [batched(func)], prompts=["p"] * 3, completions=["1"] * 3, completion_ids=[[1]] * 3,
            columns=lists,
        ).rewards  # fmt: skip
        assert rewards.tolist() == expected


def test_a_class_and_several_names_in_one_text_are_told_from_a_function(tmp_path):
    class Judge:
        def __call__(self, prompts, completions, **_):
            return [1.0] * len(prompts)

    with pytest.raises(UserError, match=r"'Judge' is a class: give an object of it, Judge\(\)"):
        run([Judge])
    assert run([Judge()]).rewards.tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"in brackets: rewards\.funcs=\[a\.py:f, b\.py:g\]"):
        load_reward_func("a.py:f, b.py:g")
    (tmp_path / "objects.py").write_text(
        "class Judge:\n    def __call__(self): pass\n\njudge = Judge()\n\ndef f(): pass\n"
    )
    with pytest.raises(UserError, match=r"no function 'nope' there; functions: judge, f$"):
        load_reward_func(f"{tmp_path / 'objects.py'}:nope")


def test_a_function_that_forks_leaves_no_second_program(tmp_path):
    """In a program of its own: the child must not come back from the call."""
    code = (
        "import os\n"
        "from gvpo_jax.rewards import compute_rewards\n"
        "def forks(prompts, completions, **_):\n"
        "    os.fork()\n"
        "    return [1.0] * len(prompts)\n"
        "lists = {'prompts': ['a'], 'completions': ['b'], 'completion_ids': [[1]]}\n"
        "print(compute_rewards([forks], columns={}, **lists).rewards, flush=True)\n"
        "try:\n"
        "    os.wait()\n"
        "except ChildProcessError:\n"
        "    print('child')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1.]\n"


def test_a_function_that_ends_the_program_fails_its_row():
    def leaves(prompt, completion):
        raise SystemExit("bye")

    with pytest.raises(RewardError, match=r"'leaves' failed on row 0: .*SystemExit: bye"):
        run([batched(leaves)])


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_column_that_is_not_there_is_named(on_error):
    def picky(completions, answer, level=1, **_):
        return [1.0] * len(completions)

    def one(prompt, completion, *, answer):
        return 1.0

    for func in (picky, batched(one)):
        with pytest.raises(UserError, match=r"needs answer, .* the columns are topic\n"):
            run([func], on_error=on_error, topic=[1, 2, 3])
        assert run([func], answer=[1, 2, 3]).rewards.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "bad",
    [NAN, math.inf, -math.inf, np.float32("nan"), pytest.param(10**400, id="huge"), "1", [1]],
)
def test_values_that_are_no_finite_number_raise_or_are_skipped(bad):
    with pytest.raises(RewardError, match="'constant' failed on row 1: it gave"):
        run([gives(1, bad, None)])
    scores = run([gives(1, bad, None)], on_error="skip")
    np.testing.assert_array_equal(scores.rewards, [1, NAN, NAN])
    assert (scores.abstained, scores.failed) == (1, 1)


def arrays():
    import jax.numpy as jnp
    import torch

    values = [1.0, 0.0, 0.5]
    yield from (np.array(values), jnp.array(values), torch.tensor(values, requires_grad=True))
    yield from (
        np.array(values)[:, None],
        jnp.array(values)[:, None],
        torch.tensor(values)[:, None],
    )
    yield from (torch.tensor(values, dtype=torch.bfloat16), np.array(values, object), tuple(values))
    for make in (np.array, jnp.array, torch.tensor):
        yield [make(value) for value in values]
        yield [make([value]) for value in values]
    yield [True, np.bool_(False), decimal.Decimal("0.5")]


def test_arrays_of_any_library_are_rewards():
    for answer in arrays():
        assert run([lambda answer=answer, **_: answer]).rewards.tolist() == [1, 0, 0.5], answer


@pytest.mark.parametrize("answer", [np.array(1.0), {1.0}, b"a", {0: 1.0}])
def test_what_has_no_entry_for_each_row_is_no_answer(answer):
    with pytest.raises(RewardError, match="must return a list with one entry per completion, 1"):
        run([lambda **_: answer], n=1)


def test_a_reward_that_float32_can_not_hold_fails_its_row():
    huge = gives(1e39, 1.0, -3e38)
    with pytest.raises(RewardError, match=r"failed on row 0: it gave 1e\+39, which float32 can't"):
        run([huge])
    scores = run([huge], on_error="skip")
    np.testing.assert_array_equal(scores.rewards, [NAN, 1, -3e38])
    assert (scores.failed, scores.problem.count("row 0")) == (1, 1)


@pytest.mark.parametrize("weights", [[2.0, 1.0], [1e308, 1e308], [1e308, -1e308]])
def test_a_sum_that_float32_can_not_hold_fails_its_row(weights):
    funcs = [gives(0.0, 3e38, None), gives(0.0, 3e38, 0.0)]
    with pytest.raises(RewardError, match=r"the weighted sum of the rewards on row 1 is .*float32"):
        run(funcs, weights)
    scores = run(funcs, weights, on_error="skip")
    np.testing.assert_array_equal(scores.rewards, [0, NAN, 0])
    assert scores.failed == 1


def test_a_time_limit_by_signal_in_another_thread_is_told_why():
    def limited(prompt, completion):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return 1.0

    with ThreadPoolExecutor(1) as thread, pytest.raises(RewardError, match=r"lookahead.*run_each"):
        thread.submit(run, [batched(limited)]).result()


# Finding functions


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


REWARD = """
from __future__ import annotations
from dataclasses import dataclass
{imports}

@dataclass
class Verdict:
    points: float = {points}

def reward(completions, **_):
    return [Verdict().points] * len(completions)
"""


def in_a_new_process(func):
    """What a reward function gives for one completion in a process that has our sys.path."""
    code = "import sys, pickle; sys.path[:] = eval(sys.argv[1])\n"
    code += "print(pickle.loads(bytes.fromhex(sys.argv[2]))(completions=['']))"
    arguments = [repr(sys.path), pickle.dumps(func).hex()]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return ast.literal_eval(done.stdout)


def test_a_reward_file_is_a_module_that_other_processes_import(tmp_path):
    files = {
        "a/judging_here.py": 1.0,
        "b/judging_here.py": 2.0,  # of the same name
        "a/statistics.py": 3.0,  # called as a module of Python
        "a/v1.2-final.py": 4.0,  # no name of a module
    }
    for name, points in files.items():
        path = write(tmp_path / name, REWARD.format(imports="", points=points))
        func = load_reward_func(f"{path}:reward")
        assert func(completions=[""]) == in_a_new_process(func) == [points]
        assert sys.modules[func.__module__].reward is func
        assert sys.modules[func.__module__].__file__ == path
        assert load_reward_func(f"{path}:Verdict")().points == points
        assert load_reward_func(f"{path}:reward") is func  # loaded once
    assert importlib.import_module("statistics").mean([1, 2]) == 1.5
    assert importlib.import_module("judging_here").Verdict().points == 1


def test_a_reward_file_that_changed_is_loaded_again(tmp_path):
    spec = write(tmp_path / "changing_reward.py", "def f(**_):\n    return [1.0]\n") + ":f"
    assert load_reward_func(spec)() == [1]
    write(tmp_path / "changing_reward.py", "def f(**_):\n    return [2.0]\n")
    assert load_reward_func(spec)() == [2]


def test_a_reward_file_imports_its_neighbours(tmp_path):
    write(tmp_path / "a" / "some_helper.py", "points = 5.0\n")
    text = REWARD.format(imports="from some_helper import points", points="points")
    func = load_reward_func(write(tmp_path / "a" / "with_helper.py", text) + ":reward")
    assert func(completions=[""]) == in_a_new_process(func) == [5]
    write(tmp_path / "b" / "some_helper.py", "points = 6.0\n")  # which Python can't tell apart
    with pytest.raises(UserError, match=r"imports some_helper.py, and so does .*/a; .* rename"):
        load_reward_func(write(tmp_path / "b" / "with_helper.py", text) + ":reward")


# Their code


def test_the_fingerprint_of_a_function_is_that_of_its_file(tmp_path):
    path = tmp_path / "fingerprinted.py"
    text = "LIMIT = {}\ndef f(prompt, completion, scale=1):\n    return LIMIT\n"

    def fingerprints(limit):
        func = load_reward_func(write(path, text.format(limit)) + ":f")
        partial = functools.partial(func, scale=2)
        each = run_each(f"{path}:f", deadline=1.0)
        return [code_fingerprint(x) for x in (func, batched(func), batched(partial), each)]

    first, other = fingerprints(1), fingerprints(2)
    assert first == fingerprints(1)
    assert first[0] == first[1]
    assert all(a != b for a, b in zip(first, other, strict=True))
    scaled = functools.partial(load_reward_func(f"{path}:f"), scale=3)
    assert code_fingerprint(scaled) not in first


def test_what_has_no_file_is_told_apart_by_its_source_or_name():
    namespace: Any = {"__name__": "nowhere"}
    exec("def f(**_): return 1\ndef g(**_): return 2", namespace)
    codes = [code_fingerprint(x) for x in (namespace["f"], namespace["g"], len, letter_share)]
    assert len(set(codes)) == 4


def test_functions_load_from_modules_and_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def reward(**_):\n    return [3.0]\n")
    assert run([load_reward_func(f"{path}:reward")], n=1).rewards.tolist() == [3]
    assert load_reward_func("gvpo_jax.rewards.debug:letter_share") is letter_share


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("letter_share", "write module:function"),
        ("gvpo_jax.rewards.debug:share", "no function 'share' there; functions: letter_share"),
        ("no_such_module_here:f", "no such module"),
        ("gvpo_jax.rewards.nothing:f", "importing it failed"),
        ("nowhere/mine.py:f", "no such file"),
        ("{broken}:f", "importing it failed: SyntaxError"),
    ],
)
def test_function_that_is_not_there(spec, problem, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with pytest.raises(UserError, match=problem):
        load_reward_func(spec.format(broken=broken))


# The small rewards


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (" 182", "182", 1.0),
        (" 182.\nWhat is 3", 182, 1.0),
        (" 1,820 or so", "1820", 1.0),
        ("it is -3.50", "-3.5", 1.0),
        ("3", "-3", 0.0),
        ("12 182", "182", 0.0),
        ("1820", "182", 0.0),
        ("none", "182", 0.0),
        ([{"role": "assistant", "content": " 7"}], "7", 1.0),
        ("9007199254740993", "9007199254740992", 0.0),  # equal as floats
    ],
)
def test_exact_number(completion, solution, reward):
    assert exact_number(["p"], [completion], solution=[solution], task=["t"]) == [reward]


@pytest.mark.parametrize("solution", ["seven", "", "nan", None])
def test_exact_number_fails_on_a_solution_that_is_no_number(solution):
    with pytest.raises(RewardError, match="'exact_number' failed on row 0: the solution"):
        run([exact_number], n=1, solution=[solution])


def test_letter_share():
    chats = [[{"role": "assistant", "content": "ab "}]]
    assert letter_share(["p"] * 4, ["abcd", "aB1é", "", *chats]) == [1.0, 0.25, 0.0, 2 / 3]


# Processes

TRICKS = """
import os, time

def trick(prompt, completion):
    if completion == "hang":
        9**9**9**9
    if completion == "sleep":
        time.sleep(600)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise KeyError("oops")
    if completion == "unpicklable":
        return lambda: 0
    if completion == "pid":
        return os.getpid()
    if completion == "abstain":
        return None
    print("printing must not break the pipe")
    return float(completion)
"""


@pytest.fixture(scope="module")
def tricks(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "tricks.py"
    path.write_text(TRICKS)
    return f"{path}:trick"


def test_a_call_that_hangs_is_killed_at_the_deadline_while_the_others_answer(tricks, capfd):
    pool = WorkerPool(tricks, deadline=1.0, workers=2)
    try:
        pool.map([("p", "0"), ("p", "1")])  # start both
        begin = time.monotonic()
        answers = ["hang", "1", "sleep", "2", "abstain", "3"]
        results = pool.map([("p", answer) for answer in answers])
        assert time.monotonic() - begin < 30
        assert [results[i] for i in (1, 3, 4, 5)] == [1.0, 2.0, None, 3.0]
        assert capfd.readouterr().out == ""
        for i in (0, 2):
            with pytest.raises(RewardError, match="no answer within 1 s"):
                raise results[i]
    finally:
        pool.close()


def test_a_call_that_dies_or_raises_fails_alone_and_the_process_is_kept_or_replaced(tricks):
    pool = WorkerPool(tricks, deadline=60.0, workers=1)
    answers = ["pid", "raise", "unpicklable", "pid", "die", "pid", "5"]
    try:
        first, raised, unpicklable, second, died, third, last = pool.map(
            [("p", answer) for answer in answers]
        )
        again = pool.map([("p", "pid")])
    finally:
        pool.close()
    assert first == second  # an exception costs no process
    assert third != second
    assert again == [third]  # processes outlive a map
    assert last == 5.0
    assert re.search("KeyError.*oops", str(raised))
    assert re.search("pickle|local object", str(unpicklable))  # by the version of Python
    assert "died with status 3" in str(died)
    assert all(isinstance(x, RewardError) for x in (raised, unpicklable, died))
    with pytest.raises(ProcessLookupError):
        os.kill(third, 0)  # close() left nothing running


def test_arguments_that_can_not_be_sent_fail_their_row_and_leave_no_process(tricks):
    pool = WorkerPool(tricks, deadline=60.0, workers=1)
    try:
        first, unsent, again = pool.map([("p", "pid"), ("p", lambda: 0), ("p", "pid")])
        with pytest.raises(
            RewardError, match=r"arguments can't be sent to a process: .*(pickle|local object)"
        ):
            raise unsent
        assert first == again
        assert isinstance(pool.map([("p", threading.Lock())])[0], RewardError)
    finally:
        pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_function_that_cannot_be_imported_raises_at_once(tmp_path):
    with pytest.raises(RewardError, match=r"did not start: .*no such file"):
        WorkerPool(f"{tmp_path}/none.py:f", deadline=60.0).map([()])


def hangs(prompts, **columns):
    threading.Event().wait(30)


def spins(prompts, **columns):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        pass


async def sleeps(prompts, **columns):
    await asyncio.sleep(30)


def sees_a_deadline_column(prompts, func, deadline, **columns):
    assert threading.current_thread() is not threading.main_thread()
    return deadline


@pytest.mark.parametrize("slow", [hangs, spins, sleeps])
def test_a_function_that_does_not_answer_in_time_has_failed(slow):
    columns = {"func": [1.0, 2.0], "deadline": [3.0, 4.0]}
    batch = {"prompts": ["a", "b"], "completions": ["x", "y"], "completion_ids": [[1], [2]]}
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"failed on the call .* it took longer than 0\.2 s"):
        compute_rewards([sees_a_deadline_column, slow], columns=columns, deadline=0.2, **batch)
    scores = compute_rewards(
        [sees_a_deadline_column, slow], columns=columns, deadline=0.2, on_error="skip", **batch
    )
    assert time.monotonic() - began < 10
    assert scores.failed == 2
    assert scores.by_func["sees_a_deadline_column"].tolist() == [3, 4]
    answered = compute_rewards([sees_a_deadline_column], columns=columns, deadline=30, **batch)
    assert answered.rewards.tolist() == [3, 4]


def test_a_hung_row_is_skipped_by_score(tricks):
    scores = compute_rewards(
        [run_each(tricks, deadline=0.5, workers=1)],
        prompts=["p"] * 3,
        completions=["1", "sleep", "2"],
        completion_ids=[[0]] * 3,
        columns={"solution": [0] * 3},
        on_error="skip",
    )
    np.testing.assert_array_equal(scores.rewards, [1, NAN, 2])
    assert scores.failed == 1


# reasoning-gym and math-verify


def gym_entry(task):
    gym = importlib.import_module("reasoning_gym")
    import json

    entry = gym.create_dataset(task, size=1, seed=5)[0]
    return json.dumps(entry), entry["answer"]


def test_reasoning_gym_gives_full_credit_or_none():
    entry, answer = gym_entry("gcd")
    completions = [f" {answer}\n", f"{answer} or so", "no idea", ""]
    columns = {"task": ["gcd"] * 4, "entry": [entry] * 4}
    assert reasoning_gym_score(["p"] * 4, completions, **columns) == [1, 0, 0, 0]
    partial = reasoning_gym_reward(credit="partial", workers=1)
    scores = partial(["p"] * 4, completions, **columns)
    assert scores[0] == 1
    assert 0 < scores[1] < 1
    assert scores[2:] == [0, 0]


@pytest.mark.parametrize("task", ["countdown", "simple_integration", "n_queens", "puzzle24"])
def test_scorers_that_run_answers_are_denied(task):
    importlib.import_module("reasoning_gym")
    assert task in RUNS_ANSWERS
    with pytest.raises(UserError, match=f"scorer of {task} runs the answer as Python"):
        reasoning_gym_score(["p"] * 2, ["x", "y"], task=["gcd", task], entry=["{}", "{}"])


def test_every_scorer_that_evaluates_text_is_on_the_list():
    gym = importlib.import_module("reasoning_gym")
    import inspect

    evaluates = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(.*\b(?:answer|user)")
    found = set()
    for name, (dataset, _) in gym.factory.DATASETS.items():
        source = inspect.getsource(sys.modules[dataset.__module__])
        own = source.replace('eval(entry["answer"])', "")  # the solution, not the answer
        if evaluates.search(own):
            found.add(name)
    assert found == RUNS_ANSWERS


def test_allowing_a_task_allows_that_task_only():
    entry, _ = gym_entry("string_insertion")
    allowed = reasoning_gym_reward(allow_code=["string_insertion"], workers=1)
    assert allowed(["p"], ["x"], task=["string_insertion"], entry=[entry]) == [0]
    with pytest.raises(UserError, match="scorer of countdown"):
        allowed(["p"], ["x"], task=["countdown"], entry=["{}"])
    with pytest.raises(UserError, match="'gcd' is no task that runs answers"):
        reasoning_gym_reward(allow_code=["gcd"])


QUESTION = r"What is 3 + 4, or 14/2, or \sqrt{49}? Expand (x+1)^2. Simplify \sqrt{12}."
ANSWERS = [
    ("7", "7", 1),
    ("7", "So the answer is 7.", 1),
    ("7", "3 + 4 = 7", 1),
    ("7", r"\boxed{7\text{ cm}}", 1),
    ("7", "$x = 7$", 1),
    ("7", "8", 0),
    ("7", "-7", 0),
    ("7", "", 0),
    ("7", "3 + 4", 0),  # the question echoed back
    ("7", "$3+4$ is what?", 0),
    ("7", r"The answer is \boxed{3 + 4}", 0),
    ("7", r"\boxed{5 + 2}", 0),  # not the question, but not worked out
    ("7", r"\boxed{14/2}", 0),
    ("7", r"\boxed{\sqrt{49}}", 0),
    ("1,234", "1234", 1),
    ("1500", r"\boxed{1.5 \times 10^3}", 1),
    (r"\frac{1}{2}", "0.5", 1),
    ("0.5", r"\boxed{\dfrac{1}{2}}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 0),
    ("x^2+2x+1", "$x^2 + 2x + 1$", 1),
    ("x^2+2x+1", "$1 + x^2 + 2x$", 1),
    ("x^2+2x+1", "$(x+1)^2$", 0),  # the question
    ("(x+1)^2", "$(x + 1)^2$", 1),  # the question, and the solution
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", 1),
    ("Half of 144: #### 72", "72", 1),
    (r"We get \boxed{72}.", "72", 1),
    (72, "72", 1),
]


def test_math_verify_compares_final_answers_as_mathematics():
    importlib.import_module("math_verify")
    solutions, completions, _ = zip(*ANSWERS, strict=True)
    prompts = [QUESTION, [{"role": "user", "content": QUESTION}]] * len(ANSWERS)
    rewards = math_verify(prompts[: len(ANSWERS)], completions, solution=solutions)
    wrong = [(case, got) for case, got in zip(ANSWERS, rewards, strict=True) if got != case[2]]
    assert not wrong


def test_math_verify_is_given_the_solution_first():
    # An interval answers an inequality, an inequality that asks for an interval doesn't.
    importlib.import_module("math_verify")
    interval, inequality = r"$(-\infty, 5)$", "$x < 5$"
    assert math_verify(["p"] * 2, [interval, inequality], solution=[inequality, interval]) == [1, 0]


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"\boxed{1, 2}", ["$1$", "2"], 1),
        (r"\boxed{2, 1}", ["1", "$2$"], 1),
        (r"\boxed{1}", ["1", "2"], 0),
        (r"\boxed{1, 3}", ["1", "2"], 0),
        (r"\boxed{0.5}", [r"$\frac{1}{2}$"], 1),
        (r"\boxed{[0,1)}", ["$[0,1)$"], 1),
    ],
)
def test_math_verify_asks_for_all_of_several_answers(completion, solution, reward):
    importlib.import_module("math_verify")
    assert math_verify(["p"], [completion], solution=[solution]) == [reward]


def test_math_verify_fails_on_a_solution_it_cannot_parse():
    importlib.import_module("math_verify")
    with pytest.raises(RewardError, match=r"'math_verify' failed on row 0: .*the solution ''"):
        run([math_verify], n=1, solution=[""])


@pytest.mark.parametrize(
    ("func", "package", "extra", "columns"),
    [
        (math_verify, "math_verify", "math", {"solution": [1]}),
        (reasoning_gym_score, "reasoning_gym", "tasks", {"task": ["gcd"], "entry": ["{}"]}),
    ],
)
def test_missing_package_names_the_extra(monkeypatch, func, package, extra, columns):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    with pytest.raises(UserError, match=rf'pip install "gvpo-jax\[{extra}\]"'):
        func(["p"], ["1"], **columns)


def test_a_reward_file_may_hold_a_dataclass(tmp_path):
    """Which looks for its module by name; and the file may be called as a module of Python's."""
    (tmp_path / "math.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Weights:\n"
        "    length: float = 2.0\n"
        "def reward(prompts, completions, **_):\n"
        "    return [Weights().length * len(text) for text in completions]\n"
    )
    reward = load_reward_func(f"{tmp_path / 'math.py'}:reward")
    assert reward(["a"], ["abc"]) == [6.0]
    assert sys.modules["math"].sqrt(4) == 2


def test_reward_files_of_one_name_are_modules_of_their_own(tmp_path):
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"def reward(**_):\n    return {folder!r}\n")
        found.append(load_reward_func(f"{tmp_path / folder / 'r.py'}:reward"))
    assert [reward() for reward in found] == ["a", "b"]
    assert [sys.modules[reward.__module__].reward for reward in found] == found
    (tmp_path / "a" / "r.py").write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_reward_func(f"{tmp_path / 'a' / 'r.py'}:reward")
    assert sys.modules[found[0].__module__].reward is found[0]
