import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from small_run import one_layer

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.data.groups import Source, make_group, stack, to_batch
from gvpo_jax.errors import UserError
from gvpo_jax.logprobs import token_logprobs
from gvpo_jax.models.decoder import (
    DecoderConfig,
    DecoderOptions,
    decoder_fns,
    init_params,
    param_shapes,
)
from gvpo_jax.parallel.layout import (
    LAYOUT,
    batch_axes,
    group_shards,
    path_name,
    place_batch,
    shardings,
)
from gvpo_jax.parallel.mesh import MeshConfig, check_hosts
from gvpo_jax.rollout import SamplingParams
from gvpo_jax.tpu_compile.report import prepare
from gvpo_jax.trainer import Trainer

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def policy(data, fsdp, tensor, **settings):
    sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    base = {
        "rollout__num_generations": 4,
        "rollout__max_completion_length": 6,
        "data__max_prompt_length": 32,
        "optimizer__learning_rate": 1e-2,
        "optimizer__name": "sgd",
    }
    return Trainer(override(Config(), **base | sizes | settings), one_layer())


def five_updates(trainer, groups=8):
    """Sample, score by token value, update, five times: losses and what was sampled."""
    prompts = [[65 + i, 66, 67] for i in range(groups)]
    losses, samples = [], []
    for step in range(5):
        rollout = trainer.engine.generate(
            trainer.policy.params, prompts, range(groups), num_generations=4,
            max_completion_length=6, sampling=SamplingParams(), seed=step,
        )  # fmt: skip
        rewards = (rollout.completions[..., 0] % 7) / 7.0
        batch = to_batch(
            stack(
                [
                    make_group(
                        prompt,
                        [x[:n] for x, n in zip(*group, strict=True)],
                        r,
                        source=Source.POLICY,
                    )
                    for prompt, r, *group in zip(
                        prompts, rewards, rollout.completions, rollout.lengths, strict=True
                    )
                ]
            )
        )
        policy = trainer.policy
        losses.append(float(policy.update(policy.with_reference(batch))["gvpo_mse"]))
        samples.append(rollout)
    return losses, samples


