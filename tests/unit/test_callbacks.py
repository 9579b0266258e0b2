"""What a user hands to the trainer: callbacks, an optimizer, a tokenizer."""

import jax
import numpy as np
import optax
import pytest
from small_run import config, one_layer
from transformers import AutoTokenizer

from gvpo_jax.callbacks import Callback
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer

ROWS = [{"prompt": f"Spell {word}: "} for word in ("ash", "birch", "cedar", "fir", "oak")]


class Recorder(Callback):
    def __init__(self, end_at=None):
        self.told, self.end_at = [], end_at

    def on_step_end(self, step, metrics):
        self.told.append(("step", step, metrics["loss"]))
        return np.bool_(step == self.end_at)  # as a comparison of arrays gives it

    def on_evaluate(self, step, metrics):
        self.told.append(("evaluation", step, metrics["eval/reward"]))

    def on_save(self, step):
        self.told.append(("save", step))


def run(folder, callbacks=(), **settings):
    settings = {"train__steps": 4, "checkpoint__every": 2, "eval__every": 2} | settings
    trainer = Trainer(config(folder, **settings), load_model("debug"), callbacks=callbacks)
    trainer.train(ROWS, letter_share, eval_dataset=ROWS[:2])
    return trainer


def params(trainer):
    return jax.tree.leaves(trainer.policy.params)


def test_callbacks_hear_of_updates_evaluations_and_checkpoints_in_order(tmp_path):
    recorder = Recorder()
    run(tmp_path, [recorder])
    kinds = [told[:2] for told in recorder.told]
    assert kinds == [
        ("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("save", 2),
        ("step", 3), ("step", 4), ("save", 4), ("evaluation", 4),
    ]  # fmt: skip
    rows = read_metrics(tmp_path)
    assert [told[2] for told in recorder.told if told[0] == "step"] == [
        row["loss"] for row in rows if "loss" in row
    ]


@pytest.mark.parametrize("end_at", [1, 2, 3])
@pytest.mark.parametrize("rounds", [{}, {"train__steps_per_generation": 2}])
def test_a_session_that_a_callback_ended_goes_on_bitwise(tmp_path, end_at, rounds):
    whole = run(tmp_path / "whole", **rounds)
    run(tmp_path / "parts", [Recorder(end_at)], **rounds)
    assert [row["step"] for row in read_metrics(tmp_path / "parts")][-1] == end_at
    parts = run(tmp_path / "parts", [Recorder()], **rounds)
    for a, b in zip(params(whole), params(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_trainer_goes_on_after_a_callback_ended_the_session(tmp_path):
    settings = {"train__steps": 3, "checkpoint__every": 1}
    trainer = Trainer(config(tmp_path, **settings), load_model("debug"), callbacks=[Recorder(2)])
    assert trainer.train(ROWS, letter_share)["steps"] == 2
    assert trainer.train(ROWS, letter_share)["steps"] == 3


def test_a_callback_that_fails_ends_the_run_with_a_line_and_loses_nothing(tmp_path):
    class Broken(Callback):
        def on_step_end(self, step, metrics):
            assert step < 3, "too late"

    told = r"Broken.on_step_end failed at step 3: AssertionError: too late.*; the 3 updates before"
    with pytest.raises(UserError, match=told):
        run(tmp_path, [Broken()])
    recorder = Recorder()
    run(tmp_path, [recorder])
    assert [told[:2] for told in recorder.told if told[0] == "step"] == [("step", 4)]


def test_what_is_no_callback_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no gvpo_jax\.callbacks\.Callback"):
        run(tmp_path, [print])


def test_an_optax_optimizer_of_one_s_own_is_what_updates(tmp_path):
    """Against the optimizer of the config that does the same."""
    same = {"optimizer__name": "sgd", "optimizer__b1": 0.0, "optimizer__max_grad_norm": None}
    ours = run(tmp_path / "ours", optimizer__learning_rate=0.5, **same)
    settings = {"train__steps": 4, "checkpoint__every": 2, "eval__every": 2}
    optimizer = optax.sgd(0.5)
    theirs = Trainer(
        config(tmp_path / "theirs", **settings), load_model("debug"), optimizer=optimizer
    )
    theirs.train(ROWS, letter_share, eval_dataset=ROWS[:2])
    moved = 0.0
    start = jax.tree.leaves(load_model("debug").params)
    for a, b, c in zip(params(ours), params(theirs), start, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        moved = max(moved, float(np.abs(a - c).max()))
    assert moved > 1e-3
    assert "learning_rate" not in theirs.history[-1]


def test_an_optimizer_with_a_state_is_saved_and_sharded(tmp_path):
    def one(folder, **settings):
        trainer = Trainer(
            config(folder, train__steps=4, checkpoint__every=2, mesh__fsdp=2, **settings),
            load_model("debug"),
            optimizer=optax.chain(optax.clip(1.0), optax.lion(1e-3)),
        )
        trainer.train(ROWS, letter_share)
        return trainer

    whole = one(tmp_path / "whole")
    one(tmp_path / "parts", train__stop_at=2)
    parts = one(tmp_path / "parts")
    for a, b in zip(params(whole), params(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    moments = [x for x in jax.tree.leaves(whole.policy.state.opt_state) if x.ndim == 2]
    assert any(not x.sharding.is_fully_replicated for x in moments)


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path):
    run(tmp_path, train__stop_at=2)
    other = Trainer(
        config(tmp_path, train__steps=4, checkpoint__every=2, eval__every=2),
        load_model("debug"),
        optimizer=optax.sgd(0.1, momentum=0.9),
    )
    with pytest.raises(UserError, match="optimizer"):
        other.train(ROWS, letter_share, eval_dataset=ROWS[:2])


def test_a_tokenizer_of_one_s_own_is_what_encodes(tmp_path):
    model = load_model("debug")
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    own.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    settings = {"data__chat_template": "always"}
    trainer = Trainer(config(tmp_path, **settings), model, tokenizer=own)
    assert trainer.tokenizer.chat_template == own.chat_template
    encoded = trainer._encode([{"prompt": "ash"}])
    assert trainer.tokenizer.decode(encoded.token_ids[0]) == "<ash>"


@pytest.mark.parametrize(
    ("given", "told"), [({"tokenizer": "gpt2"}, "is none; give"), ({"optimizer": 3}, "of Optax")]
)
def test_what_is_neither_is_refused(tmp_path, given, told):
    with pytest.raises(UserError, match=told):
        Trainer(config(tmp_path), one_layer(), **given)
