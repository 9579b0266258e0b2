"""The reward of a task: what is a good answer? Try it without a model: `python rewards.py`."""

import re

from gvpo_jax.rewards import completion_text


def correct(prompt, completion, solution):
    """1 if the last date in the answer is the solution, else 0. `solution` is a column."""
    dates = re.findall(r"\d{4}-\d{2}-\d{2}", completion_text(completion))
    return float(dates[-1:] == [solution])


if __name__ == "__main__":  # what is right, what is wrong, and what a model may write instead
    assert correct("", "2021-03-05", "2021-03-05") == 1
    assert correct("", "That is 2021-03-05.", "2021-03-05") == 1
    assert correct("", "2021-05-03", "2021-03-05") == 0
    assert correct("", "", "2021-03-05") == 0
    print("the reward does what it should")
