"""What the report says looks wrong, and the page of several runs."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gvpo_jax.cli import main
from gvpo_jax.report import write_comparison, write_report
from gvpo_jax.report.advice import advice

STEADY = {
    "reward": 0.5,
    "reward_std": 0.4,
    "gvpo_mse": 0.08,
    "frac_reward_zero_std": 0.1,
    "entropy_sampled": 1.0,
    "log_ratio": 2.0,
    "completions/clipped_ratio": 0.05,
}


def rows(count=20, evaluations=(), **changes):
    """A run's metrics; a change is a number, or corners of a line."""
    found = []
    for step in range(1, count + 1):
        row = {"step": step}
        for name, value in (STEADY | changes).items():
            ends = value if isinstance(value, tuple) else (value, value)
            row[name] = float(np.interp(step, np.linspace(1, count, len(ends)), ends))
        found.append(row)
    for step, accuracy in evaluations:
        found[step - 1] |= {"eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.02}
    return found


def titles(found):
    return [each.title for each in found]


def test_nothing_looks_wrong_in_a_steady_run():
    assert advice(rows(evaluations=[(1, 0.2), (20, 0.5)]), {}) == []


@pytest.mark.parametrize(
    ("changes", "settings", "title"),
    [
        ({"frac_reward_zero_std": (0.1, 0.9)}, {}, "Most groups have no contrast"),
        ({"entropy_sampled": (2.0, 0.001, 0.001)}, {}, "The policy says nearly always the same"),
        ({"gvpo_mse": (0.08, 3.0)}, {}, "Weights follow the log-ratios, not the rewards"),
        ({"completions/clipped_ratio": 0.5}, {}, "Completions are cut off"),
        ({"rewards/failed": (0, 3)}, {}, "Reward functions fail"),
        ({"reward_std": 40.0, "gvpo_mse": 800.0}, {}, "Rewards are large against beta"),
        ({"reward_std": 0.05, "gvpo_mse": 0.001}, {"loss": {"beta": 0.5}}, "Rewards are small"),
        ({}, {"rollout": {"top_p": 0.9}}, "Some tokens can never be sampled"),
    ],
)
def test_what_looks_wrong_is_said(changes, settings, title):
    (found,) = advice(rows(**changes), settings)
    assert found.title.startswith(title)
    assert found.seen
    assert found.change


def test_a_hacked_reward_is_told_from_a_noisy_score():
    rising = {"reward": (0.1, 0.9)}
    fallen = rows(evaluations=[(1, 0.3), (10, 0.5), (20, 0.2)], **rising)
    assert titles(advice(fallen, {})) == ["The reward rises while held-out answers get worse"]
    assert advice(rows(evaluations=[(10, 0.5), (20, 0.49)], **rising), {}) == []
    falling = {"reward": (0.9, 0.1)}
    assert advice(rows(evaluations=[(10, 0.5), (20, 0.2)], **falling), {}) == []


def test_the_best_of_many_noisy_scores_is_no_fall():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):  # 20 evaluations of 100 questions, of a model that stays as it is
        found = rows(100, reward=(0.1, 0.9))
        for row in found[4::5]:
            share = rng.binomial(100, 0.5) / 100
            row["eval/accuracy"] = share
            row["eval/accuracy_low"] = share - 1.96 * np.sqrt(share * (1 - share) / 100)
        alarms += bool(advice(found, {}))
    assert alarms <= 5


@pytest.mark.parametrize("share", [0.35, 0.2, 0.1])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_groups_without_contrast_are_not_taken_for_a_wrong_scale(share, beta):
    rng = np.random.default_rng(0)
    found = rows(40)
    for row in found:  # the policy is the reference: weights are the rewards' alone
        rewards = (rng.random((64, 8)) < 0.5) * (rng.random((64, 1)) < share)
        spread = rewards.std(axis=1, ddof=1)
        row["reward_std"], row["frac_reward_zero_std"] = spread.mean(), np.mean(spread == 0)
        row["gvpo_mse"] = np.mean(spread**2) / 2
    told = titles(advice(found, {"loss": {"beta": beta}}))
    assert told in ([], ["Most groups have no contrast"])


