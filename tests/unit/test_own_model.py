"""A model without cache and groups gives what the decoder does, which has both, and is trained."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rounding import rounding
from small_run import config, one_layer

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.errors import UserError
from gvpo_jax.models import decoder
from gvpo_jax.models.decoder import DecoderConfig, DecoderOptions, decoder_fns, init_params
from gvpo_jax.models.load import load_model
from gvpo_jax.models.own import OwnModel, plain_functions
from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.step import token_logps

CONFIG = DecoderConfig("qwen3", 43, 16, 24, 2, 4, 2, 4, tie_embeddings=True, qk_norm=True)
PARAMS = jax.tree.map(lambda x: 2 * x, init_params(CONFIG, 0))  # far from uniform
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(7, 43, n).tolist() for n in (9, 2, 5, 1)]
STOPS = (5, 6)


def hidden(params, tokens_bs):
    """The decoder as somebody else's model: whole texts in, hidden states out."""
    model = nnx.merge(decoder._graph(CONFIG, DecoderOptions()), params)
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens_bs[:, None].shape, 2)
    return model(tokens_bs[:, None], positions)[0][:, 0]


PLAIN = plain_functions(hidden, lambda params: params["embed"]["embedding"])
OURS = decoder_fns(CONFIG)


def test_log_probs_and_gradients_are_the_decoders():
    completions = RNG.integers(7, 43, (4, 3, 6))
    batch = (*pad_prompts(PROMPTS), completions)
    weights = RNG.normal(size=completions.shape).astype(np.float32)

    def both(functions):
        def total(params):
            logps = token_logps(functions, params, *batch)
            return (weights * logps).sum(), logps

        return jax.jit(jax.grad(total, has_aux=True))

    ours, theirs = both(OURS), both(PLAIN)
    atol = rounding(lambda params: ours(params)[1], PARAMS)
    (ours, expected), (theirs, found) = ours(PARAMS), theirs(PARAMS)
    np.testing.assert_allclose(found, expected, atol=atol)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("slots", [None, 3])
def test_samples_are_the_decoders(slots):
    """With slots a completion begins anywhere in the ring."""

    def generate(functions):
        return InProcessEngine(SamplingModel(functions), STOPS, slots=slots).generate(
            PARAMS, PROMPTS, range(4), num_generations=3, max_completion_length=12,
            sampling=SamplingParams(), seed=1,
        )  # fmt: skip

    ours, theirs = generate(OURS), generate(PLAIN)
    np.testing.assert_array_equal(ours.completions, theirs.completions)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    assert len(set(ours.lengths.ravel().tolist())) > 2
    np.testing.assert_allclose(ours.old_logps, theirs.old_logps, atol=1e-3)


# In the trainer


def letter_share(prompt, completion):
    return sum(letter.islower() for letter in completion) / max(len(completion), 1)


ROWS = [{"prompt": f"Word {number}: "} for number in range(6)]


def debug_as_own():
    """A model of this package, and the same without what the package knows of it."""
    loaded = one_layer()
    shape = loaded.config

    def hidden(params, tokens_bs):
        model = nnx.merge(decoder._graph(shape, DecoderOptions()), params)
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens_bs[:, None].shape, 2)
        return model(tokens_bs[:, None], positions)[0][:, 0]

    functions = plain_functions(hidden, lambda params: params["head"]["kernel"].T)
    own = OwnModel(functions, loaded.params, loaded.tokenizer, 2048, (259,), name="mine")
    return loaded, own


