"""A rollout server for tests: it speaks as vLLM and as SGLang do, from any function of tokens.

What it does not get told explicitly it takes from a "generation config" of its own, as real servers
do, and new weights count only once its cache is reset. It can be made to misbehave.
"""

import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import numpy as np

from gvpo_jax.models.decoder import DecoderConfig, full_logits

Logits = Callable[[list[int]], np.ndarray]  # n tokens -> [n, v]: what follows each
OWN_EOS = 3  # a stop token that nobody else knows of
DEFAULTS = {"temperature": 0.5, "top_k": 2, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.5}


def network_of(config: DecoderConfig) -> Callable[[Any], Logits]:
    """Parameters -> what a decoder says of up to 48 tokens."""
    run = jax.jit(functools.partial(full_logits, config))

    def with_params(params: Any) -> Logits:
        def logits(tokens: list[int]) -> np.ndarray:
            padded = np.zeros((1, 48), np.int32)
            padded[0, : len(tokens)] = tokens
            return np.asarray(run(params, padded))[0, : len(tokens)]

        return logits

    return with_params


class StubServer:
    """Serves `logits` on a free port until closed; a context manager.

    Attributes:
        url: its address.
        samples: prompt -> completions as (tokens, log-probs, stopped), the last ones asked for.
        requests: (path, body) of everything that was asked.
        most_at_once: requests under way at the same time.
        faults: what happens to the next requests, one each: a status, "garbage", "deep", "cut",
            "hang".
        tamper: changes an answer, `(path, answer) -> answer`.
        load: folder -> logits of the weights in it.
        delay: seconds that an answer takes.
        drip: seconds that each byte of it takes.
        drip_headers: seconds that each byte of its headers takes.
        processed: log-probs are those after temperature and truncation.
        on_tpu: as tpu-inference: no seeds, no log-probs of prompts.
        detokenize: tokens -> the text in which stop strings are looked for.
        dev_mode: vLLM's, without which there is no way to load weights.
        load_adapter: folder -> logits of the model with its adapter; None: LoRA is not enabled.
        adapters: name -> those logits.
    """

    def __init__(self, logits: Logits, load: Callable[[str], Logits] | None = None):
        self.logits, self.load = logits, load
        self.samples: dict[tuple[int, ...], list[tuple]] = {}
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: deque[Any] = deque()
        self.tamper: Callable[[str, Any], Any] = lambda path, answer: answer
        self.delay, self.drip, self.drip_headers, self.most_at_once = 0.0, 0.0, 0.0, 0
        self.processed = self.on_tpu = False
        self.dev_mode = True
        self.load_adapter: Callable[[str], Logits] | None = None
        self.adapters: dict[str, Logits] = {}
        self.detokenize: Callable[[list[int]], str] = lambda tokens: ""
        self._at_once, self._unseeded, self._loaded = 0, 10_000, None
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def receive(self, path: str, body: Any, headers: dict[str, str]) -> tuple[int, bytes, bool]:
        """Status, content, and whether all of it is sent."""
        with self._lock:
            self.requests.append((path, body))
            self.headers.append(headers)
            fault = self.faults.popleft() if self.faults else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._closing.wait(self.delay)
            if fault == "hang":
                self._closing.wait(30)
            if fault == "garbage":
                return 200, b"<html>so sorry</html>", True
            if fault == "deep":
                return 200, b"[" * 200_000, True
            if isinstance(fault, int):
                return (
                    fault,
                    json.dumps({"error": {"message": "as told", "code": 1}}).encode(),
                    True,
                )
            with self._lock:
                status, answer = self._answer(path, body)
                answer = self.tamper(path, answer) if status == 200 else answer
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            return status, content, fault != "cut"
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/completions":
            whole = self.logits
            self.logits = self.adapters[body["model"]] if "model" in body else whole
            try:
                return self._completions(body)
            finally:
                self.logits = whole
        if path == "/v1/load_lora_adapter" and self.load_adapter is not None:
            assert body["lora_name"] not in self.adapters
            self.adapters[body["lora_name"]] = self.load_adapter(body["lora_path"])
            return 200, b"Success"
        if path == "/v1/unload_lora_adapter" and self.load_adapter is not None:
            del self.adapters[body["lora_name"]]
            return 200, b"Success"
        if path == "/generate":
            if isinstance(body["input_ids"][0], int):
                return 200, self._generate(body["input_ids"], body["sampling_params"], body)
            pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
            self.samples.pop(tuple(body["input_ids"][0]), None)
            return 200, [self._generate(prompt, params, body) for prompt, params in pairs]
        if path == "/collective_rpc" and self.dev_mode:
            assert body["method"] == "reload_weights"
            return 200, self._take(body["kwargs"]["weights_path"], {"results": [None]})
        if path == "/update_weights_from_disk":
            return 200, self._take(body["model_path"], {"success": True, "message": "ok"})
        if path in ("/reset_prefix_cache", "/flush_cache"):
            self.logits, self._loaded = self._loaded or self.logits, None
            return 200, {"success": True} if path == "/reset_prefix_cache" else b"Cache flushed."
        return 404, {"detail": "Not Found"}

    def _take(self, folder: str, answer: Any) -> Any:
        assert self.load, "this stub can't load"
        self._loaded = self.load(folder)
        return answer

    def _completions(self, body: Any) -> tuple[int, Any]:
        prompt, n = body["prompt"], body.get("n", 1)
        if self.on_tpu and body.get("seed") is not None:
            message = "JAX does not support per-request seed."
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        self._unseeded += n
        first = body.get("seed", self._unseeded)
        stops = {*body.get("stop_token_ids", ()), *(() if body.get("ignore_eos") else (OWN_EOS,))}
        drawn = [self._draw(prompt, body["max_tokens"], body, stops, first + i) for i in range(n)]
        scores: Any = None
        if body.get("prompt_logprobs") is not None and not self.on_tpu:
            pairs = zip(prompt[1:], self._score(prompt), strict=True)
            scores = [None, *({str(t): {"logprob": logp, "rank": 1}} for t, logp in pairs)]
        else:
            self.samples[tuple(prompt)] = drawn
        choices = [
            {
                "index": i,
                "text": "never looked at",
                "logprobs": {
                    "tokens": [f"token_id:{token}" for token in tokens],
                    "token_logprobs": logps,
                },
                "finish_reason": "stop" if stopped else "length",
                "token_ids": tokens if body.get("return_token_ids") else None,
                "prompt_token_ids": prompt if body.get("return_token_ids") else None,
                "prompt_logprobs": scores,
            }
            for i, (tokens, logps, stopped) in enumerate(drawn)
        ]
        return 200, {"object": "text_completion", "choices": choices}

    def _generate(self, prompt: list[int], params: Any, body: Any) -> Any:
        self._unseeded += 1
        stops = {*params.get("stop_token_ids", ()), OWN_EOS}
        stops = set() if params.get("ignore_eos") else stops
        seed = params.get("sampling_seed", self._unseeded)
        drawn = self._draw(prompt, params["max_new_tokens"], params, stops, seed)
        tokens, logps, stopped = drawn
        told: dict[str, Any] = {"finish_reason": {"type": "stop" if stopped else "length"}}
        if body.get("return_logprob"):
            pairs = zip(logps, tokens, strict=True)
            told["output_token_logprobs"] = [[logp, token, None] for logp, token in pairs]
        if body.get("logprob_start_len") == 0:
            scored = zip([None, *self._score(prompt)], prompt, strict=True)
            told["input_token_logprobs"] = [[logp, token, None] for logp, token in scored]
        else:
            self.samples.setdefault(tuple(prompt), []).append(drawn)
        return {"text": "never looked at", "output_ids": tokens, "meta_info": told}

    def _score(self, tokens: list[int]) -> list[float]:
        logps = _log_softmax(self.logits(tokens))
        return [float(row[token]) for row, token in zip(logps[:-1], tokens[1:], strict=True)]

    def _draw(self, prompt, limit, options, stops, seed) -> tuple[list[int], list[float], bool]:
        rng, tokens, logps = np.random.default_rng(seed), list(prompt), []
        texts, stopped = options.get("stop", ()), False
        options = DEFAULTS | {key: options[key] for key in DEFAULTS if key in options}
        while len(logps) < limit and not stopped:
            raw = np.float64(self.logits(tokens)[-1])
            shaped = _shape(raw, tokens, options)
            token = int(rng.choice(len(raw), p=np.exp(shaped) / np.exp(shaped).sum()))
            logps.append(float((shaped if self.processed else _log_softmax(raw))[token]))
            tokens.append(token)
            text = self.detokenize(tokens[len(prompt) :])
            stopped = token in stops or any(stop in text for stop in texts)
        return tokens[len(prompt) :], logps, stopped


