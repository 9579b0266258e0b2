"""The report tells the numbers of a run's files, whatever text they hold and however far it got."""

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from scipy import stats

from gvpo_jax.errors import UserError
from gvpo_jax.report.charts import Chart, Line, chart, ticks
from gvpo_jax.report.curves import held_out_curve, running_mean, series
from gvpo_jax.report.html import write_report
from gvpo_jax.report.intervals import difference_interval, mean_interval
from gvpo_jax.report.scores import task_names
from gvpo_jax.rundir.files import Evaluation

EVIL = (
    "</pre><script>alert('x')</script><img src=https://evil.example/x.png onerror=\"y\">&\x00\x1b"
    "{{ 7 * 7 }}{% raw %}"
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


def answers(rewards_by_question, *, completion="7", task="sum"):
    """Held-out rows, one list of rewards per question."""
    return [
        {"prompt": f"Q{q}", "completion": completion, "reward": reward, "task": task}
        for q, rewards in enumerate(rewards_by_question)
        for reward in rewards
    ]


def dump(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, *, steps=40, before=None, after=None, rewards=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: org/tiny\ntrain: {steps: 40, beta: 0.1}\n")
    rewards = rewards or [step / 100 for step in range(1, steps + 1)]
    metrics = [
        {"step": n, "reward": reward, "gvpo_mse": 0.1, "step_time": 2.0, "num_tokens": 50 * n}
        for n, reward in enumerate(rewards, 1)
    ]
    dump(folder / "metrics.jsonl", metrics)
    if before:
        dump(folder / "eval" / "before.jsonl", answers(before))
    if after:
        dump(folder / "eval" / "after.jsonl", answers(after))
        (folder / "summary.json").write_text(json.dumps({"steps": steps, "wall_seconds": 3600}))
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; `errors` holds tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.errors, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        self.errors += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_report_of_a_whole_run_tells_its_numbers(tmp_path):
    before, after = [[0, 1], [0, 0], [0, 0], [1, 0]], [[1, 1], [0, 1], [1, 0], [1, 1]]
    page = page_of(make_run(tmp_path / "my-run", before=before, after=after))
    assert not page.errors
    for text in ("my-run", "finished", "org/tiny", "25.0% → 75.0%", "+50.0 points", "60 min"):
        assert text in page.text
    assert "4 questions \u00d7 2 samples" in page.text
    assert "beta 0.1" in page.text


def test_interval_of_a_change_stays_within_what_a_change_can_be(tmp_path):
    run = make_run(tmp_path / "run", before=[[0], [0], [0]], after=[[1], [1], [0]])
    assert "95% interval \u221276.8 to +100.0, paired" in page_of(run).text  # 2/3 -+ 4.303 x 1/3


def test_report_needs_no_network_and_no_scripts(tmp_path):
    run = make_run(tmp_path / "run", before=[[0], [1]], after=[[1], [1]])
    text = write_report(run).read_text()
    assert not re.search(r"(?:https?:)?//\w", text)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name in ("src", "srcset") or name[:2] == "on"
    ]
    assert all(value[:1] == "#" for name, value in page.attributes if name == "href")
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_every_text_of_a_run_is_escaped(tmp_path):
    run = make_run(tmp_path / "<b>&run", before=[[0], [1]], after=[[1], [1]])
    (run / "config.yaml").write_text(json.dumps({"model": EVIL, EVIL: {EVIL: [EVIL]}}))
    row = {"prompt": EVIL, "completion": EVIL, "reward": 1, "task": EVIL, "solution": EVIL}
    row["answer_prefix"] = EVIL
    for name in ("eval/before", "eval/after", "completions/step_000040"):
        dump(run / f"{name}.jsonl", [row, {**row, "task": f"2{EVIL}"}])
    dump(run / "metrics.jsonl", [{"step": 1, "reward": 0.1, EVIL: 0.5}])
    page = page_of(run)
    assert not page.errors
    assert not {"script", "img"} & set(page.tags)
    assert "<b>&run" in page.text
    assert page.text.count("<script>alert('x')</script>") > 10
    assert page.text.count("&\ufffd\ufffd{{ 7 * 7 }}{% raw %}") > 10
    assert not [name for name, _ in page.attributes if name == "onerror"]


def test_chat_prompts_and_missing_rewards_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    rows = [{"prompt": chat, "completion": c, "reward": r} for c, r in (("a", 1), ("b", None))]
    dump(run / "completions" / "step_000010.jsonl", rows[:1])
    dump(run / "completions" / "step_000020.jsonl", [*rows, {**rows[0], "reward": 0}])
    text = page_of(run).text
    assert "system: Be brief." in text
    assert "sampled at step 20" in text
    assert "a +0.50 1 b no reward a \u22120.50 0" in text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "eval", "summary.json", "config.yaml"])
