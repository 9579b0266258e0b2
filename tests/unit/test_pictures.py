"""Pictures of runs show the numbers of their files, and stand alone."""

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_report import make_run

from gvpo_jax.errors import UserError

FILE = Path(__file__).parents[2] / "experiments" / "pictures.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pictures():
    return SimpleNamespace(**runpy.run_path(str(FILE)))


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_picture_of_one_run_shows_each_step_and_each_evaluation(tmp_path, pictures):
    run = make_run(tmp_path / "run", before=[[0], [0], [1]], after=[[1], [0], [1]])
    reward, held_out = pictures.curves([run]).axes
    assert labels(reward) == ["each step", "running mean"]
    each, mean = (line.get_ydata() for line in reward.lines)
    assert each[[0, -1]] == pytest.approx([0.01, 0.4])
    assert mean[20] == pytest.approx(0.21)  # a straight line is its own mean
    (line,) = held_out.lines
    assert line.get_xdata().tolist() == [0, 40]
    assert line.get_ydata() == pytest.approx([1 / 3, 2 / 3])
    assert len(held_out.collections[0].get_segments()) == 2  # an interval each
    assert held_out.yaxis.get_major_formatter()(0.5) == "50%"


def test_mean_of_runs_is_drawn_over_the_steps_that_all_have(tmp_path, pictures):
    evals = {"before": [[0], [1]], "after": [[1], [1]]}
    runs = [
        make_run(tmp_path / name, rewards=rewards, **more)
        for name, rewards, more in (("a", [0.0] * 8, evals), ("b", [1.0, None, 1.0, 1.0], {}))
    ]
    reward, held_out = pictures.curves(runs).axes
    assert labels(reward) == ["each run", "mean of 2 runs"]
    *_, mean = reward.lines
    assert mean.get_xdata().tolist() == [1, 3, 4]
    assert mean.get_ydata().tolist() == [0.5] * 3
    assert held_out.get_title(loc="left") == "Held-out accuracy"


def test_runs_without_evaluations_have_one_panel(tmp_path, pictures):
    (panel,) = pictures.curves([make_run(tmp_path / "run")]).axes
    assert panel.get_title(loc="left") == "Training reward"


def test_saved_picture_stands_alone_and_is_the_same_each_time(tmp_path, pictures):
    run = make_run(tmp_path / "run", before=[[0], [1]], after=[[1], [1]])
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        pictures.save(pictures.curves([run]), path, "Two panels")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    root = ET.parse(paths[0]).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == "Two panels"
    shown = " ".join(root.itertext())
    assert "Training reward" in shown
    assert "Held-out accuracy" in shown
    assert not list(root.iter(f"{SVG}image"))
    assert not list(root.iter(f"{SVG}script"))


def test_picture_without_rewards_is_the_users_to_mend(tmp_path, pictures):
    run = make_run(tmp_path / "run", rewards=[None, None])
    with pytest.raises(UserError, match="no step with a reward"):
        pictures.curves([run])
    with pytest.raises(UserError, match="is not a run"):
        pictures.curves([tmp_path])
