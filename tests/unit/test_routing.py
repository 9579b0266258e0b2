"""Whether sampling and scoring send tokens to the same experts, and how that is logged."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import transformers
from test_families import (
    FAMILIES,
    PROMPT_LENGTHS,
    PROMPTS,
    SHAPE,
    Case,
    random_model,
    tokenizer,
)

from gvpo_jax.data.groups import Source, make_groups
from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderOptions, decoder_fns
from gvpo_jax.rollout.inprocess import InProcessEngine, SamplingModel
from gvpo_jax.rollout.routing import disagreement
from gvpo_jax.trainer import Trainer

RNG = np.random.default_rng(0)
COMPLETIONS, LENGTHS = RNG.integers(3, 61, (2, 6, 33)), RNG.integers(20, 34, (2, 6))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Of two layers of experts."""
    sizes = {"num_hidden_layers": 2, "mlp_only_layers": []}
    return Case("qwen3_moe", tmp_path_factory.mktemp("experts"), **sizes)


def measured(case, dtype):
    """Of samples by a model in this dtype, scored in float32."""
    fns = decoder_fns(case.ours.config, DecoderOptions(dtype=dtype))
    engine = InProcessEngine(SamplingModel(fns, scoring=SamplingModel(case.fns)), ())
    prompts = [row[:n].tolist() for row, n in zip(PROMPTS, PROMPT_LENGTHS, strict=True)]
    groups = make_groups(prompts, COMPLETIONS, LENGTHS, source=Source.POLICY)
    return engine.routing_metrics(case.ours.params, groups)["router/disagreement"]


def test_in_the_same_dtype_tokens_go_to_the_same_experts(case):
    assert measured(case, jnp.float32) == 0


def test_in_another_dtype_some_go_elsewhere(case):
    assert 0 < measured(case, jnp.bfloat16) < 0.2


@pytest.mark.parametrize("setting", ["mesh__tensor", "rollout__tensor"])
def test_experts_that_devices_do_not_divide_are_told_before_weights_are_read(
    tmp_path, monkeypatch, setting
):
    values = SHAPE | FAMILIES["qwen3_moe"] | {"vocab_size": 62}
    random_model(transformers.AutoConfig.for_model("qwen3_moe", **values)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("gvpo_jax.models.load.read_params", None)
    settings = {"model__name": str(tmp_path), "mesh__fsdp": 2, setting: 2}
    words = r"experts/down/kernel of shape \(5, 12, 24\) does not divide over mesh axis tensor=2"
    with pytest.raises(UserError, match=words):
        Trainer(small_run.config(tmp_path / "run", **settings))


def test_sets_are_compared_where_tokens_count():
    """Two layers, three experts a token; the last token of a completion goes through no layer."""
    a = np.arange(12).reshape(1, 1, 2, 2, 3)
    b = a[..., ::-1].copy()
    assert disagreement(a, b, np.array([[3]])) == (0, 4)
    b[0, 0, 1, 0, 0] = 99
    assert disagreement(a, b, np.array([[3]])) == (1, 4)
    assert disagreement(a, b, np.array([[2]])) == (0, 2)
    assert disagreement(a, b, np.array([[1]])) == (0, 0)


def test_a_run_logs_its_experts_and_draws_them(case, tmp_path):
    """On a mesh where sampling cuts the weights otherwise than training."""
    c = small_run.config(tmp_path, train__steps=1, mesh__fsdp=2, rollout__tensor=1)
    rows = [{"prompt": f"w{i}"} for i in range(3, 7)]
    trainer = Trainer(c, case.ours)
    trainer.train(rows, [lambda completions, **_: [float(len(text)) for text in completions]])
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["router/disagreement"] == 0
    assert line["router/aux_loss"] > 1.5
    assert 1 > line["router/max_share"] > 2 / 5
    page = (tmp_path / "report.html").read_text()
    for title in ("Load of experts", "Busiest expert", "Experts that differ"):
        assert title in page
