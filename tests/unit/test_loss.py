import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax import gvpo_loss, gvpo_mse, gvpo_weights

BETA = 0.3
pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    logps = rng.normal(-8, 3, (5, 4))
    return logps, logps - rng.normal(0, 2, (5, 4)), rng.normal(0, 1, (5, 4))


def loop_weights(logps, ref_logps, rewards, beta, where=None):
    """The definition, one number at a time."""
    weights = np.zeros(np.shape(rewards))
    for g in range(len(rewards)):
        members = [i for i in range(len(rewards[g])) if where is None or where[g][i]]
        if len(members) < 2:
            continue
        mean_reward = sum(rewards[g][i] for i in members) / len(members)
        mean_ratio = sum(logps[g][i] - ref_logps[g][i] for i in members) / len(members)
        for i in members:
            ratio = logps[g][i] - ref_logps[g][i]
            weights[g][i] = (rewards[g][i] - mean_reward) - beta * (ratio - mean_ratio)
    return weights


def loop_loss(logps, ref_logps, rewards, beta, where=None):
    weights = loop_weights(logps, ref_logps, rewards, beta, where)
    losses = []
    for g in range(len(rewards)):
        members = [i for i in range(len(rewards[g])) if where is None or where[g][i]]
        if len(members) >= 2:
            total = sum(weights[g][i] * logps[g][i] for i in members)
            losses.append(-beta * total / (len(members) - 1))
    return sum(losses) / max(len(losses), 1)


def test_a_group_computed_by_hand():
    # R - mean R = (1, -1) / 2, rho - mean = (0.4, 0) - 0.2 = (0.2, -0.2), w_1 = 0.5 - 0.1 * 0.2
    logps, ref, rewards = jnp.array([-1.0, -2.0]), jnp.array([-1.4, -2.0]), jnp.array([1.0, 0.0])
    np.testing.assert_allclose(
        gvpo_weights(logps, ref, rewards, beta=0.1), [0.48, -0.48], atol=1e-12
    )
    # -0.1 * (0.48 * -1 + -0.48 * -2) / 1 = -0.048;   1/2 * 2 * 0.48^2 / 1 = 0.2304
    np.testing.assert_allclose(gvpo_loss(logps, ref, rewards, beta=0.1), -0.048, atol=1e-12)
    np.testing.assert_allclose(gvpo_mse(logps, ref, rewards, beta=0.1), 0.2304, atol=1e-12)


def test_weights_and_loss_equal_a_plain_loop(groups):
    np.testing.assert_allclose(
        gvpo_weights(*groups, beta=BETA), loop_weights(*groups, BETA), atol=1e-12
    )
    np.testing.assert_allclose(gvpo_loss(*groups, beta=BETA), loop_loss(*groups, BETA), atol=1e-12)


def test_mask_equals_a_loop_over_ragged_groups_even_with_nan_behind_it(groups):
    where = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    dirty = [np.where(where, x, np.nan) for x in groups]
    expected = loop_loss(*groups, BETA, where)
    np.testing.assert_allclose(gvpo_loss(*dirty, beta=BETA, where=where), expected, atol=1e-12)
    weights = gvpo_weights(*dirty, beta=BETA, where=where)
    np.testing.assert_allclose(weights, loop_weights(*groups, BETA, where), atol=1e-12)
    grad = jax.grad(lambda x: gvpo_loss(x, *dirty[1:], beta=BETA, where=where))(
        jnp.asarray(dirty[0])
    )
    counts = where.sum(-1, keepdims=True)
    by_hand = -BETA * loop_weights(*groups, BETA, where) / np.maximum(counts - 1, 1) / 3
    np.testing.assert_allclose(grad, by_hand, atol=1e-12)


def test_gradient_equals_that_of_the_regression_form(groups):
    logps, ref, rewards = map(jnp.asarray, groups)
    surrogate = jax.grad(lambda x: gvpo_loss(x, ref, rewards, beta=BETA))(logps)
    regression = jax.grad(lambda x: gvpo_mse(x, ref, rewards, beta=BETA))(logps)
    np.testing.assert_allclose(surrogate, regression, atol=1e-12)
    steps = np.eye(logps.size).reshape(-1, *logps.shape) * 1e-6
    up = np.array([gvpo_mse(logps + s, ref, rewards, beta=BETA) for s in steps])
    down = np.array([gvpo_mse(logps - s, ref, rewards, beta=BETA) for s in steps])
    np.testing.assert_allclose(surrogate.ravel(), (up - down) / 2e-6, atol=1e-8)


def test_value_of_the_regression_form_is_half_the_sample_variance(groups):
    logps, ref, rewards = groups
    residual = BETA * (logps - ref) - rewards
    np.testing.assert_allclose(
        gvpo_mse(*groups, beta=BETA), 0.5 * residual.var(axis=-1, ddof=1).mean(), atol=1e-12
    )


