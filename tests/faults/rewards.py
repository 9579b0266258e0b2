"""Reward functions that do what they should not; each is well for its first two calls."""

import os
import sys
import time

from gvpo_jax.rewards.debug import letter_share

_calls = 0


def _late() -> bool:
    global _calls
    _calls += 1
    return _calls > 2


def raises(prompts, completions, **_):
    if _late():
        raise RuntimeError("the judge is away")
    return letter_share(prompts, completions)


def hangs(prompts, completions, **_):
    if _late():
        time.sleep(3600)
    return letter_share(prompts, completions)


def exits(prompts, completions, **_):
    if _late():
        sys.exit(7)
    return letter_share(prompts, completions)


def forks(prompts, completions, **_):
    if _late() and _calls == 3:
        os.fork()
    return letter_share(prompts, completions)


def too_few(prompts, completions, **_):
    rewards = letter_share(prompts, completions)
    return rewards[:-1] if _late() else rewards


def texts(prompts, completions, **_):
    return ["good"] * len(completions) if _late() else letter_share(prompts, completions)


def not_a_number(prompts, completions, **_):
    return [float("nan")] * len(completions) if _late() else letter_share(prompts, completions)


def huge(prompts, completions, **_):
    rewards = letter_share(prompts, completions)
    return [1e30 * (x + 1) for x in rewards] if _late() else rewards


def closes_output(prompts, completions, **_):
    if _late():
        sys.stdout.close()
    return letter_share(prompts, completions)


def closes_descriptor(prompts, completions, **_):
    if _late() and _calls == 3:
        os.close(1)
    return letter_share(prompts, completions)


def moves_away(prompts, completions, **_):
    if _late():
        os.chdir("/")
    return letter_share(prompts, completions)


def eats_memory(prompts, completions, **_):
    if _late():
        raise MemoryError
    return letter_share(prompts, completions)