def test_a_run_is_that_of_the_same_model_loaded(tmp_path):
    """Also where the devices cut it."""
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2}
    loaded, own = debug_as_own()
    runs = []
    for name, model in (("loaded", loaded), ("own", own)):
        c = config(tmp_path / name, train__steps=3, eval__success_reward=None, **mesh)
        summary = Trainer(c, model).train(ROWS, letter_share, eval_dataset=ROWS[:2])
        runs.append((summary["eval/reward_before"], read_metrics(tmp_path / name)))
    (before, ours), (same, theirs) = runs
    assert before == pytest.approx(same, abs=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - {"padding"} == b.keys() - {"padding"}
        for name in {"reward", "gvpo_mse", "kl", "grad_norm", "eval/reward"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_a_tokenizer_of_others_is_refused():
    with pytest.raises(UserError, match=r"takes a tokenizer of transformers, .* got NoneType$"):
        OwnModel(plain_functions(lambda *_: None, lambda _: None), {}, None, 64)


def test_a_run_of_an_own_model_goes_on_bitwise(tmp_path):
    _, own = debug_as_own()
    Trainer(config(tmp_path / "whole", train__steps=3), own).train(ROWS, letter_share)
    for stop in (1, None):
        c = config(tmp_path / "parts", train__steps=3, train__stop_at=stop)
        trainer = Trainer(c, own)
        trainer.train(ROWS, letter_share)
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts]
    assert trainer.generate(["Word: "])[0][0] is not None
    with pytest.raises(UserError, match=r"mine is a model of your own: save trainer\.policy"):
        trainer.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model__dtype": "bfloat16", "rollout__tensor": 1}, r"^model\.dtype, rollout\.tensor: "),
        ({"model__lora": {"rank": 2}}, r"^model\.lora: that is for models which gvpo_jax loads"),
        ({"model__scan_layers": True}, r"^model\.scan_layers: that is"),
        ({"data__max_prompt_length": 4000}, "but mine was made for 2048"),
        ({"rollout__stop_token_ids": [260]}, "mine: 260 can't be a stop token"),
    ],
)  # fmt: skip
def test_settings_for_models_that_are_loaded_here_are_refused(tmp_path, settings, told):
    with pytest.raises(UserError, match=told):
        Trainer(config(tmp_path, **settings), debug_as_own()[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gemma_of_tunix_is_trained(tmp_path):
    """Its log-probs are those of its own logits, and an update follows their gradient."""
    gemma3 = importlib.import_module("tunix.models.gemma3.model")
    shape = gemma3.ModelConfig(
        num_layers=2, num_embed=260, embed_dim=32, hidden_dim=48, num_heads=2, head_dim=16,
        num_kv_heads=1, sliding_window_size=8, param_dtype=jnp.float32,
    )  # fmt: skip
    graph, state = nnx.split(gemma3.Gemma3(shape, rngs=nnx.Rngs(0)))

    def run(params, tokens_bs):
        model = nnx.merge(graph, nnx.State(params))
        b, s = tokens_bs.shape
        positions = jnp.broadcast_to(jnp.arange(s)[None], (b, s))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((s, s), bool))[None], (b, s, s))
        logits, _ = model(tokens_bs, positions, None, mask, output_hidden_states=True)
        return logits, nnx.pop(model, nnx.Intermediate)["all_hidden_states"].value[0]

    params = nnx.to_pure_dict(state)
    functions = plain_functions(
        lambda params, tokens: run(params, tokens)[1],
        lambda params: params["embedder"]["input_embedding"],
    )
    own = OwnModel(functions, params, load_model("debug").tokenizer, 64, name="Tunix's Gemma 3")
    text = jnp.asarray([[72, 105, 32, 97, 98, 99]])
    logits, _ = jax.jit(run)(params, text)
    expected = jax.nn.log_softmax(logits, axis=-1)[0, 2:5][jnp.arange(3), text[0, 3:]]
    score = jax.jit(functools.partial(token_logps, functions))
    found = score(params, text[:, :3], jnp.asarray([3]), text[:, None, 3:])
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)
    trainer = Trainer(config(tmp_path, train__steps=2), own)
    first = trainer.train_step(["Hi "], [["abc", "x"]], [[1.0, 0.0]])
    second = trainer.train_step(["Hi "], [["abc", "x"]], [[1.0, 0.0]])
    assert second["gvpo_mse"] < first["gvpo_mse"]
    assert trainer.train(ROWS, letter_share)["steps"] == 2
