import threading

import pytest

from gvpo_jax.collect.lookahead import Lookahead
from gvpo_jax.errors import UserError


class Policy:
    """Counts updates; a draw tells the round and the updates its policy had seen."""

    def __init__(self, ahead, last=9):
        self.updates, self.drawn = 0, []
        self.ahead = Lookahead(self.draw, lambda: self.updates, ahead=ahead, last=last)

    def draw(self, number, version):
        self.drawn.append(threading.current_thread().name)
        return number, version

    def play(self, rounds):
        taken = []
        for number in rounds:
            taken.append(self.ahead.take(number))
            self.updates += 1
        return taken


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_round_is_as_stale_as_it_was_drawn_ahead(ahead):
    policy = Policy(ahead)
    assert policy.play(range(10)) == [(n, max(n - ahead, 0)) for n in range(10)]
    assert len(policy.drawn) == 10
    assert all(name.startswith("rollout") for name in policy.drawn)
    assert policy.ahead.pending() == {}
    policy.ahead.close()


def test_what_was_pending_makes_a_later_session_the_same():
    whole = Policy(2).play(range(10))
    first, second = Policy(2), Policy(2)
    start = first.play(range(4))
    assert list(first.ahead.pending()) == [4, 5]
    second.updates = first.updates
    second.ahead.load(first.ahead.pending())
    assert start + second.play(range(4, 10)) == whole
    assert len(second.drawn) == 4


def test_the_trainer_works_while_a_round_is_drawn():
    """The draw of round 1 waits for something that only happens after round 0 was taken."""
    taken = threading.Event()

    def draw(number, _):
        if number == 1:
            assert taken.wait(30)
        return number

    ahead = Lookahead(draw, lambda: None, ahead=1, last=1)
    assert ahead.take(0) == 0
    taken.set()
    assert ahead.take(1) == 1


def test_an_error_while_drawing_reaches_the_trainer():
    def draw(number, _):
        if number == 1:
            raise UserError("no such reward")
        return number

    ahead = Lookahead(draw, lambda: None, ahead=1, last=3)
    ahead.take(0)
    with pytest.raises(UserError, match="no such reward"):
        ahead.take(1)
    ahead.close()


def test_closing_interrupts_until_the_drawing_ends():
    """The first interruption comes too early: what is drawn has not yet asked for anything."""
    begun, interruptions = threading.Event(), threading.Semaphore(0)

    def draw(number, _):
        if number == 0:
            return 0
        begun.set()
        return [interruptions.acquire(timeout=10) for _ in range(2)]

    ahead = Lookahead(draw, lambda: None, ahead=1, last=1, interrupt=interruptions.release)
    ahead.take(0)
    begun.wait()
    ahead.close()
    assert ahead.pending() == {1: [True, True]}
