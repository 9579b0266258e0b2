"""gvpo-jax: a `Policy`'s update, and the in-process engine."""

import numpy as np

LEARNING_RATE = 1e-6


def train(w, folder, device):
    from workloads import batch

    policy = trainer(w, folder).policy
    given = trained_on(w)
    scored = policy.with_reference(given).ref_logps * batch(w).mask

    def update():
        float(policy.update(given)["loss"])

    return update, scored.sum(-1).reshape(-1).tolist()


def trainer(w, folder, **settings):
    """A trainer of the workload; settings as `SECTION__NAME` beside those that it implies."""
    from gvpo_jax.config import Config
    from gvpo_jax.config_file import override
    from gvpo_jax.trainer import Trainer

    implied = {
        "model__name": str(folder),
        "model__dtype": w.dtype,
        "rollout__num_generations": w.k,
        "rollout__max_completion_length": w.t,
        "data__max_prompt_length": w.p,
        "train__batch_size": w.g,
        "optimizer__learning_rate": LEARNING_RATE,
        "mesh__fsdp": 1,
    }
    return Trainer(override(Config(), **implied | settings))


def trained_on(w):
    """The workload's batch, as `Policy.update` takes it."""
    from workloads import batch

    from gvpo_jax.data.batch import Batch

    arrays, gk = batch(w), (w.g, w.k)
    per_token = np.full(arrays.mask.shape, -np.log(w.vocab), np.float32)
    return Batch(
        prompts=arrays.prompts,
        prompt_lengths=np.full(w.g, w.p, np.int32),
        completions=arrays.completions,
        lengths=w.lengths.astype(np.int32),
        rewards=arrays.rewards,
        valid=np.ones(gk, bool),
        ref_logps=per_token,
        old_logps=per_token,
        source=np.zeros(gk, np.int32),
        version=np.zeros(gk, np.int32),
    )


def rollout(w, folder, device):
    import jax
    import jax.numpy as jnp
    from workloads import batch

    from gvpo_jax.models import load_model
    from gvpo_jax.models.decoder import DecoderOptions, decoder_fns
    from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams

    model = load_model(str(folder))
    dtype = jnp.dtype(w.dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), model.params)
    decoder = decoder_fns(model.config, DecoderOptions(dtype=dtype))
    engine = InProcessEngine(SamplingModel(decoder), stop_ids=())
    prompts = batch(w).prompts.tolist()

    def generate():
        drawn = engine.generate(
            params, prompts, range(w.g), num_generations=w.k, max_completion_length=w.t,
            sampling=SamplingParams(), seed=0,
        )  # fmt: skip
        assert drawn.lengths.sum() == w.tokens

    return generate, None