def _shape(logits: np.ndarray, tokens: list[int], options: dict[str, float]) -> np.ndarray:
    """Log-probs after penalties, temperature and truncation."""
    logits = logits.copy()
    logits[list(set(tokens))] /= options["repetition_penalty"]
    logps = _log_softmax(logits / options["temperature"])
    order = np.argsort(-logps)
    before = np.cumsum(np.exp(logps[order])) - np.exp(logps[order])
    keep = before < options["top_p"]
    keep &= np.exp(logps[order]) >= options["min_p"] * np.exp(logps[order[0]])
    if options["top_k"] > 0:
        keep &= np.arange(len(order)) < options["top_k"]
    logps[order[~keep]] = -np.inf
    return _log_softmax(logps)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def _handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content, whole = stub.receive(self.path, body, dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for byte in b"X-Slow: " + b"x" * 200 if stub.drip_headers else b"":
                self.flush_headers()
                self.wfile.write(bytes([byte]))
                time.sleep(stub.drip_headers)
            if stub.drip_headers:
                self.wfile.write(b"\r\n")
            self.end_headers()
            content = content if whole else content[: len(content) // 2]
            size = 1 if stub.drip else len(content)
            for start in range(0, len(content), size or 1):
                self.wfile.write(content[start : start + size])
                time.sleep(stub.drip)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
