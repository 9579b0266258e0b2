"""Whole runs whose completions are sampled on servers: stubs that load what the trainer writes."""

import functools
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest
import small_run
import test_distributed as processes
from http_stub import OWN_EOS, Logits, StubServer, network_of

from gvpo_jax.cli import main
from gvpo_jax.config import Config
from gvpo_jax.config_file import difference, load_config, override
from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.parallel import distributed
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rollout import SamplingParams
from gvpo_jax.rollout.servers.client import Client
from gvpo_jax.rundir.claim import lock
from gvpo_jax.rundir.files import read_jsonl, read_metrics
from gvpo_jax.trainer import Trainer

MODEL = load_model("debug")
ROWS = [{"prompt": f"Spell {word}: "} for word in ("ash", "birch", "cedar", "fir", "oak")]
LOADING = ("/collective_rpc", "/update_weights_from_disk")
SYNC = {
    "sync/logp_difference/mean", "sync/logp_difference/max", "sync/write_seconds",
    "sync/load_seconds",
}  # fmt: skip
network = network_of(MODEL.config)


def from_folder(folder: str) -> Logits:
    """What a server does: it reads the files, and knows nothing of the trainer."""
    return network(load_model(folder).params)


def server() -> StubServer:
    return StubServer(network(MODEL.params), from_folder)


def config(run_dir, *stubs: StubServer, **settings):
    servers = {
        "servers__kind": "vllm",
        "servers__urls": [stub.url for stub in stubs],
        "servers__timeout": 20.0,
        "servers__retries": 0,
    }
    return small_run.config(run_dir, **servers | settings)


def train(run_dir, *stubs: StubServer, **settings) -> Trainer:
    trainer = Trainer(config(run_dir, *stubs, **settings), load_model("debug"))
    trainer.train(ROWS, letter_share, eval_dataset=ROWS[:2])
    return trainer


def loads(stub: StubServer) -> int:
    return sum(stub.paths().count(path) for path in LOADING)


@pytest.fixture(autouse=True)
def _no_threads_stay():
    before = set(threading.enumerate())
    yield
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("rollout")]


@pytest.mark.parametrize("protocol", ["vllm", "vllm-tpu", "sglang"])
def test_a_run_samples_on_servers_that_follow_it(tmp_path, protocol):
    stops = [OWN_EOS] if protocol == "sglang" else []
    with server() as a, server() as b:
        a.on_tpu = b.on_tpu = protocol == "vllm-tpu"
        trainer = train(
            tmp_path, a, b, servers__kind=protocol, rollout__stop_token_ids=stops,
            eval__every=2, mesh__fsdp=2,
        )  # fmt: skip
        assert loads(a) == loads(b) == 5  # of what 0, 1, 2, 3 and 4 updates made
        for stub in (a, b):
            np.testing.assert_array_equal(
                stub.logits([1, 2, 3]),
                network(jax.device_get(trainer.policy.state.params))([1, 2, 3]),
            )
    logged = {line["step"]: line for line in read_metrics(tmp_path) if "loss" in line}
    assert sorted(logged) == [1, 2, 3, 4]
    for line in logged.values():
        assert line.keys() >= SYNC
        assert line["sync/logp_difference/mean"] <= line["sync/logp_difference/max"] < 1e-4
        assert line["sync/write_seconds"] > 0
    assert logged[1]["kl"] == pytest.approx(0, abs=1e-9)
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == [
        "after.jsonl", "before.jsonl", "step_000002.jsonl",
    ]  # fmt: skip
    kept = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert kept == ["version-00000004", "version-00000005"]


