"""A language model as judge, on a stand-in of its server."""

import asyncio
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.rewards import RewardConfig, RewardError, compute_rewards
from gvpo_jax.rewards.functions import code_fingerprint, function_names
from gvpo_jax.rewards.judge import LLMJudge

TEMPLATE = "Q: {prompt}\nA: {completion}\nRight: {solution}"


class Stub(ThreadingHTTPServer):
    """Answers with what `reply(body)` gives: a text, a status, or bytes of an answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.headers, self.reply, self.delay = [], [], lambda body: "Grade: 7", 0.0
        self.under_way = self.most = 0
        self.count = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.count:
            stub.asked.append((self.path, body))
            stub.headers.append(dict(self.headers))
            stub.under_way += 1
            stub.most = max(stub.most, stub.under_way)
        time.sleep(stub.delay)
        said = stub.reply(body)
        with stub.count:
            stub.under_way -= 1
        status = said if isinstance(said, int) else 200
        if isinstance(said, str):
            said = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        content = said if isinstance(said, bytes) else b'{"error": {"message": "no\\nway"}}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing on the screen."""


@pytest.fixture
def stub():
    with Stub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def rewards(judge, completions=("a", "b"), **changes):
    some = {"prompts": ["p"] * len(completions), "columns": {"solution": ["s"] * len(completions)}}
    ids = [[1]] * len(completions)
    return compute_rewards([judge], completions=completions, completion_ids=ids, **some | changes)


def test_a_grade_becomes_a_reward(stub):
    stub.reply = lambda body: (
        "Fine. Grade: 3\nNo, **Grade: 7.5**" if "A: a" in str(body) else ("Grade: 10")
    )
    judge = LLMJudge(stub.url + "/v1/", "m", TEMPLATE, system="Be fair.", options={"seed": 1})
    scores = rewards(judge)
    assert list(scores.rewards) == [0.75, 1.0]
    assert list(scores.by_func) == ["judge"]
    path, body = min(stub.asked, key=str)
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "temperature": 0.0,
        "seed": 1,
        "messages": [
            {"role": "system", "content": "Be fair."},
            {"role": "user", "content": "Q: p\nA: a\nRight: s"},
        ],
    }


def test_chats_are_shown_as_texts(stub):
    judge = LLMJudge(stub.url, "m", "{prompt}|{completion}")
    prompts = [
        [{"role": "user", "content": "one"}],
        [{"role": "system", "content": "be {brief}"}, {"role": "user", "content": "two"}],
    ]
    rewards(judge, [[{"role": "assistant", "content": x}] for x in ("a", "b")], prompts=prompts)
    asked = sorted(body["messages"][-1]["content"] for _, body in stub.asked)
    assert asked == ["one|a", "system: be {brief}\nuser: two|b"]


def test_questions_that_are_alike_are_asked_once(stub):
    judge = LLMJudge(stub.url, "m", TEMPLATE)
    assert list(rewards(judge, ["a", "a", "b", "a"]).rewards) == [0.7] * 4
    rewards(judge, ["b", "c"])
    assert len(stub.asked) == 3


def test_grades_are_kept_from_run_to_run(stub, tmp_path):
    cache = tmp_path / "grades.jsonl"
    rewards(LLMJudge(stub.url, "m", TEMPLATE, cache=cache))
    with cache.open("a") as file:
        file.write('{"key": "cut o')
    again = LLMJudge(stub.url, "m", TEMPLATE, cache=cache)
    assert list(rewards(again).rewards) == [0.7, 0.7]
    assert len(stub.asked) == 2
    rewards(LLMJudge(stub.url, "m", TEMPLATE, cache=cache, full_marks=20))  # other rewards
    assert len(stub.asked) == 4


def test_so_many_are_under_way_at_a_time(stub):
    stub.delay = 0.05
    judge = LLMJudge(stub.url, "m", TEMPLATE, concurrency=3)
    rewards(judge, [str(i) for i in range(12)])
    assert stub.most == 3


def test_so_many_begin_in_a_minute(stub):
    judge = LLMJudge(stub.url, "m", TEMPLATE, per_minute=600)  # one in 0.1 s
    begin = time.monotonic()
    rewards(judge, [str(i) for i in range(6)])
    assert time.monotonic() - begin > 0.5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(stub, status):
    stub.reply = lambda body: status if len(stub.asked) < 3 else "Grade: 1"
    assert list(rewards(LLMJudge(stub.url, "m", TEMPLATE), ["a"]).rewards) == [0.1]
    assert len(stub.asked) == 3


@pytest.mark.parametrize(
    ("reply", "told", "asked"),
    [
        (400, "HTTP 400: no way", 1),
        (401, "HTTP 401: no way", 1),
        (503, r"HTTP 503: no way \(tried 2 times\)", 2),
        ("I can't say", 'no grade in the answer, which ends with "I can\'t say"', 1),
        ("Grade: 11", "the grade 11 is not from 0 to 10", 1),
        ("Grade: -1", "the grade -1 is not from 0 to 10", 1),
        (b"<html>", r"the answer is not JSON: '<html>' \(tried 2 times\)", 2),
        (b'{"choices": []}', "an answer of another form", 1),
        (b"[" * 100_000, "the answer is not JSON", 2),
    ],
)
def test_a_completion_without_a_grade_has_failed(stub, reply, told, asked):
    stub.reply = lambda body: reply if "A: a" in str(body) else "Grade: 5"
    judge = LLMJudge(stub.url, "m", TEMPLATE, retries=1)
    with pytest.raises(RewardError, match=told) as caught:
        rewards(judge)
    assert "\n" not in str(caught.value)
    assert sum("A: a" in str(body) for _, body in stub.asked) == asked
    scores = rewards(judge, on_error="skip")
    assert (scores.failed, scores.rewards[1]) == (1, 0.5)


