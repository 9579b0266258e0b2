"""Whatever is in a file or an answer: it is taken, or refused by a line; never a traceback.

Hypothesis makes the input. `GVPO_FUZZ=2000 pytest tests/unit/test_fuzz.py` tries that many cases of
each test in place of a few, and others each time.
"""

import contextlib
import json
import os
import string
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gvpo_jax.collect.offline import read_groups
from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, override
from gvpo_jax.config_trl import TRL_NAMES
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.data.rows import as_rows, load_rows
from gvpo_jax.errors import UserError, one_line
from gvpo_jax.models.gguf import read_gguf
from gvpo_jax.models.hf_config import decoder_config
from gvpo_jax.models.hf_files import open_safetensors
from gvpo_jax.models.load import read_tokenizer
from gvpo_jax.report import write_report
from gvpo_jax.rewards import compute_rewards
from gvpo_jax.rollout.servers import dialects
from gvpo_jax.rundir.files import read_history, read_latest_completions, read_settings, read_summary
from gvpo_jax.settings import all_settings

MANY = int(os.environ.get("GVPO_FUZZ", "0"))
settings.register_profile(
    "fuzz",
    max_examples=MANY or 40,
    derandomize=not MANY,
    database=None,
    deadline=20_000,  # milliseconds a case: nothing may hang
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")

KEYS = [setting.key for setting in all_settings(Config())] + list(TRL_NAMES)
TEXTS = st.text(max_size=40) | st.sampled_from(["", "\0", "\ud800", "1e999", "nan", "-1", "${x}"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**400, 1e308])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)


def taken_or_refused(function, *arguments):
    """What it gives, or None where it raises UserError with a line that fits the screen."""
    try:
        return function(*arguments)
    except UserError as error:
        line = one_line(str(error))
        assert line.strip()
        assert len(line) <= 500
        assert "\n" not in line
        return None


def as_json(value):
    return json.dumps(value).encode()


def mutated(content):
    """Bytes with some of them changed, removed, repeated or put in."""

    def change(edits):
        out = bytearray(content)
        for kind, place, new in edits:
            at = place % (len(out) + 1)
            if kind == "flip" and at < len(out):
                out[at] ^= new[0] or 1
            elif kind == "cut":
                del out[at:]
            elif kind == "put":
                out[at:at] = new
            elif kind == "over":
                out[at : at + len(new)] = new
        return bytes(out)

    edit = st.tuples(
        st.sampled_from(["flip", "flip", "over", "put", "cut"]),
        st.integers(0, 2**16),
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"[" * 3000, b"\0" * 8]),
    )
    return st.lists(edit, min_size=1, max_size=4).map(change)


@given(st.sampled_from(KEYS), LEAVES | TEXTS, st.text(string.printable, max_size=12))
def test_overrides(key, value, more):
    for text in (f"{key}={value}", f"{key}{more}={value}", f"{more}={value}", more):
        taken_or_refused(load_config, "debug", [text.replace("\0", "")])


@given(st.sampled_from(KEYS), VALUES)
def test_settings_of_any_type(key, value):
    taken_or_refused(lambda: override(Config(), **{key.replace(".", "__"): value}))


CONFIG = b"""run: {dir: runs/x}
data: {path: rows.jsonl, columns: [a, b]}
rewards: {funcs: ["a.py:f"], weights: [1.0]}
loss: {beta: 0.1}
train: {steps: 20, batch_size: 8}
model:
  name: debug
  lora: {rank: 8}
"""


@given(mutated(CONFIG) | VALUES.map(as_json) | st.binary(max_size=200))
def test_config_files(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_bytes(content)
    taken_or_refused(load_config, file)


ROW = {
    "prompt": [{"role": "user", "content": "What?"}],
    "completions": ["a", "b"],
    "rewards": [0, 1],
}


@given(
    mutated(as_json(ROW) + b"\n" + as_json({"prompt": "x"})) | VALUES.map(as_json),
    st.sampled_from(["jsonl", "json", "jsonl.gz", "parquet"]),
)
def test_files_of_rows(tmp_path_factory, content, ending):
    file = tmp_path_factory.mktemp("rows") / f"rows.{ending}"
    file.write_bytes(content)
    taken_or_refused(load_rows, file)


@given(
    st.lists(st.dictionaries(st.sampled_from([*ROW, "logps", "x"]), VALUES, max_size=4)) | VALUES
)
def test_rows_and_groups_from_python(rows):
    if found := taken_or_refused(as_rows, rows):
        prompts = EncodedPrompts(found, [[1]] * len(found), 0)
        limits = {"reference": 0, "vocab_size": 32, "max_completion_length": 8}
        encode = lambda text: [1] * min(len(text), 5)  # noqa: E731
        taken_or_refused(lambda: read_groups(prompts, encode, **limits))


SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64,
    "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from([*SHAPE, "rope_scaling", "sliding_window"]), VALUES, max_size=3
    ),
    st.sampled_from(["llama", "qwen3", "gemma3_text", "qwen3_moe", "phi3", "granite"]),
)
def test_config_json(changes, family):
    taken_or_refused(decoder_config, SHAPE | {"model_type": family} | changes)


TENSORS = save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)})


@given(mutated(TENSORS) | st.binary(max_size=100))
def test_safetensors(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.safetensors").write_bytes(content)
    source = taken_or_refused(open_safetensors, folder)
    for name in source.shapes if source else ():
        taken_or_refused(source.read, name)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<end>"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((3, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@given(data=st.data())
def test_gguf(small_gguf, tmp_path_factory, data):
    file = tmp_path_factory.mktemp("gguf") / "x.gguf"
    claim = st.integers(0, 2**64 - 1).map(lambda n: small_gguf[:8] + struct.pack("<Q", n))
    file.write_bytes(data.draw(mutated(small_gguf) | claim.map(lambda x: x + small_gguf[16:])))
    taken_or_refused(read_gguf, file)


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


@given(mutated(as_json(TOKENIZER)), VALUES.map(as_json) | st.binary(max_size=50))
def test_tokenizers(tmp_path_factory, content, settings_):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_bytes(settings_)
    taken_or_refused(read_tokenizer, folder)


@given(VALUES | st.lists(LEAVES | st.just(RuntimeError("x")), min_size=2, max_size=2))
def test_what_reward_functions_give(answer):
    def reward(**_):
        return answer

    taken_or_refused(
        lambda: compute_rewards(
            [reward], prompts=["p", "q"], completions=["a", "b"], completion_ids=[[1], [2]],
            columns={},
        )
    )  # fmt: skip


@given(mutated(b'{"step": 1, "reward": 0.5, "loss": 1.0}\n{"step": 2}\n'), VALUES.map(as_json))
def test_run_folders(tmp_path_factory, lines, value):
    run = tmp_path_factory.mktemp("run")
    for name in ("metrics.jsonl", "completions/step_000001.jsonl", "eval/after.jsonl"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(lines)
    (run / "config.yaml").write_bytes(value)
    (run / "summary.json").write_bytes(value)
    for read in (read_history, read_settings, read_summary, read_latest_completions, write_report):
        taken_or_refused(read, run)


@given(VALUES, st.sampled_from(["_vllm_read", "_sglang_read"]))
def test_answers_of_servers(reply, name):
    """What is no answer raises one of the errors that `client._read` takes for a bad one."""
    read = getattr(dialects, name)
    arguments = ([1, 2],) if name == "_vllm_read" else ()
    with contextlib.suppress(KeyError, TypeError, ValueError, IndexError, AttributeError):
        read(reply, *arguments)
