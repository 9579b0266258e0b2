import dataclasses
import functools
import json
import logging
import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from http_stub import OWN_EOS, Logits, StubServer, network_of, seconds

from gvpo_jax import gvpo_loss, http
from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.errors import UserError
from gvpo_jax.logprobs import completion_mask
from gvpo_jax.models.decoder import decoder_fns
from gvpo_jax.models.load import LoadedModel, load_model
from gvpo_jax.rollout import SamplingParams
from gvpo_jax.rollout.servers import weight_sync
from gvpo_jax.rollout.servers.client import Fleet
from gvpo_jax.rollout.servers.dialects import DIALECTS, ServerKind
from gvpo_jax.rollout.servers.engine import HttpEngine
from gvpo_jax.rollout.servers.weight_sync import WeightSync, sequence_logps
from gvpo_jax.rollout.stop import StopStrings
from gvpo_jax.training.step import token_logps

V, K, T, STOPS = 13, 3, 6, (5, 11)
TABLE = np.random.default_rng(0).normal(0, 1, (V, V))
TABLE[:, OWN_EOS] = -30  # SGLang stops there whatever it is told
PROMPTS = [[1, 2, 4], [7], [8, 9, 10, 12], [2, 2], [6, 4]]
PROTOCOLS = ["vllm", "vllm-tpu", "sglang"]
SAMPLING_PATHS = ("/v1/completions", "/generate")


def bigram(tokens: list[int]) -> np.ndarray:
    return TABLE[tokens]


@pytest.fixture
def stub():
    with StubServer(bigram) as server:
        yield server


def fleet_of(*stubs: StubServer, **options) -> Fleet:
    options = {"timeout": 10.0, "retries": 2, "first_pause": 0.01} | options
    return Fleet([stub.url for stub in stubs], **options)


def generate(engine, prompts=PROMPTS, ids=None, *, k=K, sampling=None, seed=1, params=None, t=T):
    return engine.generate(
        params, prompts, range(len(prompts)) if ids is None else ids, num_generations=k,
        max_completion_length=t, sampling=sampling or SamplingParams(), seed=seed,
    )  # fmt: skip


def engine_on(*stubs: StubServer, protocol="vllm", **options) -> HttpEngine:
    return HttpEngine(fleet_of(*stubs, **options), protocol, STOPS, vocab_size=V)


def table_logps(prompt, tokens):
    logps = TABLE - np.log(np.exp(TABLE).sum(axis=-1, keepdims=True))
    return logps[[prompt[-1], *tokens[:-1]], tokens]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_rollout_is_what_the_servers_sampled(protocol):
    with StubServer(bigram) as a, StubServer(bigram) as b:
        a.on_tpu = b.on_tpu = protocol == "vllm-tpu"
        rollout = generate(engine_on(a, b, protocol=protocol))
        assert [len(stub.samples) for stub in (a, b)] == [3, 2]  # prompts in turn
        assert set(rollout.stopped.ravel().tolist()) == {True, False}
        assert (rollout.completions.dtype, rollout.old_logps.dtype) == (np.int32, np.float32)
        for g, prompt in enumerate(PROMPTS):
            samples = (a, b)[g % 2].samples[tuple(prompt)]
            for i, (tokens, logps, stopped) in enumerate(samples):
                n = rollout.lengths[g, i]
                assert rollout.completions[g, i, :n].tolist() == tokens
                assert (tokens[-1] in STOPS) == stopped == rollout.stopped[g, i]
                assert not set(tokens[:-1]) & set(STOPS)
                np.testing.assert_allclose(rollout.old_logps[g, i, :n], logps, rtol=1e-6)
                np.testing.assert_allclose(logps, table_logps(prompt, tokens))
                assert not rollout.old_logps[g, i, n:].any()
                assert not rollout.completions[g, i, n:].any()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_servers_sample_from_the_models_own_distribution(stub, protocol):
    """Their defaults, which come from the model's files, have no say."""
    stub.on_tpu = protocol == "vllm-tpu"
    prompt = [*range(V), 4]  # a penalty on repetition would concern every token
    rollout = generate(engine_on(stub, protocol=protocol), [prompt], k=2000, t=1)
    counts = np.bincount(rollout.completions.ravel(), minlength=V)
    expected = 2000 * np.exp(TABLE[4]) / np.exp(TABLE[4]).sum()
    common = expected > 5
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < 3 * common.sum()