def test_shifts_inside_a_group_and_permutations_change_nothing(groups):
    logps, ref, rewards = groups
    weights = gvpo_weights(*groups, beta=BETA)
    shifts = np.arange(5.0)[:, None]
    np.testing.assert_allclose(
        gvpo_weights(logps + shifts, ref, rewards - 3, beta=BETA), weights, atol=1e-12
    )
    order = np.array([2, 0, 3, 1])
    permuted = [x[:, order] for x in groups]
    np.testing.assert_allclose(
        gvpo_weights(*permuted, beta=BETA), np.asarray(weights)[:, order], atol=1e-12
    )
    np.testing.assert_allclose(
        gvpo_loss(*permuted, beta=BETA), gvpo_loss(*groups, beta=BETA), atol=1e-12
    )


def test_residuals_vanish_where_the_policy_is_the_optimum(groups):
    _, ref, rewards = groups
    at_optimum = ref + rewards / BETA + 1.7  # log pi* = log pi_ref + R / beta - log Z
    np.testing.assert_allclose(gvpo_weights(at_optimum, ref, rewards, beta=BETA), 0, atol=1e-12)


def test_no_gradient_through_weights_reference_or_rewards(groups):
    logps, ref, rewards = map(jnp.asarray, groups)
    for which in (0, 1, 2):
        grads = jax.grad(lambda *a: gvpo_weights(*a, beta=BETA).sum() ** 2, argnums=which)(
            logps, ref, rewards
        )
        np.testing.assert_array_equal(grads, 0)
    for loss in (gvpo_loss, gvpo_mse):
        for which in (1, 2):
            grads = jax.grad(lambda *a, f=loss: f(*a, beta=BETA), argnums=which)(
                logps, ref, rewards
            )
            np.testing.assert_array_equal(grads, 0)


def test_low_precision_inputs_are_computed_in_float32():
    rng = np.random.default_rng(1)
    rewards = jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16)
    logps = jnp.asarray(rng.normal(-300, 1, (3, 4)), jnp.bfloat16)
    for f in (gvpo_loss, gvpo_mse, gvpo_weights):
        assert f(logps, logps, rewards).dtype == jnp.float32
    exact = loop_weights(*(np.asarray(x, np.float64) for x in (logps, logps, rewards)), 0.1)
    np.testing.assert_allclose(gvpo_weights(logps, logps, rewards), exact, atol=1e-6)


def test_batches_of_batches_and_jit_and_vmap_agree(groups):
    stacked = [np.stack([x, 2 * x]) for x in groups]
    per_batch = [gvpo_loss(*(x[i] for x in stacked), beta=BETA) for i in range(2)]
    np.testing.assert_allclose(gvpo_loss(*stacked, beta=BETA), np.mean(per_batch), atol=1e-12)
    mapped = jax.jit(jax.vmap(lambda *a: gvpo_loss(*a, beta=BETA)))(*stacked)
    np.testing.assert_allclose(mapped, per_batch, atol=1e-12)


def test_beta_may_be_traced(groups):
    value = jax.jit(lambda b: gvpo_loss(*groups, beta=b))(BETA)
    np.testing.assert_allclose(value, gvpo_loss(*groups, beta=BETA), atol=1e-12)


def test_huber_on_a_group_computed_by_hand():
    # At the reference w = R - mean R = (3, 0, -1, -2); clipped (1, 0, -1, -1), whose mean is -1/4.
    ref, rewards = jnp.array([-1.0, -2.0, -3.0, -4.0]), jnp.array([5.0, 2.0, 1.0, 0.0])
    weights = gvpo_weights(ref, ref, rewards, beta=0.6, huber_delta=1.0)
    np.testing.assert_allclose(weights, [1.25, 0.25, -0.75, -0.75], atol=1e-12)
    # -0.6 / 3 * (1.25 * -1 + 0.25 * -2 + 0.75 * 3 + 0.75 * 4) = -0.7
    loss = gvpo_loss(ref, ref, rewards, beta=0.6, huber_delta=1.0)
    np.testing.assert_allclose(loss, -0.7, atol=1e-12)
    # H = 1 * (3 - 1/2), 0, 1/2, 1 * (2 - 1/2): 4.5 over 3
    np.testing.assert_allclose(gvpo_mse(ref, ref, rewards, beta=0.6, huber_delta=1.0), 1.5)


