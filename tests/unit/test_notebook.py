"""What a notebook shows of a run."""

import html
import json
import re
import sys

import pytest

from gvpo_jax.config_file import load_config
from gvpo_jax.errors import UserError
from gvpo_jax.notebook import LiveCurve
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.trainer import Trainer

ROWS = [{"prompt": f"<b>{i}"} for i in range(4)]
SETTINGS = [
    "train.steps=4",
    "train.batch_size=2",
    "rollout.max_completion_length=8",
    "data.eval_path=null",
    "data.eval_size=0",
    "eval.every=0",
    "log.completions_every=2",
    "mesh.fsdp=1",
]


class Handle:
    def __init__(self, shown):
        self.pages = [page(shown)]

    def update(self, shown):
        self.pages.append(page(shown))


def page(shown):
    """The page in the frame that a notebook gets."""
    frame = re.fullmatch(r'<iframe srcdoc="([^"]*)" [^>]* sandbox></iframe>', shown._repr_html_())
    return html.unescape(frame[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, handles = tmp_path_factory.mktemp("runs") / "run", []
    live = LiveCurve(every=2)
    live._display = lambda shown, display_id: handles.append(Handle(shown)) or handles[-1]
    trainer = Trainer(load_config("debug", [*SETTINGS, f"run.dir={folder}"]), callbacks=[live])
    trainer.train(ROWS, letter_share)
    return trainer, folder, handles


def test_curves_are_those_of_the_history(trained):
    trainer, *_ = trained
    shown = trainer.plot()
    assert "Training reward" in page(shown)
    assert "step 4: Training reward" in repr(shown)
    assert f"step 1: {trainer.history[0]['reward']:.3g}" in page(shown)


def test_samples_are_the_newest_completions_with_their_text_escaped(trained):
    trainer, folder, _ = trained
    newest = max((folder / "completions").glob("step_*.jsonl"))
    row = json.loads(newest.read_text().splitlines()[0])
    shown = trainer.samples()
    assert html.escape(row["prompt"]) in page(shown)
    assert "<b>" not in page(shown).replace("<b>" + "expected", "")
    assert repr(shown).startswith(f"{row['reward']}")


def test_the_report_is_shown_whole(trained):
    trainer, folder, _ = trained
    shown = trainer.report()
    assert page(shown) == (folder / "report.html").read_text()
    assert repr(shown) == str(folder / "report.html")


def test_a_live_curve_grows_in_one_place(trained):
    *_, handles = trained
    (handle,) = handles
    assert len(handle.pages) == 2
    assert "steps 1 to 2" in handle.pages[0]
    assert "steps 1 to 4" in handle.pages[1]


def test_before_a_run_there_is_nothing_to_show(tmp_path):
    trainer = Trainer(load_config("debug", [*SETTINGS, f"run.dir={tmp_path / 'run'}"]))
    for show in (trainer.plot, trainer.samples, trainer.report):
        with pytest.raises(UserError) as caught:
            show()
        assert "\n" not in str(caught.value)


def test_live_curves_need_a_notebook_and_a_number(monkeypatch):
    with pytest.raises(UserError, match="give 1 or more updates"):
        LiveCurve(0)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UserError, match="IPython is not installed"):
        LiveCurve()