@pytest.mark.parametrize(("protocol", "stops"), [("vllm", STOPS), ("vllm", ()), ("sglang", ())])
def test_servers_stop_at_our_stop_tokens_only(stub, protocol, stops):
    stub.logits = lambda tokens: TABLE[tokens] + 31 * (np.arange(V) == OWN_EOS)
    engine = HttpEngine(fleet_of(stub), protocol, stops, vocab_size=V)
    rollout = generate(engine, k=8)
    goes_on = rollout.completions[..., :-1] == OWN_EOS
    assert (goes_on & (np.arange(1, T) < rollout.lengths[..., None])).any()


class Letters:
    """A tokenizer: token 0 is a, token 12 is m."""

    def decode(self, tokens, **options):
        return "".join("abcdefghijklm"[token] for token in tokens)


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
@pytest.mark.parametrize("heeded", [True, False])
def test_stop_strings_end_what_servers_sample_as_a_plain_loop_does(stub, protocol, heeded):
    """Also where a server runs on past one, as with speculative decoding."""
    texts = ("be", "hh", "c")
    free = generate(engine_on(stub, protocol=protocol), k=8)
    stub.detokenize = Letters().decode if heeded else stub.detokenize
    stop = StopStrings(texts, Letters())
    engine = HttpEngine(fleet_of(stub), protocol, STOPS, vocab_size=V, stop=stop)
    ended = generate(engine, k=8)
    lengths = free.lengths.copy()
    for place in np.ndindex(lengths.shape):
        letters = ["abcdefghijklm"[token] for token in free.completions[place]][: lengths[place]]
        found = [n for n in range(len(letters)) if any(x in "".join(letters[:n]) for x in texts)]
        lengths[place] = min([*found, lengths[place]])
    assert (lengths < free.lengths).sum() > 3
    np.testing.assert_array_equal(ended.lengths, lengths)
    kept = np.arange(T) < lengths[..., None]
    np.testing.assert_array_equal(ended.completions, np.where(kept, free.completions, 0))
    np.testing.assert_array_equal(ended.old_logps, np.where(kept, free.old_logps, 0))
    by_text = [
        any(x in Letters().decode(tokens[:n]) for x in texts)
        for tokens, n in zip(free.completions.reshape(-1, T), lengths.ravel(), strict=True)
    ]
    np.testing.assert_array_equal(ended.stopped.ravel(), free.stopped.ravel() | by_text)
    body = stub.requests[-1][1]
    assert (body if protocol == "vllm" else body["sampling_params"][0])["stop"] == list(texts)


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_a_sample_depends_on_seed_prompt_id_and_place_alone(stub, protocol):
    engine = engine_on(stub, protocol=protocol)
    base = generate(engine, PROMPTS[:1] * 3, [0, 1, 2], k=4)
    rows = {tuple(row) for row in base.completions.reshape(12, T).tolist()}
    assert len(rows) > 8
    alone = generate(engine, PROMPTS[:1], [1], k=2)
    np.testing.assert_array_equal(alone.completions[0], base.completions[1, :2])
    other = generate(engine, PROMPTS[:1] * 3, [0, 1, 2], k=4, seed=2)
    assert (other.completions != base.completions).any(axis=-1).mean() > 0.8


def test_vllm_before_0_10_2_tells_token_ids_by_name_only(stub):
    def drop(path, answer):
        for choice in answer["choices"]:
            del choice["token_ids"], choice["prompt_token_ids"]
        return answer

    new = generate(engine_on(stub))
    stub.tamper = drop
    old = generate(engine_on(stub))
    for a, b in zip(new, old, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.6), SamplingParams(top_k=2), SamplingParams(0)]
)
def test_log_probs_are_those_at_temperature_1_or_unknown(stub, protocol, sampling, caplog):
    if sampling.temperature == 0:
        sampling = SamplingParams(temperature=1e-3)
    rollout = generate(engine_on(stub, protocol=protocol), sampling=sampling)
    mask = completion_mask(rollout.lengths, T)
    for g, prompt in enumerate(PROMPTS):
        for tokens, logps, n in zip(
            rollout.completions[g], rollout.old_logps[g], rollout.lengths[g], strict=True
        ):
            np.testing.assert_allclose(logps[:n], table_logps(prompt, tokens[:n]), rtol=1e-5)
    stub.processed = True
    engine = engine_on(stub, protocol=protocol)
    with caplog.at_level(logging.WARNING):
        rollouts = [generate(engine, sampling=sampling) for _ in range(2)]
    for rollout in rollouts:
        mask = np.asarray(completion_mask(rollout.lengths, T))
        assert np.isnan(rollout.old_logps[mask]).all()
        assert not rollout.old_logps[~mask].any()
    assert [stub.url in record.getMessage() for record in caplog.records] == [True]
    assert np.isfinite(generate(engine).old_logps).all()  # plain sampling: the two are the same