HUBER_WHERE = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize("where", [None, HUBER_WHERE])
def test_huber_gradients_agree_and_equal_finite_differences(where, groups):
    dirty = groups if where is None else [np.where(where, x, np.nan) for x in groups]
    logps, ref, rewards = map(jnp.asarray, dirty)
    options = {"beta": BETA, "where": where, "huber_delta": 0.5}
    clipped = np.abs(gvpo_weights(*dirty, beta=BETA, where=where)) > 0.5
    assert 3 < np.sum(clipped) < 19  # some residuals are beyond delta and some are not
    surrogate = jax.grad(lambda x: gvpo_loss(x, ref, rewards, **options))(logps)
    regression = jax.grad(lambda x: gvpo_mse(x, ref, rewards, **options))(logps)
    np.testing.assert_allclose(surrogate, regression, atol=1e-12)
    steps = np.eye(logps.size).reshape(-1, *logps.shape) * 1e-6
    up = np.array([gvpo_mse(logps + s, ref, rewards, **options) for s in steps])
    down = np.array([gvpo_mse(logps - s, ref, rewards, **options) for s in steps])
    np.testing.assert_allclose(surrogate.ravel(), (up - down) / 2e-6, atol=1e-8)


def test_huber_equals_a_loop_over_ragged_groups(groups):
    delta, values, num_groups = 0.5, 0.0, 0
    residuals = loop_weights(*groups, BETA, HUBER_WHERE)
    expected = np.zeros((5, 4))
    for g in range(5):
        members = [i for i in range(4) if HUBER_WHERE[g, i]]
        if len(members) < 2:
            continue
        num_groups += 1
        clipped = {i: min(max(residuals[g, i], -delta), delta) for i in members}
        for i in members:
            w = abs(residuals[g, i])
            values += (w**2 / 2 if w <= delta else delta * (w - delta / 2)) / (len(members) - 1)
            expected[g, i] = clipped[i] - sum(clipped.values()) / len(members)
    options = {"beta": BETA, "where": HUBER_WHERE, "huber_delta": delta}
    np.testing.assert_allclose(gvpo_weights(*groups, **options), expected, atol=1e-12)
    np.testing.assert_allclose(gvpo_mse(*groups, **options), values / num_groups, atol=1e-12)


def test_a_large_huber_delta_changes_nothing_and_may_be_traced(groups):
    for f in (gvpo_loss, gvpo_mse, gvpo_weights):
        plain = f(*groups, beta=BETA)
        np.testing.assert_allclose(f(*groups, beta=BETA, huber_delta=1e3), plain, atol=1e-12)
        traced = jax.jit(lambda d, f=f: f(*groups, beta=BETA, huber_delta=d))(1e3)
        np.testing.assert_allclose(traced, plain, atol=1e-12)


def test_huber_damps_an_outlier(groups):
    """A reward gone wrong in one group: the step that it adds is bounded."""
    logps, ref, rewards = map(jnp.asarray, groups)

    def step(rewards, **options):
        return jax.grad(lambda x: gvpo_loss(x, ref, rewards, beta=BETA, **options))(logps)

    def added(**options):
        outlier = rewards.at[0, 0].add(100)
        return float(jnp.linalg.norm(step(outlier, **options) - step(rewards, **options)))

    assert added(huber_delta=0.5) < 0.02 * added()


def test_huber_keeps_the_optimum():
    """Every group of three out of six outcomes, weighed by a sampler unlike the policy."""
    rng = np.random.default_rng(2)
    rewards, ref = rng.normal(0, 1, 6), jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, 6)))
    chance = np.asarray(jax.nn.softmax(jnp.asarray(rng.normal(0, 0.5, 6))))
    members = np.stack(np.meshgrid(*[np.arange(6)] * 3), -1).reshape(-1, 3)
    weight = jnp.asarray(chance[members].prod(-1))

    def expected(logits):
        logps = jax.nn.log_softmax(logits)

        def of_group(i):
            options = {"beta": 0.5, "huber_delta": 0.05}
            return gvpo_loss(logps[i], ref[i], jnp.asarray(rewards)[i], **options)

        return jnp.sum(weight * jax.vmap(of_group)(jnp.asarray(members)))

    def descend(logits, rate):
        return logits - rate * jax.grad(expected)(logits), None

    logits, _ = jax.lax.scan(descend, ref, jnp.full(4000, 8.0))
    optimum = jax.nn.log_softmax(ref + jnp.asarray(rewards) / 0.5)
    start = jnp.sum(jnp.exp(optimum) * (optimum - ref))
    end = jnp.sum(jnp.exp(optimum) * (optimum - jax.nn.log_softmax(logits)))
    assert start > 0.1
    assert end < 1e-8