def test_half_finished_runs_have_a_report(tmp_path, missing):
    run = make_run(tmp_path / "run", before=[[0], [1]], after=[[1], [1]])
    path = run / missing
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    assert not page_of(run).errors


def test_run_under_way_says_how_far_it_is_and_compares_the_latest_evaluation(tmp_path):
    run = make_run(tmp_path / "run", steps=23, before=[[0], [1]])
    dump(run / "eval" / "step_000010.jsonl", answers([[0], [0]]))
    dump(run / "eval" / "step_000020.jsonl", answers([[1], [1]]))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "rew')
    text = page_of(run).text
    assert "step 23 of 40" in text
    assert "50.0% → 100.0%" in text
    assert "Held-out accuracy, step 20" in text
    assert "finished" not in text


def test_rows_that_say_whether_they_are_correct_are_counted_by_that(tmp_path):
    run = make_run(tmp_path / "run")
    rows = answers([[0.5], [0.4], [None], [9.0]])
    correct = [{**row, "correct": n in (0, 3)} for n, row in enumerate(rows)]
    dump(run / "eval" / "before.jsonl", correct)
    assert "Held-out accuracy 50.0%" in page_of(run).text


def test_equal_questions_with_different_numbers_are_different_questions(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"prompt": "Q", "completion": "", "reward": 1, "group": n} for n in (0, 0, 1, 1)]
    dump(run / "eval" / "before.jsonl", rows)
    assert "2 questions \u00d7 2 samples" in page_of(run).text


def test_run_made_longer_dates_its_old_end_by_its_summary(tmp_path):
    run = make_run(tmp_path / "run", steps=30, before=[[0], [1]], after=[[1], [1]])
    (run / "summary.json").write_text(json.dumps({"steps": 20}))
    dump(run / "eval" / "step_000030.jsonl", answers([[0], [0]]))
    text = page_of(run).text
    assert "Held-out accuracy, step 30 50.0% → 0.0%" in text
    assert "step 20: 100.0%" in text
    assert "step 30 of 40" in text


def test_failed_rewards_are_drawn_only_where_there_are_any(tmp_path):
    run = make_run(tmp_path / "run")
    for failed in (0.0, 2.0):
        dump(run / "metrics.jsonl", [{"step": 1, "reward": 0.1, "rewards/failed": failed}])
        assert ("Failed rewards" in page_of(run).text) == (failed > 0)


def test_settings_that_a_run_never_writes_are_not_blown_up(tmp_path):
    """30 lines with aliases stand for 2^30 values."""
    lines = [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31)]
    (tmp_path / "config.yaml").write_text("a0: &a0 [x]\n" + "".join(lines))
    assert "*a29, *a29" in write_report(tmp_path).read_text()


def test_run_with_only_settings_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("model: debug\n")
    assert "debug" in page_of(tmp_path).text


def test_values_that_are_not_finite_are_told_and_break_the_line(tmp_path):
    run = make_run(tmp_path / "run", rewards=[0.1, 0.2, None, 0.4, 0.5])
    text = write_report(run).read_text()
    assert "Not finite at 1 of 5 points." in text
    titles = [text.count(f"<title>step {n}: ") for n in (2, 3, 4)]
    assert titles[1] == titles[0] - 1 == titles[2] - 1


def test_rewards_outside_zero_to_one_are_not_called_accuracy(tmp_path):
    run = make_run(tmp_path / "run", before=[[-2.0], [3.0], [1.0]], after=[[2.0], [5.0], [2.0]])
    text = page_of(run).text
    assert "Held-out reward 0.667 → 3" in text
    assert "%" not in text.replace("95%", "")