def test_log_probs_near_0_do_not_tell_what_they_are(stub):
    """Where every token is certain, one kind looks like another: ask again later."""
    stub.logits = lambda tokens: 50 * np.eye(V)[(np.array(tokens) + 1) % V]
    stub.processed = True
    engine = engine_on(stub)
    certain = generate(engine, [[6]], sampling=SamplingParams(temperature=0.6), t=4)
    assert np.isnan(certain.old_logps).all()
    stub.logits, stub.processed = bigram, False
    assert np.isfinite(generate(engine, sampling=SamplingParams(temperature=0.6)).old_logps).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("faults", [[500, 503], [429], ["garbage", 502], ["cut"]])
def test_what_may_pass_is_tried_again(stub, protocol, faults):
    stub.on_tpu = protocol == "vllm-tpu"
    stub.faults.extend(faults)
    rollout = generate(engine_on(stub, protocol=protocol), PROMPTS[:1])
    tokens, _, _ = stub.samples[tuple(PROMPTS[0])][0]
    assert rollout.completions[0, 0, : len(tokens)].tolist() == tokens
    assert len(stub.requests) == 1 + len(faults)


def complaint(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "HTTP 500: as told"),
        ("garbage", "is not JSON"),
        ("deep", "is not JSON"),
        ("cut", "RemoteProtocolError: peer closed"),
    ],
)
def test_after_some_tries_one_line_tells_server_prompt_and_reason(stub, fault, reason):
    stub.faults.extend([fault] * 3)
    said = complaint(lambda: generate(engine_on(stub), PROMPTS[:1], [77]))
    assert said.startswith(f"{stub.url}/v1/completions, prompt 77: ")
    assert re.search(reason, said)
    assert said.endswith("(tried 3 times)")
    assert len(stub.requests) == 3


def test_a_server_that_is_not_there():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    engine = HttpEngine(Fleet([url], retries=0), "sglang", STOPS, vocab_size=V)
    said = complaint(lambda: generate(engine, PROMPTS[:1]))
    assert said.startswith(f"{url}/generate, prompt 0: ConnectionRefusedError")
    assert said.endswith("(tried once)")


def test_the_pause_before_a_try_doubles_up_to_a_limit():
    pauses = np.array([http.pause(0.5, attempt) for attempt in range(1, 12)])
    longest = np.minimum(0.5 * 2.0 ** np.arange(11), 30)
    assert (pauses <= longest).all()
    assert (pauses >= longest / 2).all()


def test_a_slow_server_is_given_up(stub):
    stub.faults.extend(["hang", "hang"])
    engine = engine_on(stub, timeout=0.2, retries=1)
    took = seconds(lambda: complaint(lambda: generate(engine, PROMPTS[:1])))
    assert 0.4 <= took < 3
    stub.faults.extend(["hang", "hang"])
    assert "no answer within 0.2 s (tried 2 times)" in complaint(
        lambda: generate(engine, PROMPTS[:1])
    )


def test_a_try_ends_in_time_though_the_answer_keeps_coming(stub):
    stub.drip = 0.02  # of some 800 bytes
    engine = engine_on(stub, timeout=0.3, retries=0)
    took = seconds(lambda: complaint(lambda: generate(engine, PROMPTS[:1])))
    assert 0.3 <= took < 3


def test_headers_that_drip_are_not_waited_for_either(stub):
    stub.drip_headers = 0.02
    engine = engine_on(stub, timeout=0.3, retries=0)
    took = seconds(lambda: complaint(lambda: generate(engine, PROMPTS[:1])))
    assert 0.3 <= took < 3


def test_an_endless_answer_is_not_read_to_its_end(stub, monkeypatch):
    monkeypatch.setattr(http, "_LARGEST", 300)
    said = complaint(lambda: generate(engine_on(stub), PROMPTS[:1]))
    assert "the answer is larger than" in said
    assert len(stub.requests) == 1  # it would be no smaller a second time


def test_an_address_shows_no_key():
    with pytest.raises(UserError, match="holds no name, key or query") as error:
        Fleet(["http://host:8000/?api_key=secret"])
    assert "secret" not in str(error.value)