@pytest.mark.parametrize("f", [gvpo_loss, gvpo_weights, gvpo_mse])
def test_wrong_shapes_small_groups_and_beta_are_refused(f):
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"rewards has shape \(4, 3\).*\(3, 4\)"):
        f(x, x, x.T)
    with pytest.raises(ValueError, match=r"ref_logps has shape \(3,\).*\(3, 4\)"):
        f(x, x[:, 0], x)
    with pytest.raises(ValueError, match=r"^ref_logps is None: give an array"):
        gvpo_loss(x, None, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"where has shape \(3,\)"):
        f(x, x, x, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"k >= 2.*\(3, 1\)"):
        f(x[:, :1], x[:, :1], x[:, :1])
    for number in (0, -0.1):
        with pytest.raises(ValueError, match="beta must be > 0"):
            f(x, x, x, beta=number)
        with pytest.raises(ValueError, match="huber_delta must be > 0"):
            f(x, x, x, huber_delta=number)


LOSSES = (gvpo_loss, gvpo_mse)
WHERE = np.array(
    [[1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0]], bool
)


@pytest.fixture
def wide():
    """Three groups of eight: logps, ref_logps, rewards."""
    rng = np.random.default_rng(3)
    logps = rng.normal(-8, 3, (3, 8))
    return logps, logps - rng.normal(0, 2, (3, 8)), rng.normal(0, 1, (3, 8))


@pytest.mark.parametrize("options", [{}, {"huber_delta": 0.3}])
@pytest.mark.parametrize(("sizes", "axes"), [((2,), "k"), ((8,), "k"), ((2, 4), ("k", "l"))])
def test_groups_cut_over_devices_equal_whole_ones(wide, sizes, axes, options):
    names = (axes,) if isinstance(axes, str) else axes
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    cut, everywhere = jax.P(None, axes), jax.P()

    def over(f, out):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(cut,) * 4, out_specs=out))

    def whole(f):
        return lambda *a: f(*a[:3], beta=BETA, where=a[3], **options)

    def parts(f):
        return lambda *a: f(*a[:3], beta=BETA, where=a[3], k=8, axis_name=axes, **options)

    arrays = *wide, WHERE
    np.testing.assert_allclose(
        over(parts(gvpo_weights), cut)(*arrays), whole(gvpo_weights)(*arrays), atol=1e-12
    )
    for f in LOSSES:
        value, grad = jax.value_and_grad(whole(f))(*arrays)
        inside = over(jax.value_and_grad(parts(f)), (everywhere, cut))(*arrays)
        around = jax.value_and_grad(over(parts(f), everywhere))(*arrays)
        for found in (inside, around):
            np.testing.assert_allclose(found[0], value, atol=1e-12)
            np.testing.assert_allclose(found[1], grad, atol=1e-12)


def test_k_finds_groups_that_were_not_folded_tokens_not_summed_and_groups_cut(wide):
    logps, ref, rewards = wide
    for f in (*LOSSES, gvpo_weights):
        f(*wide, k=8)
        with pytest.raises(ValueError, match=r"k=8, .* holds 24; fold flat rows"):
            f(logps.ravel(), ref.ravel(), rewards.ravel(), k=8)
        tokens = [np.repeat(x[..., None], 5, -1) for x in wide]
        with pytest.raises(ValueError, match=r"holds 5; .* sum \[G, k, T\] over its tokens"):
            f(*tokens, k=8)
    mesh = jax.make_mesh((2,), ("k",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.shard_map(
        lambda *a: gvpo_loss(*a, k=8), mesh=mesh, in_specs=jax.P(None, "k"), out_specs=jax.P()
    )
    with pytest.raises(ValueError, match=r"holds 4; .* name the mesh axis"):
        cut(*wide)


def test_nan_behind_the_mask_is_no_alarm_in_eager_mode_either(wide):
    dirty = [np.where(WHERE, x, np.nan) for x in wide]
    with jax.debug_nans(True):
        for f in (*LOSSES, gvpo_weights):
            assert np.isfinite(f(*dirty, where=WHERE)).all()
        for f in LOSSES:
            grad = jax.grad(lambda x, f=f: f(x, *dirty[1:], where=WHERE))(wide[0])
            assert np.isfinite(grad).all()


@pytest.mark.parametrize("rewards", [np.float32, np.int32, bool, jnp.bfloat16])
@pytest.mark.parametrize("logps", [np.float32, jnp.bfloat16])  # float16 is not for every CPU
def test_dtypes_mix_where_promotion_is_strict(wide, logps, rewards):
    arrays = [jnp.asarray(x, d) for x, d in zip(wide, (logps, np.float32, rewards), strict=True)]
    for f in (*LOSSES, gvpo_weights):
        expected = f(*arrays, beta=0.1, where=WHERE, huber_delta=0.2)
        with jax.numpy_dtype_promotion("strict"):
            found = f(*arrays, beta=np.float64(0.1), where=WHERE, huber_delta=jnp.float32(0.2))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_signatures_can_be_read():
    shown = str(inspect.signature(gvpo_loss))
    assert "ArrayLike" in shown
    assert "Union" not in shown