@pytest.fixture(scope="module")
def alone():
    one = policy(1, 1, 1)
    return one, *five_updates(one)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        *((sizes, {}) for sizes in MESHES),
        ((1, 8, 1), {"rollout__tensor": 2}),  # devices that share a copy of the weights to sample
        ((2, 2, 2), {"rollout__tensor": 1}),
        ((2, 2, 2), {"rollout__slots": 8}),  # completions at a time
    ],
)
def test_any_mesh_gives_the_single_devices_samples_and_trajectory(alone, sizes, settings):
    one, losses, samples = alone
    many = policy(*sizes, **settings)
    many_losses, many_samples = five_updates(many)
    np.testing.assert_allclose(many_losses, losses, atol=1e-6)
    for a, b in zip(samples, many_samples, strict=True):
        np.testing.assert_array_equal(a.lengths, b.lengths)
        np.testing.assert_array_equal(a.completions, b.completions)
    for a, b in zip(
        jax.tree.leaves(one.policy.params), jax.tree.leaves(many.policy.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_completions_of_a_group_may_lie_on_different_devices():
    """Two groups of four on eight devices: groups over `data`, completions over `fsdp`."""
    settings = {"train__batch_size": 2}
    one, many = policy(1, 1, 1, **settings), policy(2, 4, 1, **settings)
    assert batch_axes(many.policy._programs.mesh, 2, 4) == (("data",), ("fsdp",))
    (losses, samples), (many_losses, many_samples) = (five_updates(p, 2) for p in (one, many))
    np.testing.assert_allclose(many_losses, losses, atol=1e-6)
    for a, b in zip(samples, many_samples, strict=True):
        np.testing.assert_array_equal(a.completions, b.completions)
    for a, b in zip(
        jax.tree.leaves(one.policy.params), jax.tree.leaves(many.policy.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_to_sample_the_weights_are_cut_otherwise():
    cut = policy(1, 8, 1, rollout__tensor=2, model__dtype="bfloat16")
    params = cut.engine.model.prepare(cut.policy.params)
    kernel = params["layers"][0]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
    assert kernel.dtype == jnp.bfloat16
    assert cut.policy.params["layers"][0]["mlp"]["gate"]["kernel"].dtype == jnp.float32
    with pytest.raises(UserError, match="tensor=3 does not divide 8 devices"):
        policy(1, 8, 1, rollout__tensor=3)


def test_a_reference_in_low_precision_scores_the_same():
    """It is computed with in bfloat16 anyway. An average is not: small steps would vanish."""
    one = policy(1, 2, 2, model__dtype="bfloat16").policy
    assert {x.dtype for x in jax.tree.leaves(one.reference)} == {jnp.dtype("bfloat16")}
    rng = np.random.default_rng(0)
    arrays = {
        "prompts": rng.integers(0, 99, (2, 8)),
        "prompt_lengths": np.array([8, 5]),
        "completions": rng.integers(0, 99, (2, 4, 6)),
    }
    same = [one._programs.token_logps(params, arrays) for params in (one.reference, one.params)]
    np.testing.assert_allclose(*same, atol=2e-6)  # bitwise on one device
    average = policy(1, 2, 2, model__dtype="bfloat16", reference__name="ema").policy
    assert {x.dtype for x in jax.tree.leaves(average.reference)} == {jnp.dtype("float32")}


def test_a_snapshot_outlives_the_update_that_overwrites_the_state():
    one = policy(1, 1, 1)
    snapshot = one.policy.snapshot()
    before = jax.tree.map(np.array, snapshot)
    five_updates(one, groups=2)
    for a, b in zip(jax.tree.leaves(snapshot), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("topology", ["v5e:8x8", "v6e:4x8", "v5p:2x2x4"])
@pytest.mark.parametrize("sizes", [(1, -1, 1), (4, -1, 1), (1, -1, 4)])
def test_every_host_of_a_pod_holds_rows_that_follow_each_other(topology, sizes):
    """JAX's own order of a v5e-64 gives the first host rows 0, 1, 8 and 9."""
    prepare()
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))).mesh(devices)
    hosts = [device.process_index for device in mesh.devices.ravel()]
    assert hosts == sorted(hosts)
    assert len(set(hosts)) == len(devices) // 4
    check_hosts(mesh, "mesh.tensor")


def test_slices_lie_along_data():
    prepare()
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2).devices
    mesh = MeshConfig(fsdp=4, tensor=4).mesh(devices)
    assert mesh.devices.shape == (2, 4, 4)
    for row in mesh.devices:
        assert len({device.slice_index for device in row.ravel()}) == 1
    along_fsdp = MeshConfig(fsdp=4, tensor=4, dcn_data=1, dcn_fsdp=2).mesh(devices)
    assert along_fsdp.devices.shape == (1, 8, 4)
    slices = [device.slice_index for device in along_fsdp.devices[0, :, 0]]
    assert slices == [0] * 4 + [1] * 4


def test_a_row_over_several_hosts_is_refused():
    prepare()
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    with pytest.raises(UserError, match="tensor=8 is more than the chips of one host"):
        check_hosts(MeshConfig(tensor=8).mesh(devices), "rollout.tensor")


def test_gradients_of_the_head_add_up_in_float32_over_chunks():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 1, 1024, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 64, (1, 1, 1024)))
    config = DecoderConfig("llama", 64, 16, 16, 1, 2, 2, 8)
    params = init_params(config, 0)

    def gradient(dtype):
        head = decoder_fns(config, DecoderOptions(dtype=dtype)).head

        def total(params):
            return jnp.sum(
                token_logprobs(hidden.astype(dtype), head(params), tokens, chunk_bytes=2 * 64 * 4)
            )

        return jax.jit(jax.grad(total))(params)["head"]["kernel"]

    exact = gradient(jnp.float32)
    assert jnp.linalg.norm(gradient(jnp.bfloat16) - exact) < 0.004 * jnp.linalg.norm(exact)