def test_a_folder_that_is_no_run_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


# Intervals


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (41, 97)])
def test_one_sample_per_question_gives_wilsons_interval(right, count):
    interval = mean_interval([[1.0]] * right + [[0.0]] * (count - right))
    oracle = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert interval.mean == pytest.approx(right / count)
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_samples_that_repeat_each_other_add_nothing():
    scores = [[1.0], [0.0], [0.0], [1.0], [0.0]]
    assert mean_interval([group * 8 for group in scores]) == mean_interval(scores)


def test_intervals_cover_the_truth_although_samples_of_a_question_are_alike():
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        chances = [rng.betavariate(0.4, 0.9) for _ in range(64)]
        interval = mean_interval([[float(rng.random() < p) for _ in range(4)] for p in chances])
        covered += interval.low <= 0.4 / 1.3 <= interval.high
    assert 0.93 < covered / 1000 < 0.97  # taking all 256 samples as independent: 0.83


def test_scores_outside_zero_to_one_and_differences_get_students_interval():
    before, after = [0.5, -2.0, 3.0, 1.0], [1.5, 0.0, 2.5, 4.0]
    interval = mean_interval([[score] for score in before])
    oracle = stats.t.interval(0.95, 3, loc=0.625, scale=stats.sem(before))
    assert (interval.low, interval.high) == pytest.approx(oracle)
    change = difference_interval(before, after)
    oracle = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((oracle.low, oracle.high))
    with pytest.raises(ValueError, match="argument 2"):
        difference_interval([1.0], [1.0, 2.0])


def test_one_question_gives_no_interval_outside_zero_to_one_and_a_wide_one_inside():
    assert math.isnan(mean_interval([[2.0, 3.0]]).low)
    for scores in ([1.0] * 64, [1.0, 0.0] * 32):
        inside = mean_interval([scores])
        assert inside.high - inside.low > 0.7


# Curves


def test_running_mean_by_hand():
    assert running_mean([1, 2, 6, None, 4], window=3) == pytest.approx([1, 3, 4, None, 4])
    assert running_mean([5.0, 1.0], window=1) == [5.0, 1.0]
    assert running_mean([0, 2, 4, 6, 13], window=5) == pytest.approx([1, 2, 5, 23 / 3, 9.5])


def test_long_series_are_joined_to_means_with_their_extremes():
    rows = [{"step": n, "a": float(n % 4)} for n in range(1, 641)]
    line = series(rows, "a")
    assert len(line.ys) == 160
    assert (line.xs[0], line.ys[0], line.spans[0]) == (4, 1.5, (0.0, 3.0))
    assert line.titles[0] == "steps 1 to 4, mean: 1.5"