def test_all_completions_of_a_run_are_a_servers(tmp_path):
    sampled = []

    def hear(path, answer):
        if path == "/v1/completions" and len(answer["choices"]) == 4:
            tokens = [choice["token_ids"] for choice in answer["choices"]]
            sampled.append(MODEL.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return answer

    with server() as stub:
        stub.tamper = hear
        train(tmp_path, stub, train__steps=1)
    written = []
    for file in ("eval/before", "completions/step_000001", "eval/after"):
        rows = read_jsonl(tmp_path / f"{file}.jsonl")
        written += [[row["completion"] for row in rows[i : i + 4]] for i in range(0, 8, 4)]
    assert sorted(sampled) == sorted(written)
    assert len(written) == 6


VARIANTS = {
    "plain": {"eval__every": 2},
    "ahead": {"rollout__lookahead": 1, "eval__every": 2, "loss__name": "grpo", "train__steps": 6},
    "reuse": {
        "train__steps_per_generation": 2,
        "train__num_iterations": 2,
        "replay__groups": 1,
        "train__steps": 8,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_goes_on_with_other_servers_is_the_uninterrupted_one(tmp_path, variant):
    settings, whole, parts = VARIANTS[variant], tmp_path / "whole", tmp_path / "parts"
    with server() as stub:
        uninterrupted = train(whole, stub, **settings)
    with server() as stub:
        train(parts, stub, train__stop_at=settings.get("train__steps", 4) // 2, **settings)
    with server() as a, server() as b:
        resumed = train(parts, a, b, servers__weights_dir=str(tmp_path / "w"), **settings)
        assert loads(a) == loads(b) > 0
    for x, y in zip(
        jax.tree.leaves(uninterrupted.policy.state),
        jax.tree.leaves(resumed.policy.state),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    clocks = SYNC | {"step_time", "tokens_per_second"}
    logs = [[{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(run)]
            for run in (whole, parts)]  # fmt: skip
    assert logs[0] == logs[1]
    for folder in ("eval", "completions"):
        for file in (whole / folder).iterdir():
            assert file.read_bytes() == (parts / folder / file.name).read_bytes(), file


def test_unknown_log_probs_change_nothing_in_gvpo(tmp_path):
    """At another temperature this server's are of no use: they are NaN, and reach no number."""
    trained = []
    for processed in (False, True):
        with server() as stub:
            stub.processed = processed
            run = tmp_path / str(processed)
            trained.append(train(run, stub, rollout__temperature=0.7, replay__completions=1))
        for line in read_metrics(run):
            assert all(value is not None and np.isfinite(value) for value in line.values()), line
    a, b = (jax.tree.leaves(trainer.policy.state.params) for trainer in trained)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_samples_are_those_of_the_weights_that_were_asked_for(tmp_path):
    """Evaluation and a round drawn ahead want different ones, and so does a trainer after a run."""
    with server() as stub:
        trainer = train(tmp_path, stub, train__steps=1)
        prompts = [MODEL.tokenizer.encode(row["prompt"]) for row in ROWS]
        before = trainer.policy.snapshot()
        trainer.train_step(["a: "], [["b", "c"]], [[1.0, 0.0]])
        for params in (before, None, before):
            params = trainer.policy.params if params is None else params
            rollout = trainer.engine.generate(
                params,
                prompts,
                range(5),
                num_generations=3,
                max_completion_length=6,
                sampling=SamplingParams(),
                seed=1,
            )
            padded, lengths = pad_prompts(prompts)
            batch = {
                "prompts": padded,
                "prompt_lengths": lengths,
                "completions": rollout.completions,
            }
            expected = np.array(trainer.policy._programs.token_logps(params, batch))
            expected[np.arange(6) >= rollout.lengths[..., None]] = 0
            np.testing.assert_allclose(rollout.old_logps, expected, atol=1e-4)
        trainer.engine.close()


# Failures, through the command line.

SHORT = [
    "servers.kind=vllm", "servers.retries=0", "rollout.num_generations=4", "mesh.fsdp=1",
    "train.batch_size=2", "train.steps=4", "data.eval_size=2", "eval.every=0",
    "checkpoint.every=1", "log.samples=0",
]  # fmt: skip


def on(*urls: str) -> str:
    return f"servers.urls=[{','.join(urls)}]"


@pytest.fixture
def refused(capfd):
    """The one line on stderr of a command that ends with status 2, without its page."""

    def refused(*arguments: object) -> str:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        err = capfd.readouterr().err
        assert status == 2, err
        assert err.startswith("gvpo-jax: error: "), err
        line, *more = err.splitlines()
        assert len(more) == 0 or (len(more) == 1 and more[0].startswith("see https://")), err
        assert len(line) < 450
        return f"{line}\n"

    return refused


def after(good: int, stub: StubServer, then) -> None:
    """Let a stub go wrong once it has loaded so many versions well."""
    left = iter(range(good))

    def load(folder: str) -> Logits:
        if next(left, None) is None:
            return then(folder)
        return from_folder(folder)

    stub.load = load


def spoil(stub: StubServer, folder: str) -> Logits:
    stub.tamper = lambda path, answer: {"object": "error"}
    return from_folder(folder)


FAILURES = {
    "garbage": (spoil, "an answer of another form"),
    "old weights": (lambda stub, _: stub.logits, "did not load version 3 of the weights"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_goes_wrong_ends_the_run_after_its_last_checkpoint(
    tmp_path, refused, failure
):
    then, message = FAILURES[failure]
    run = tmp_path / "run"
    with server() as stub:
        after(2, stub, functools.partial(then, stub))
        line = refused("train", "debug", f"run.dir={run}", *SHORT, on(stub.url))
    assert stub.url in line
    assert message in line
    assert (run / "checkpoints" / "2").is_dir()
    with server() as stub:
        assert main(["train", str(run), on(stub.url)]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def nowhere() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_a_server_that_is_not_there(tmp_path, refused, capfd):
    run, url = tmp_path / "run", nowhere()
    start = ["train", "debug", f"run.dir={run}", *SHORT]
    line = refused(*start, on(url))
    assert f"{url}/collective_rpc, loading version-00000001: ConnectionRefusedError" in line
    with server() as stub:
        assert main([*start, on(stub.url), "train.stop_at=2"]) == 0
        line = refused(*start, on(stub.url, url), "rollout.lookahead=0")
        assert url in line
        assert (run / "checkpoints" / "2").is_dir()
        assert main([*start, on(stub.url)]) == 0
        capfd.readouterr()
        # Evaluation brings the last checkpoint's weights, and samples as the run did.
        assert main(["eval", str(run), on(stub.url)]) == 0
        assert 0 <= json.loads(capfd.readouterr().out)["eval/accuracy"] <= 1
        latest, last = (run / "eval" / f"{name}.jsonl" for name in ("latest", "after"))
        assert latest.read_bytes() == last.read_bytes()
        with lock(run):
            line = refused("eval", run)
    assert "another process is training in" in line
    assert "or sample here: servers.kind=none 'servers.urls=[]'" in line
    assert stub.url in refused("eval", run)
    line = refused("eval", run, "servers.kind=none")
    assert "asks no servers: choose another kind, or servers.urls=[]" in line
    here = ["servers.kind=none", "servers.urls=[]"]
    assert main(["eval", str(run), *here]) == 0


def test_a_sampler_ahead_does_not_keep_a_failed_run_waiting(tmp_path):
    """The reward fails while the next round waits for a server that never answers."""
    failed = []
    with server() as stub:

        def failing(prompts, **_):
            stub.faults.extend(["hang"] * 8)
            failed.append(time.monotonic())
            raise ZeroDivisionError("on purpose")

        with pytest.raises(UserError, match="on purpose"):
            Trainer(config(tmp_path, stub, rollout__lookahead=2), load_model("debug")).train(
                ROWS, failing
            )
        assert time.monotonic() - failed[0] < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kind=vllm"], "servers.kind=vllm needs servers.urls, e.g. [http://localhost:80"),
        (["urls=[http://a:1]"], "servers.kind=none asks no servers: choose another kind, or"),
        (["kind=vllm", "urls=[http://a:1,http://a:1]"], "names a server twice"),
        (
            ["kind=vlm", "urls=[http://a:1]"],
            "servers.kind must be one of none, vllm, vllm-tpu, sglang, got 'vlm'",
        ),
        (["kind=vllm", "urls=[http://a:1]", "timeout=0"], "between 1 and 86400, got 0.0"),
        (["kind=vllm", "urls=[http://a:1]", "timeout=inf"], "between 1 and 86400, got inf"),
        (["kind=vllm", "urls=[http://a:1]", "retries=-1"], "between 0 and 100, got -1"),
        (["kind=vllm", "urls=[http://a:1]", "concurrency=0"], "at least 1, got 0"),
        (["kind=vllm", "urls=[http://a:1]", "logp_tolerance=0"], "must be > 0, got 0.0"),
        (["kind=vllm", "urls=[http://a:1]", "logp_tolerance=nan"], "must be > 0, got nan"),
        (
            ["kind=vllm", "urls=[http://a:1]", "weights_dtype=int8"],
            "must be one of float32, bfloat16, got 'int8'",
        ),
        (["kind=vllm", "urls=[http://a:1]", "api_key_env=sk-x"], "variable, not a key"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UserError) as error:
        load_config("debug", [f"servers.{setting}" for setting in settings])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "sk-x" not in str(error.value)


def test_servers_that_nothing_is_asked_of_are_refused():
    given = ["servers.kind=sglang", "servers.urls=http://a:1"]  # one needs no brackets
    assert load_config("offline", given).servers.urls == ["http://a:1"]  # for the held-out rows
    with pytest.raises(UserError, match=r"nothing is sampled with .* without held-out rows"):
        load_config("offline", [*given, "data.eval_path=null"])


@pytest.mark.parametrize(
    "url",
    ["a:1", "ftp://a", "http://", "http://a:port", "http://a:99999", "http://[::1", "http://a..b",
     "http://a/ä", f"http://{'a' * 70}"],
)  # fmt: skip
def test_what_is_no_address(tmp_path, refused, url):
    line = refused(
        "train", "debug", f"run.dir={tmp_path / 'run'}", *SHORT, f"servers.urls=['{url}']"
    )
    assert "' is not the address of a server, such as http://localhost:8000" in line


def test_an_address_holds_no_key():
    with pytest.raises(UserError, match=r"use servers.api_key_env") as error:
        Client("http://me:secret@host:8000")
    assert "secret" not in str(error.value)


def test_the_key_comes_from_the_environment(tmp_path, refused, monkeypatch):
    with server() as stub:
        start = ["train", "debug", f"run.dir={tmp_path / 'run'}", *SHORT, on(stub.url)]
        start += ["servers.api_key_env=MY_KEY", "train.steps=1", "data.eval_size=0"]
        assert "that servers.api_key_env names is not set" in refused(*start)
        monkeypatch.setenv("MY_KEY", "se\nsame")
        line = refused(*start)
        assert "more than printable ASCII" in line
        assert "same" not in line
        monkeypatch.setenv("MY_KEY", "sesame")
        assert main(start) == 0
        assert {headers["Authorization"] for headers in stub.headers} == {"Bearer sesame"}
    assert "sesame" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_resumed_run_may_have_other_servers_but_no_other_engine():
    base = override(Config(), servers__kind="vllm", servers__urls=["http://a:1"])
    moved = override(
        base, servers__urls=["http://b:1"], servers__weights_dir="/w", servers__timeout=5.0,
        servers__retries=1, servers__concurrency=2, servers__logp_tolerance=1.0,
        servers__api_key_env="KEY",
    )  # fmt: skip
    assert difference(base, moved) == []
    other = override(moved, servers__kind="sglang", servers__weights_dtype="bfloat16")
    assert sorted(difference(base, other)) == ["servers.kind", "servers.weights_dtype"]


# Several processes.


def as_processes(monkeypatch, work):
    """What `work` gives or raises in two threads that take themselves for two processes."""
    here, sent, turn = threading.local(), [None, None], threading.Barrier(2)
    outcome: list[object] = [None, None]

    def gather(tree):
        sent[here.index] = tree
        turn.wait(20)
        both = np.concatenate(sent)
        turn.wait(20)
        return both

    def process(index):
        here.index = index
        try:
            outcome[index] = work()
        except UserError as error:
            outcome[index] = error

    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "process_index", lambda: here.index)
        patch.setattr(distributed, "gather", gather)
        threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcome


def test_one_process_leads_and_all_have_its_word(monkeypatch):
    done = []

    def work():
        done.append(jax.process_index())
        return {"a": [1, "é" * 700], "b": None}

    first, second = as_processes(monkeypatch, lambda: distributed.from_first_host(work))
    assert first == second == {"a": [1, "é" * 700], "b": None}
    assert done == [0]
    assert distributed.from_first_host(lambda: 5) == 5


def test_where_the_first_process_fails_all_do(monkeypatch):
    def work():
        raise UserError("http://a:1 is gone")

    first, second = as_processes(monkeypatch, lambda: distributed.from_first_host(work))
    assert isinstance(first, UserError)
    assert isinstance(second, UserError)
    assert [str(first), str(second)] == ["http://a:1 is gone", "host 0: http://a:1 is gone"]


@pytest.mark.slow
def test_two_processes_on_servers_train_as_one(tmp_path):
    plain = ["replay.completions=0", "replay.groups=0", "servers.kind=vllm"]
    with server() as a, server() as b:
        urls = on(a.url, b.url)
        processes.train_one(tmp_path / "one", *plain, urls)
        asked = len(a.requests)
        processes.train_two(tmp_path / "two", *plain, urls)
        assert loads(a) == loads(b) == 2 * 3  # once each: one process tells the servers to
        assert len(a.requests) > asked
    processes.assert_same(tmp_path / "one", tmp_path / "two", step=2)


@pytest.mark.slow
def test_one_bad_answer_to_one_process_ends_both(tmp_path):
    bad = []

    def tamper(path, answer):
        if path == "/v1/completions" and len(answer["choices"]) > 1 and not bad:
            bad.append(answer)
            return {"object": "error"}
        return answer

    with server() as stub:
        stub.tamper = tamper
        ended = processes.run_two(
            "train", "debug", *processes.SETTINGS, f"run.dir={tmp_path / 'run'}",
            "data.eval_size=0", "servers.kind=vllm", "servers.retries=0", on(stub.url),
        )  # fmt: skip
    for status, _, err in ended:
        assert status == 2, err
        lines = [line for line in err.splitlines() if line.startswith("gvpo-jax: error: ")]
        assert len(lines) == 1
        assert "an answer of another form" in lines[0]
        assert "Traceback" not in err