def test_closing_ends_what_another_thread_waits_for(stub):
    stub.faults.extend(["hang", 503])
    engine = engine_on(stub, timeout=25.0, first_pause=25.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complaint, lambda: generate(engine, PROMPTS[:2]))
        while len(stub.requests) < 2:
            time.sleep(0.01)
        assert seconds(engine.close) < 5
        assert waiting.result().endswith(": stopped")
    assert generate(engine).lengths.shape == (5, K)  # and it is of use again


def test_a_proxy_of_the_environment_is_not_asked(stub, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert generate(engine_on(stub, retries=0)).lengths.shape == (5, K)


def test_a_host_with_several_addresses_that_all_refuse(monkeypatch):
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", 1)) for n in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    engine = HttpEngine(Fleet(["http://two:1"], retries=0), "vllm", STOPS, vocab_size=V)
    assert "prompt 0: ConnectionRefusedError" in complaint(lambda: generate(engine, PROMPTS[:1]))


def test_without_httpx_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    said = complaint(lambda: Fleet(["http://localhost:8000"]))
    assert said.endswith('pip install "gvpo-jax[servers]"')


def test_the_first_failure_ends_what_is_under_way(stub):
    stub.faults.extend(["hang", "hang", 400])
    engine = engine_on(stub, timeout=25.0)
    stub.delay = 0.1
    took = seconds(lambda: complaint(lambda: generate(engine)))
    assert took < 5
    stub.faults.clear()
    assert generate(engine).lengths.shape == (5, K)  # and it is of use again


def test_after_a_failure_nothing_more_is_asked(stub):
    stub.faults.extend([400, "hang"])
    took = seconds(lambda: complaint(lambda: generate(engine_on(stub, concurrency=1))))
    assert took < 5


@pytest.mark.parametrize("concurrency", [1, 3])
def test_never_more_requests_than_allowed(concurrency):
    with StubServer(bigram) as a, StubServer(bigram) as b:
        a.delay = b.delay = 0.02
        generate(engine_on(a, b, concurrency=concurrency), [[4]] * 20)
        assert (a.most_at_once, b.most_at_once) == (concurrency, concurrency)
        assert len(a.requests) == len(b.requests) == 10


def test_a_refusal_is_final_and_quoted(stub):
    stub.on_tpu = True
    said = complaint(lambda: generate(engine_on(stub)))
    assert "HTTP 400: JAX does not support per-request seed." in said
    with pytest.raises(UserError, match="'localhost:8000' is not the address of a server"):
        Fleet(["localhost:8000"])
    with pytest.raises(UserError, match="no servers"):
        Fleet([])


def test_the_key_is_sent_and_addresses_may_end_as_openai_clients_want_them(stub):
    fleet = Fleet([stub.url + "/v1/"], api_key="sesame", timeout=5)
    generate(HttpEngine(fleet, "vllm", STOPS, vocab_size=V), PROMPTS[:1])
    assert stub.headers[0]["Authorization"] == "Bearer sesame"
    assert "sesame" not in f"{fleet!r} {fleet.clients!r}"


def in_vllm(change):
    def tamper(path, answer):
        change(answer["choices"][-1], answer)
        return answer

    return tamper


def with_tokens(tokens, finish=None, logps=None):
    def change(choice, _):
        choice["token_ids"] = tokens
        choice["logprobs"]["tokens"] = [f"token_id:{token}" for token in tokens]
        choice["logprobs"]["token_logprobs"] = [-1.0] * len(tokens) if logps is None else logps
        choice["finish_reason"] = finish or "length"

    return in_vllm(change)


REFUSALS = {
    "2 completions instead of 3": in_vllm(lambda choice, answer: answer["choices"].pop()),
    "4 completions instead of 3": in_vllm(
        lambda choice, answer: answer["choices"].append(dict(choice))
    ),
    "token id 13, outside the vocabulary of 13": with_tokens([1, 13, 1, 1, 1, 1]),
    "token id -1, outside": with_tokens([-1, 1, 1, 1, 1, 1]),
    "token id 1.5, outside": in_vllm(
        lambda choice, _: choice.update(
            token_ids=[1.5] * 6, logprobs={"tokens": ["x"] * 6, "token_logprobs": [-1.0] * 6}
        )
    ),
    "an empty completion": with_tokens([]),
    "7 tokens, where 6 are the limit": with_tokens([1] * 7),
    "cut off after 4 of 6 tokens: start the server with a longer context": with_tokens([1] * 4),
    "5 log-probs of 6 tokens": with_tokens([1] * 6, logps=[-1.0] * 5),
    "nan as a log-prob": with_tokens([1] * 6, logps=[-1.0] * 5 + [float("nan")]),
    "-inf as a log-prob": with_tokens([1] * 6, logps=[-1.0] * 5 + [float("-inf")]),
    "-9999.0 as a log-prob": with_tokens([1] * 6, logps=[-1.0] * 5 + [-9999.0]),
    "0.5 as a log-prob": with_tokens([1] * 6, logps=[-1.0] * 5 + [0.5]),
    "None as a log-prob": with_tokens([1] * 6, logps=[-1.0] * 5 + [None]),
    "stopped at token 4, which is none of the stop tokens [5, 11]: add it to "
    "rollout.stop_token_ids": with_tokens([1, 4], finish="stop"),
    "more tokens after stop token 11": with_tokens([1, 11, 1, 1, 1, 1]),
    "log-probs of other tokens than those sampled": in_vllm(
        lambda choice, _: choice.update(token_ids=[2] * len(choice["token_ids"]))
    ),
    "no token ids: it takes vLLM 0.10.2": in_vllm(
        lambda choice, _: (
            choice.pop("token_ids"),
            choice["logprobs"].update(tokens=["a"] * len(choice["logprobs"]["tokens"])),
        )
    ),
    "the server changed the prompt": in_vllm(lambda choice, _: choice["prompt_token_ids"].pop()),
    "an answer of another form (KeyError: 'choices')": lambda path, answer: {"object": "error"},
    "an answer of another form": lambda path, answer: [answer],
    "the server gave up on it: abort": in_vllm(
        lambda choice, _: choice.update(finish_reason="abort")
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_garbage_does_not_reach_the_loss(stub, reason):
    stub.tamper = REFUSALS[reason]
    said = complaint(lambda: generate(engine_on(stub, retries=0), [[1, 2, 4]], [8]))
    assert said.startswith(f"{stub.url}/v1/completions, prompt 8: {reason}")


SGLANG_REFUSALS = {
    "2 completions instead of 3": lambda answer: answer.pop(),
    "log-probs of other tokens": lambda answer: answer[0]["output_ids"].append(1),
    "stopped at token 3, which is none of the stop tokens": lambda answer: answer[0].update(
        output_ids=[1, OWN_EOS],
        meta_info={
            "finish_reason": {"type": "stop", "matched": OWN_EOS},
            "output_token_logprobs": [[-1.0, 1, None], [-1.0, OWN_EOS, None]],
        },
    ),
    "the server gave up on it: abort": lambda answer: answer[0]["meta_info"].update(
        finish_reason={"type": "abort", "message": "out of memory"}
    ),
    "an answer of another form": lambda answer: answer[0]["meta_info"].pop("output_token_logprobs"),
}


@pytest.mark.parametrize("reason", SGLANG_REFUSALS)
def test_garbage_from_sglang(stub, reason):
    def tamper(path, answer):
        SGLANG_REFUSALS[reason](answer)
        return answer

    stub.tamper = tamper
    engine = engine_on(stub, protocol="sglang", retries=0)
    said = complaint(lambda: generate(engine, [[1, 2, 4]], [8]))
    assert said.startswith(f"{stub.url}/generate, prompt 8: {reason}")


# Weights. The trainer's model is real, and so is that of the stub, which loads what was written.


def tiny_model() -> LoadedModel:
    """The debug model with one layer: less to compile."""
    debug = load_model("debug")
    config = dataclasses.replace(debug.config, num_layers=1)
    values = debug.hf_config | {"num_hidden_layers": 1}
    params = debug.params | {"layers": {0: debug.params["layers"][0]}}
    return dataclasses.replace(debug, config=config, hf_config=values, params=params)


MODEL = tiny_model()
PARAMS = jax.tree.map(jax.numpy.asarray, MODEL.params)
SCORE = jax.jit(functools.partial(token_logps, decoder_fns(MODEL.config)))
TEXTS = MODEL.tokenizer(["Hello there", "2 + 2 ="], add_special_tokens=False)["input_ids"]
network = network_of(MODEL.config)


def from_folder(folder: str) -> Logits:
    """What a server does: it reads the files, and knows nothing of the trainer."""
    return network(load_model(folder).params)


def changed(size: float, seed: int = 0, only: str = ""):
    """PARAMS with noise of this size, in units of the parameters'."""

    def change(path, x):
        if only not in jax.tree_util.keystr(path):
            return x
        noise = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
        return x + size * float(np.std(x) or 1) * noise

    return jax.tree.map_with_path(change, PARAMS)


def sync_on(*stubs: StubServer, folder, protocol="vllm", **options) -> WeightSync:
    options = {"probes": TEXTS} | options
    return WeightSync(fleet_of(*stubs), protocol, MODEL, folder, sequence_logps(SCORE), **options)


@pytest.fixture
def net():
    with StubServer(network(PARAMS), from_folder) as server:
        yield server


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_new_weights_reach_every_server(tmp_path, protocol):
    with (
        StubServer(network(PARAMS), from_folder) as a,
        StubServer(network(PARAMS), from_folder) as b,
    ):
        a.on_tpu = b.on_tpu = protocol == "vllm-tpu"
        new = changed(0.3)
        report = sync_on(a, b, folder=tmp_path, protocol=protocol).sync(new)
        for stub in (a, b):
            np.testing.assert_array_equal(stub.logits(TEXTS[0]), network(new)(TEXTS[0]))
        assert report.version == 1
        assert report.difference <= report.largest < 1e-4
        scored = 0 if a.on_tpu else sum(len(text) - 1 for text in TEXTS)
        assert report.tokens == 2 * (scored + 2 * 16)


def test_only_whole_versions_are_seen_and_old_ones_go(net, tmp_path):
    seen = []

    def load(folder: str) -> Logits:
        names = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
        seen.append([name.removeprefix("version-0000000") for name in names])
        return from_folder(folder)

    net.load = load
    (tmp_path / ".writing-killed").mkdir()
    (tmp_path / "of-the-user").mkdir()
    sync = sync_on(net, folder=tmp_path)
    assert [sync.sync(changed(0.1, seed)).version for seed in range(4)] == [1, 2, 3, 4]
    mine = "of-the-user"
    assert seen == [[mine, "1"], [mine, "1", "2"], [mine, "1", "2", "3"], [mine, "2", "3", "4"]]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [mine, "version-00000003", "version-00000004"]
    (file,) = tmp_path.glob("version-00000004/*.safetensors")
    assert file.stat().st_mode & 0o444 == 0o444  # the server may be another user
    # Another session goes on counting; a number that comes again replaces what was there.
    assert sync_on(net, folder=tmp_path).sync(PARAMS).version == 5
    assert sync_on(net, folder=tmp_path).sync(changed(0.2), version=5).version == 5
    np.testing.assert_array_equal(net.logits(TEXTS[0]), network(changed(0.2))(TEXTS[0]))


def test_files_are_on_disk_before_they_get_their_name(net, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append("fsync"))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: done.append(Path(b).parent) or rename(a, b))
    sync_on(net, folder=tmp_path).sync(PARAMS)
    files = len(list((tmp_path / "version-00000001").iterdir()))
    assert done[-files - 3 :] == [*["fsync"] * (files + 1), tmp_path, "fsync"]


def test_a_folder_that_can_not_be_written(net, tmp_path):
    (tmp_path / "file").write_text("")
    said = complaint(lambda: sync_on(net, folder=tmp_path / "file").sync(PARAMS))
    assert said.startswith(f"could not write weights to {tmp_path}/file: ")


def test_files_in_bfloat16_are_close_enough(net, tmp_path):
    report = sync_on(net, folder=tmp_path, dtype="bfloat16").sync(changed(0.3))
    assert 1e-3 < report.difference < 0.05


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_wrong_log_probs_end_the_run(net, tmp_path, protocol):
    def half_a_nat(path, answer):
        for choice in answer["choices"] if protocol == "vllm" else []:
            choice["logprobs"]["token_logprobs"] = [
                logp - 0.5 for logp in choice["logprobs"]["token_logprobs"]
            ]
        for one in answer if isinstance(answer, list) else []:
            for triple in one["meta_info"]["output_token_logprobs"]:
                triple[0] -= 0.5
        return answer

    net.tamper = lambda p, answer: half_a_nat(p, answer) if p in SAMPLING_PATHS else answer
    said = complaint(lambda: sync_on(net, folder=tmp_path, protocol=protocol).sync(PARAMS))
    assert re.fullmatch(
        rf"{net.url} does not sample from version 1 of the weights: its log-probs differ from the "
        r"trainer's by 0\.\d+ nats a token, at most by 0.5 \(servers.logp_tolerance=0.05\)",
        said,
    )
    sync_on(net, folder=tmp_path, protocol=protocol, tolerance=0.6).sync(PARAMS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_with_other_weights_is_named(net, tmp_path, protocol):
    with StubServer(network(changed(0.5, seed=9)), lambda folder: network(PARAMS)) as other:
        net.on_tpu = other.on_tpu = protocol == "vllm-tpu"
        sync = sync_on(net, other, folder=tmp_path, protocol=protocol)
        sync.sync(PARAMS)
        said = complaint(lambda: sync.sync(changed(1.0)))
        assert said.startswith(other.url)
        assert "version 2 of the weights" in said


@pytest.mark.parametrize("size", [1e-3, 3e-2, 1.0])
@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
def test_old_weights_show_long_before_they_matter(net, tmp_path, protocol, size):
    sync = sync_on(net, folder=tmp_path, protocol=protocol)
    sync.sync(PARAMS)
    net.load = lambda folder: net.logits  # polite, and does nothing
    assert sync.sync(PARAMS).version == 2  # nothing changed: nothing to complain of
    said = complaint(lambda: sync.sync(changed(size)))
    assert said.startswith(f"{net.url} did not load version 3 of the weights, or not all of it")
    assert "its log-probs moved by 0 nats a token" in said


def test_weights_that_arrive_in_part_show(net, tmp_path):
    """As vLLM 0.32.0 on a CPU, which keeps the old head of a model with tied embeddings."""
    sync = sync_on(net, folder=tmp_path)
    sync.sync(PARAMS)
    net.load = functools.partial(all_but_the_head, net)
    new = changed(0.02)
    assert np.abs(network(new)(TEXTS[0]) - net.logits(TEXTS[0])).max() < 0.5
    assert "or not all of it" in complaint(lambda: sync.sync(new))


def nothing(net, folder):
    return net.logits


def all_but_the_head(net, folder):
    return network(load_model(folder).params | {"head": PARAMS["head"]})


@pytest.mark.parametrize(("loads", "size"), [(nothing, 4e-7), (all_but_the_head, 3e-5)])
def test_changes_too_small_to_see_add_up(net, tmp_path, loads, size):
    """A server passes while what it lacks makes no difference, and then no longer."""
    sync = sync_on(net, folder=tmp_path)
    sync.sync(PARAMS)
    net.load = functools.partial(loads, net)

    def many_steps() -> None:
        for step in range(1, 50):
            sync.sync(changed(size * step))

    (version,) = re.findall(r"did not load version (\d+)", complaint(many_steps))
    assert int(version) > 3


def test_a_server_that_stops_to_load_shows_after_a_long_way_too(net, tmp_path):
    sync = sync_on(net, folder=tmp_path)
    for size in (0, 1.0):
        sync.sync(changed(size))
    net.load = functools.partial(nothing, net)
    assert "did not load version 3" in complaint(lambda: sync.sync(changed(1.001)))


@pytest.mark.parametrize("growth", [1, 2.5])
@pytest.mark.parametrize("moves", [0.0, 0.003, 0.02, 0.1, 1.0])
def test_what_a_server_rounds_away_is_no_reason_to_stop(net, tmp_path, moves, growth):
    """bfloat16: differences of 0.02 nats that are others each time, under changes of any size."""
    sync, rng = sync_on(net, folder=tmp_path), np.random.default_rng(0)
    ours = rng.normal(-2, 1, 60)
    for version in range(200):
        off = 0.02 * (growth if version else 1)
        sync._check_moved(net.url, version, ours, ours + rng.normal(0, off, 60))
        ours = ours + rng.normal(0, moves, 60) / 10


def test_servers_that_score_no_prompts_are_checked_on_their_samples(net, tmp_path, caplog):
    net.on_tpu = True
    sync = sync_on(net, folder=tmp_path, protocol="vllm-tpu")
    with caplog.at_level(logging.WARNING):
        sync.sync(PARAMS)
        sync.sync(changed(0.1))
    assert [record.getMessage().split()[0] for record in caplog.records] == [net.url]
    net.load = lambda folder: net.logits
    assert "does not sample from version 3" in complaint(lambda: sync.sync(changed(1.0)))


def test_refused_and_unknown_ways_to_load(net, tmp_path):
    net.dev_mode = False
    said = complaint(lambda: sync_on(net, folder=tmp_path).sync(PARAMS))
    assert said.startswith(f"{net.url}/collective_rpc, loading version-00000001: HTTP 404")
    assert said.endswith("start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment")
    net.tamper = lambda path, answer: {"success": False, "message": "shapes differ"}
    said = complaint(lambda: sync_on(net, folder=tmp_path, protocol="sglang").sync(PARAMS))
    assert said.endswith("the server did not load: shapes differ")


def test_a_prefix_cache_in_use_is_waited_for(net, tmp_path):
    answers = iter([{"success": False}, {"success": True}])
    net.tamper = lambda path, a: next(answers) if path == "/reset_prefix_cache" else a
    sync_on(net, folder=tmp_path).sync(changed(0.1))
    assert net.paths().count("/reset_prefix_cache") == 2


def test_processes_take_the_word_of_the_one_that_writes(net, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_sync, "_LONGEST_PROBE", 30)
    led, gathered = [], []

    def from_first_host(work):
        led.append(work)
        return json.loads(json.dumps(work())) if len(led) == 1 else work()

    def to_first_host(params):
        gathered.append(params)
        return jax.device_get(params)

    monkeypatch.setattr(weight_sync, "from_first_host", from_first_host)
    monkeypatch.setattr(weight_sync, "to_first_host", to_first_host)
    sync = sync_on(net, folder=tmp_path, probes=(), whole=to_first_host)
    report = sync.bring(PARAMS, [[9] * 300, [3], *TEXTS, TEXTS[0]])
    assert report
    assert report.tokens == 29 + 0 + sum(len(text) - 1 for text in TEXTS) + 4 * 16
    assert gathered == [PARAMS]
    assert len(led) == 3  # the probes, the weights, the clearing up


def test_an_engine_brings_weights_when_they_are_new(net, tmp_path):
    engine = HttpEngine(
        fleet_of(net), "vllm", STOPS, vocab_size=MODEL.config.vocab_size,
        weights=sync_on(net, folder=tmp_path, probes=()),
    )  # fmt: skip
    a, b = changed(0.1), changed(0.2)
    for params, version in ((a, 1), (a, 1), (b, 2), (dict(b), 2), (a, 3)):
        generate(engine, TEXTS, params=params, k=2, t=2)
        assert engine.last_sync
        assert engine.last_sync.version == version

    def elsewhere():
        generate(engine, TEXTS, params=b, k=2, t=2)
        return engine.last_sync

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result().version == 4
    assert engine.last_sync
    assert engine.last_sync.version == 3  # of the samples that this thread had
    engine.close()
    generate(engine, TEXTS, params=b, k=2, t=2)  # closed, it starts again
    engine.close()


def test_three_updates_and_the_samples_follow(net, tmp_path):
    """A whole loop: the trainer's model learns, the server's is what it reads from disk."""
    engine = HttpEngine(
        fleet_of(net), "vllm", (), vocab_size=MODEL.config.vocab_size,
        weights=sync_on(net, folder=tmp_path),
    )  # fmt: skip
    prompts, lengths = pad_prompts(TEXTS)

    def loss(params, completions, ref_logps, rewards):
        logps = SCORE(params, prompts, lengths, completions).sum(-1)
        return gvpo_loss(logps, ref_logps, rewards, beta=0.1)

    gradient, wanted, params = jax.jit(jax.grad(loss)), ord("e"), PARAMS
    probabilities = []
    for step in range(3):
        rollout = generate(engine, TEXTS, params=params, k=8, t=4, seed=step)
        scored = np.asarray(SCORE(params, prompts, lengths, rollout.completions))
        np.testing.assert_allclose(rollout.old_logps, scored, atol=1e-4)
        probabilities.append(softmax(net.logits(TEXTS[0])[-1])[wanted])
        rewards = np.random.default_rng(step).normal(0, 1, (2, 8)).astype(np.float32)
        rewards += (rollout.completions == wanted).sum(-1)
        ref_logps = np.asarray(SCORE(PARAMS, prompts, lengths, rollout.completions)).sum(-1)
        slope = gradient(params, rollout.completions, ref_logps, rewards)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)
        now = np.asarray(SCORE(params, prompts, lengths, rollout.completions))
        assert np.abs(now - scored).max() > 0.01  # so equality above means something
    assert engine.last_sync
    assert engine.last_sync.version == 3
    assert len(set(probabilities)) == 3


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_the_names_of_the_protocols():
    assert set(get_args(ServerKind)) == set(DIALECTS) == set(PROTOCOLS)