def test_a_task_that_is_solved_is_not_told_that_log_ratios_rule():
    solved = rows(reward=(0.2, 1.0), reward_std=(0.4, 0.01), gvpo_mse=(0.08, 0.02))
    assert advice(solved, {}) == []


def test_settings_of_another_kind_stop_no_report():
    found = rows(frac_reward_zero_std=0.9)
    for settings in ({"eval": {"success_reward": "x"}}, {"loss": {"beta": "x"}}, {"loss": None}):
        assert titles(advice(found, settings)) == ["Most groups have no contrast"]


def test_other_methods_have_no_beta_and_no_support_to_keep():
    settings = {"loss": {"name": "grpo"}, "rollout": {"top_p": 0.9}}
    assert advice(rows(gvpo_mse=5.0, reward_std=40.0), settings) == []


def test_a_young_run_is_judged_by_its_settings_alone():
    bad = rows(5, frac_reward_zero_std=1.0)
    assert advice(bad, {}) == []
    assert titles(advice(bad, {"rollout": {"top_k": 5}})) == ["Some tokens can never be sampled"]
    assert advice([], {}) == []


def test_contrast_is_missing_because_tasks_are_easy_or_hard():
    easy, hard = (
        advice(rows(reward=reward, frac_reward_zero_std=0.9), {})[0].change
        for reward in (0.95, 0.02)
    )
    assert "harder tasks" in easy
    assert "easier tasks" in hard


def make(folder, *, seed=0, beta=0.1, name="run", level=0.5, count=20, model="m"):
    """A run's folder with files."""
    folder.mkdir(parents=True)
    config = f"run: {{dir: {folder}, seed: {seed}}}\nloss: {{beta: {beta}}}\n"
    config += f"model: {{name: '{model}'}}\n"
    (folder / "config.yaml").write_text(config)
    lines = rows(count, evaluations=[(count, level / 2)], reward=(0.0, level), log_ratio=(0.0, 4.0))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