def test_held_out_curve_takes_files_before_metrics():
    rows = [{"step": 1}, {"step": 2, "eval/accuracy": 0.3}, {"step": 4, "eval/accuracy": 0.9}]
    curve = held_out_curve(
        rows,
        [Evaluation("before", 0, answers([[0], [1]])), Evaluation("after", 4, answers([[1], [1]]))],
    )
    assert {step: value for step, (value, _) in curve.items()} == {0: 0.5, 2: 0.3, 4: 1.0}
    assert curve[2][1] is None
    assert curve[4][1] == mean_interval([[1], [1]])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.13, 0.48, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (-3.0, 5.0, [-4, -2, 0, 2, 4, 6]),
        (0.0, 0.0, [0, 0.25, 0.5, 0.75, 1]),
        (1e-5, 1e-5, [9e-6, 9.5e-6, 1e-5, 1.05e-5, 1.1e-5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_chart_places_values_where_they_belong():
    lines = [Line([0, 5, 10], [0.0, None, 1.0], "faint", titles=["a", "b", "<c>"])]
    root = ET.fromstring(chart(Chart(lines, 'a "label"', size=(340, 190))))
    assert root.get("aria-label") == 'a "label"'
    dots = [(c.get("cx"), c.get("cy")) for c in root.iter("circle")]
    assert [tuple(map(float, dot)) for dot in dots] == [(44, 164), (330, 20)]  # inside the margins
    assert [title.text for title in root.iter("title")] == ["a", "<c>"]
    assert len([p for p in root.iter("path") if p.get("class") == "line faint"]) == 2


@pytest.mark.parametrize("ys", [[], [None], [0.0], [3.0, 3.0], [1e300, -1e300], [1e-300, 0.0]])
def test_charts_of_odd_values_are_drawn(ys):
    text = chart(Chart([Line(list(range(len(ys))), ys)], "odd"))
    ET.fromstring(text)
    assert "nan" not in text
    assert "inf" not in text


def test_points_that_are_not_finite_are_counted_by_steps_also_where_steps_are_joined(tmp_path):
    rewards = [None if n in (3, 5, 400) else 0.5 for n in range(640)]
    run = make_run(tmp_path / "run", rewards=rewards)
    assert "Not finite at 3 of 640 points." in page_of(run).text


def tasks(*names, prompts_each=2):
    return [
        {"prompt": f"Q{n}{i}", "task": name}
        for n, name in enumerate(names)
        for i in range(prompts_each)
    ]


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (tasks("sum", "gcd"), ["gcd", "sum"]),
        ([*tasks("sum", "gcd"), {"prompt": "?", "task": None}, {"prompt": "!"}], ["gcd", "sum"]),
        (tasks("sum"), []),
        (tasks("sum", "gcd", prompts_each=1), []),  # one for each prompt
        (tasks(*(f"t{n}" for n in range(64))), sorted(f"t{n}" for n in range(64))),
        (tasks(*(f"t{n}" for n in range(65))), []),
        (tasks("x" * 65, "gcd"), []),
        (tasks("two\nlines", "gcd"), []),
        (tasks("half \ud83d", "gcd"), []),
        (tasks(1, "two"), []),
        (tasks(["a"], ["b"]), []),
        (tasks({"id": 1}, {"id": 2}), []),
        (tasks(None, None), []),
    ],
)
def test_tasks_are_a_few_short_texts(rows, names):
    assert task_names(rows) == names


@pytest.mark.parametrize("odd", [None, ["a"], {"id": 1}, 3, "x\ny", "\ud83d", "w" * 900])
def test_a_report_is_drawn_whatever_a_column_task_holds(tmp_path, odd):
    run = make_run(tmp_path / "run", before=[[0], [1]], after=[[1], [1]])
    for name in ("before", "after"):
        rows = answers([[0], [1], [0.5]])
        dump(run / "eval" / f"{name}.jsonl", [{**rows[0], "task": odd}, *rows[1:]])
    page = page_of(run)
    assert not page.errors
    assert "by task" not in page.text


def test_rewards_between_zero_and_one_are_not_called_accuracy(tmp_path):
    run = make_run(tmp_path / "run", before=[[0.0], [0.25], [1.0]], after=[[0.5], [1.0], [1.0]])
    dump(run / "metrics.jsonl", [{"step": 0, "eval/reward": 0.4}, {"step": 40, "eval/reward": 0.8}])
    text = page_of(run).text
    assert "Held-out reward 0.417 \u2192 0.833" in text
    assert "accuracy" not in text


def test_evaluations_are_compared_by_reward_where_one_has_no_accuracy(tmp_path):
    run = make_run(tmp_path / "run")
    right = [{**row, "correct": bool(row["reward"])} for row in answers([[0], [1], [0], [0]])]
    dump(run / "eval" / "before.jsonl", right)
    dump(run / "eval" / "after.jsonl", answers([[0.5], [1], [0.5], [2]]))
    assert "Held-out reward, after 0.25" not in page_of(run).text
    assert "Held-out reward 0.25 \u2192 1" in page_of(run).text


def test_what_a_run_left_out_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    dump(run / "metrics.jsonl", [{"step": 1, "left_out/training_rows": 3, "reward": 0.1}])
    text = page_of(run).text
    assert "Left out: 3 prompts skipped: over data.max_prompt_length tokens." in text
    (run / "summary.json").write_text(json.dumps({"steps": 1, "left_out/groups": 0}))
    dump(run / "metrics.jsonl", [{"step": 1, "reward": 0.1}])
    assert "Left out: nothing." in page_of(run).text