def test_gradients_of_a_frequent_token_add_up_in_float32():
    """In bfloat16, adding 1 to 256 changes nothing."""
    config = DecoderConfig("llama", 16, 8, 16, 1, 2, 2, 4)
    params = init_params(config, 0)
    apply = decoder_fns(config, DecoderOptions(dtype=jnp.bfloat16))
    tokens = jnp.full((1, 1, 600), 5)

    def total(params):
        prompt = jnp.array([[3]]), jnp.array([1])
        return jnp.sum(apply.completion_hidden(params, *prompt, tokens).astype(jnp.float32))

    def exact(params):
        wide = decoder_fns(config)
        prompt = jnp.array([[3]]), jnp.array([1])
        return jnp.sum(wide.completion_hidden(params, *prompt, tokens))

    got, wanted = (jax.jit(jax.grad(f))(params)["embed"]["embedding"][5] for f in (total, exact))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())


def test_parameters_and_moments_are_cut_over_the_mesh():
    cut = policy(1, 4, 2, optimizer__name="adamw")
    kernel = cut.policy.state.params["layers"][0]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    moments = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(cut.policy.state.opt_state)
        if path_name(path).endswith("mu/layers/0/mlp/gate/kernel")
    ]
    assert [m.sharding.spec for m in moments] == [P("fsdp", "tensor")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_parameter_matches_a_rule(family):
    import re

    config = DecoderConfig(
        family, 64, 16, 32, 1, 4, 2, 4, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
    )
    for path, leaf in jax.tree.leaves_with_path(param_shapes(config)):
        name = path_name(path)
        specs = [spec for pattern, spec in LAYOUT if re.search(pattern, name)]
        assert len(specs) == 1, name
        assert len(specs[0]) == len(leaf.shape), name


def test_sizes_that_do_not_fit_are_refused():
    assert dict(MeshConfig(data=2, fsdp=-1, tensor=2).mesh().shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    assert group_shards(MeshConfig(data=2, fsdp=2, tensor=2).mesh()) == 4
    for sizes in ({"data": 16}, {"data": 3, "fsdp": -1}, {"fsdp": 0}, {"data": -1, "fsdp": -1}):
        with pytest.raises(UserError, match="mesh"):
            MeshConfig(**sizes).mesh()
    tree = {"layers": {0: {"mlp": {"gate": {"kernel": jnp.zeros((6, 4))}}}}}
    with pytest.raises(UserError, match=r"gate/kernel.*\(6, 4\).*fsdp=4"):
        shardings(MeshConfig(fsdp=4, tensor=2).mesh(), tree)
    with pytest.raises(UserError, match=r"batch_size / .* = 6: 6 groups of 4 .* 1 x 8 devices"):
        policy(1, 8, 1, train__batch_size=6)


def test_caches_are_cut_over_the_groups_and_odd_shapes_are_replicated():
    many = policy(1, 8, 1)
    engine = many.engine
    prompts, lengths = pad_prompts([[65, 66]] * 8)
    placed = place_batch(engine.model.mesh, {"prompts": prompts, "prompt_lengths": lengths}, 4)
    prompts, lengths = placed["prompts"], placed["prompt_lengths"]
    state, computed = engine._prefill(many.policy.params, prompts, lengths, k=4, t=6, size=(8, 4))
    for leaf in jax.tree.leaves((state, computed)):
        if leaf.ndim:
            assert leaf.addressable_shards[0].data.shape[0] == 1, leaf.shape
    small = policy(2, 2, 2, rollout__cache_dtype="int8")
    state, computed = small.engine._prefill(
        small.policy.params, np.ones((8, 16), int), np.full(8, 3), k=4, t=6,
        size=(4, 1),
    )  # fmt: skip
    for prefix in (state.prefix, computed.prefix):
        for leaf in jax.tree.leaves([(layer.keys, layer.values) for layer in prefix]):
            assert leaf.sharding.spec[:2] == (("data", "fsdp"), "tensor")
    factored = {"v_row": {"attn": {"k": {"bias": jnp.zeros(1)}}}}
    assert jax.tree.leaves(shardings(MeshConfig(fsdp=4, tensor=2).mesh(), factored))[0].spec == P(
        None
    )