def test_a_question_that_can_not_be_written_fails_its_row_alone(stub):
    judge = LLMJudge(stub.url, "m", "{completion} {prompt} {solution:.3}")
    scores = rewards(
        judge,
        ["{a} {{b}} {0}", "\ud800", "c"],
        columns={"solution": ["s", "s", 5]},
        on_error="skip",
    )
    assert scores.failed == 2
    assert scores.rewards[0] == 0.7
    assert stub.asked[0][1]["messages"][0]["content"] == "{a} {{b}} {0} p s"


def test_a_cache_that_was_cut_off_goes_on(stub, tmp_path):
    cache = tmp_path / "grades.jsonl"
    cache.write_text('{"key": "x", "reward": 1' + "0" * 400 + '}\n[1]\n{"key": "a')
    for _ in range(2):
        assert list(rewards(LLMJudge(stub.url, "m", TEMPLATE, cache=cache)).rewards) == [0.7, 0.7]
    assert len(stub.asked) == 2


def test_a_slow_answer_and_no_server_at_all(stub):
    stub.delay = 3
    slow = LLMJudge(stub.url, "m", TEMPLATE, timeout=0.2, retries=0)
    with pytest.raises(RewardError, match=r"no answer within 0.2 s \(tried once\)"):
        rewards(slow, ["a"])
    nobody = LLMJudge("http://127.0.0.1:9", "m", TEMPLATE, retries=0)
    with pytest.raises(RewardError, match="ConnectionRefusedError"):
        rewards(nobody, ["a"])


def test_the_key_is_sent_and_never_shown(stub, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    stub.reply = lambda body: 401
    judge = LLMJudge(stub.url, "m", TEMPLATE, api_key_env="JUDGE_KEY")
    with pytest.raises(RewardError) as caught:
        rewards(judge, ["a"])
    assert stub.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(caught.value) + judge.own_code + repr(judge)


def test_another_server_is_the_same_judge(tmp_path):
    here, there = (
        LLMJudge(f"http://localhost:{port}", "m", TEMPLATE, cache=tmp_path / "grades.jsonl")
        for port in (1, 2)
    )
    assert code_fingerprint(here) == code_fingerprint(there)


def test_another_template_is_other_code(stub):
    prints = {
        code_fingerprint(LLMJudge(stub.url, model, template, full_marks=marks))
        for model in ("m", "n")
        for template in (TEMPLATE, "{completion}")
        for marks in (5, 10)
    }
    assert len(prints) == 8


def test_a_column_that_is_not_there_is_named_before_anything_is_asked(stub):
    judge = LLMJudge(stub.url, "m", "{completion} {rubric}")
    with pytest.raises(UserError, match="'judge' needs rubric"):
        rewards(judge)
    assert not stub.asked


def test_judges_have_the_names_under_which_they_are_found(tmp_path):
    (tmp_path / "judges.py").write_text(
        "from gvpo_jax.rewards.judge import LLMJudge\n"
        "made = lambda **more: LLMJudge('http://localhost:1', 'm', '{completion}', **more)\n"
        "helpful, short, told = made(), made(), made(name='other')\n"
    )
    specs = [f"{tmp_path}/judges.py:{name}" for name in ("helpful", "short", "told")]
    judges = RewardConfig(funcs=specs).functions()
    assert function_names(judges) == ["helpful", "short", "other"]


def test_it_works_in_event_loops_that_come_and_go(stub):
    judge = LLMJudge(stub.url, "m", "{completion}")
    for text in "ab":
        assert asyncio.run(judge(["p"], [text])) == [0.7]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"url": "localhost:8000"}, "is not the address of a server"),
        ({"url": "http://user:pw@host"}, "holds no name, key or query .*: use api_key_env"),
        ({"template": "{prompt}"}, "must show the {completion}"),
        ({"template": "{completion} {0}"}, "double a brace that is text"),
        ({"template": "{completion} {"}, "double a brace that is text"),
        ({"template": "{completion.text}"}, "name prompt, completion or a column"),
        ({"grade": "("}, "is no regular expression"),
        ({"grade": r"\d+"}, "needs a group"),
        ({"full_marks": 0}, "must be above 0"),
        ({"full_marks": float("nan")}, "must be above 0"),
        ({"full_marks": "10"}, "must be above 0"),
        ({"concurrency": 0}, "must be above 0"),
        ({"api_key_env": "NOT_THERE"}, "api_key_env=NOT_THERE: this environment variable is empty"),
        ({"concurrency": 1.5}, "whole numbers"),
        ({"timeout": 0}, "must be above 0"),
        ({"retries": -1}, "give 0 or more"),
        ({"options": {"x": {1}}}, "are no JSON"),
        ({"options": {"stream": True}}, "can't set stream"),
        ({"cache": "/no/such/folder/x.jsonl"}, "there is no such folder"),
        ({"api_key_env": "sk-123"}, "not a key"),
        ({"cache": "/"}, "can't be read"),
    ],
)
def test_what_makes_no_judge_is_refused(changes, told):
    given = {"url": "http://localhost:8000", "model": "m", "template": TEMPLATE} | changes
    with pytest.raises(UserError, match=told) as caught:
        LLMJudge(**given)
    assert not re.search("pw|sk-123", str(caught.value))