class Page(HTMLParser):
    """Text of table cells, and classes."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.classes, self.texts, self._in = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.classes += dict(attrs).get("class", "").split()
        if tag in ("td", "th"):
            self.cells.append("")
            self._in = tag

    def handle_endtag(self, tag):
        self._in = None if tag == self._in else self._in

    def handle_data(self, data):
        self.texts.append(data)
        if self._in:
            self.cells[-1] = (self.cells[-1] + data).strip()


def test_runs_that_differ_in_their_seed_are_one_curve(tmp_path):
    runs = [
        make(tmp_path / "a", seed=0, level=0.4),
        make(tmp_path / "b", seed=1, level=0.6),
        make(tmp_path / "c", seed=0, beta=0.03, level=0.9),
    ]
    page = Page(write_comparison(runs, tmp_path / "page.html").read_text())
    table = page.cells[: 3 * 6]
    assert table[6:8] == ["beta=0.1", "2 (seeds 0, 1)"]
    assert table[12:14] == ["beta=0.03", "c"]
    assert table[9] == "0.487 (0.389 to 0.584)"  # means over the last two updates
    assert table[10] == "25.0% (20.0% to 30.0%)"
    assert table[16] == "45.0%"
    assert page.classes.count("band") >= 4  # of the first alone
    assert {"c0", "c1"} <= set(page.classes)
    assert "c2" not in page.classes
    settings = page.cells[18:]
    assert settings[:4] == ["setting", "a", "b", "c"]
    assert settings[4:8] == ["run.seed", "0", "1", "0"]
    assert settings[8:12] == ["loss.beta", "0.1", "0.1", "0.03"]
    assert len(settings) == 12  # run.dir is no difference


def test_the_mean_curve_and_its_band_are_those_of_the_runs(tmp_path):
    runs = [
        make(tmp_path / name, seed=i, level=x)
        for i, (name, x) in enumerate([("a", 0.4), ("b", 0.8)])
    ]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    (title,) = re.findall(r"<title>(a, step 20: [^<]*)</title>", text)[:1]
    assert title == "a, step 20: 0.6"  # held by no setting: named by its first run


def test_runs_of_many_settings_have_lines_of_their_own(tmp_path):
    runs = [make(tmp_path / str(i), beta=(i + 1) / 100) for i in range(10)]
    page = Page(write_comparison(runs, tmp_path / "page.html").read_text())
    assert "dashed" in page.classes
    assert {f"c{i}" for i in range(8)} <= set(page.classes)


def test_text_of_a_run_is_escaped(tmp_path):
    runs = [make(tmp_path / "a", model="<script>x"), make(tmp_path / "<b>")]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;x" in text
    assert "<b>" not in text.replace("<b>2</b>", "")


def test_runs_of_one_name_are_told_by_what_is_above_them(tmp_path):
    runs = [make(tmp_path / "x" / "run", beta=0.1), make(tmp_path / "y" / "run", beta=0.2)]
    page = Page(write_comparison(runs, tmp_path / "page.html").read_text())
    assert {"x/run", "y/run"} <= set(page.cells)


def test_runs_without_metrics_are_shown_too(tmp_path):
    empty = make(tmp_path / "empty")
    (empty / "metrics.jsonl").unlink()
    page = Page(write_comparison([empty, make(tmp_path / "a")], tmp_path / "page.html").read_text())
    assert any("2 (seeds 0, 0)" in cell for cell in page.cells)


def test_accuracies_and_held_out_rewards_share_no_chart(tmp_path):
    folders = [make(tmp_path / "a"), make(tmp_path / "b", beta=0.3)]
    lines = rows(20)
    lines[-1]["eval/reward"] = 7.5
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    text = write_comparison(folders, tmp_path / "page.html").read_text()
    assert "Held-out accuracy or Held-out reward" in text
    assert "beta=0.3, step 20: 7.5" in text
    assert "beta=0.1, step 20: 0.25" not in text


@pytest.mark.parametrize("steps", ["null", '"x"', "[1]"])
def test_a_summary_that_is_broken_stops_no_comparison(tmp_path, steps):
    folder = make(tmp_path / "a")
    (folder / "eval").mkdir()
    (folder / "eval" / "after.jsonl").write_text('{"prompt": "x", "reward": 1.0}\n')
    (folder / "summary.json").write_text(f'{{"steps": {steps}}}')
    text = write_comparison([folder, make(tmp_path / "b")], tmp_path / "page.html").read_text()
    assert "2 runs" in text
    assert "What looks wrong" not in write_report(folder).read_text()


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    runs = [str(make(tmp_path / name, beta=beta)) for name, beta in (("a", 0.1), ("b", 0.2))]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    assert main(["report", *runs, "--out", "other.html"]) == 0
    assert (tmp_path / "other.html").read_text() == (tmp_path / "comparison.html").read_text()


def test_a_folder_with_a_config_of_ones_own_is_no_run(tmp_path, capsys):
    assert main(["init", str(tmp_path / "task")]) == 0
    assert main(["report", str(tmp_path / "task")]) == 2
    assert "was written by hand; train it, then give its run.dir" in capsys.readouterr().err
    assert not (tmp_path / "task" / "report.html").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a", "a"], "a is given twice"),
        (["a", "nothing"], "nothing"),
        (["a", "b", "--out", "no/folder/x.html"], "can't be written"),
        (["a", "--out", "x.html"], "--out is for the page of several runs"),
    ],
)
def test_what_can_not_be_compared_is_refused(tmp_path, monkeypatch, capsys, given, told):
    for name in "ab":
        make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(["report", *given]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_the_report_shows_what_looks_wrong(tmp_path):
    folder = make(tmp_path / "a")
    assert "What looks wrong" not in write_report(folder).read_text()
    lines = rows(**{"completions/clipped_ratio": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    text = write_report(folder).read_text()
    assert "What looks wrong" in text
    assert "Completions are cut off" in text
