"""Every baseline against its formula written as loops over numbers; relations between them."""

import functools
import inspect
import math

import baseline_loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax import baselines, gvpo_loss, gvpo_mse

pytestmark = pytest.mark.usefixtures("x64")

G, K, T = 5, 4, 6
# name -> options that differ from the defaults and make every branch of the formula matter
OPTIONS = {
    "grpo": {"epsilon": 0.1, "epsilon_high": 0.3, "kl_coef": 0.2},
    "dr_grpo": {"epsilon": 0.15, "kl_coef": 0.1, "max_completion_length": 9},
    "dapo": {"kl_coef": 0.05},
    "rloo": {"epsilon": 0.3, "kl_coef": 0.2},
    "gspo": {"epsilon": 0.05, "epsilon_high": 0.1, "kl_coef": 0.2},
    "reinforce_pp": {"epsilon": 0.1, "kl_coef": 0.3},
    "rebel": {"eta": 2.5},
    "dpo": {"beta": 0.4},
}
# Groups of 4, 3 and 2 valid completions, one of 1 and one of none.
WHERE = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


@pytest.fixture
def batch():
    """Log-probs near each other, so that some ratios are clipped and some are not; ties too."""
    rng = np.random.default_rng(0)
    logps = rng.normal(-2, 1, (G, K, T))
    rewards = rng.normal(0, 1, (G, K))
    rewards[0, 1] = rewards[0, 0]
    lengths = rng.integers(1, T + 1, (G, K))
    return {
        "logps": logps,
        "old_logps": logps - rng.normal(0, 0.2, (G, K, T)),
        "ref_logps": logps - rng.normal(0, 0.3, (G, K, T)),
        "rewards": rewards,
        "mask": np.arange(T) < lengths[..., None],
    }


def dirty(batch, where):
    """NaN wherever nothing may be read."""
    tokens = batch["mask"] & where[..., None]
    hidden = {n: np.where(tokens, batch[n], np.nan) for n in ("logps", "old_logps", "ref_logps")}
    return batch | hidden | {"rewards": np.where(where, batch["rewards"], np.nan)}


def objective(name):
    return getattr(baselines, name)(**OPTIONS[name])


def value(name, batch, where=None, *, logps=None):
    b = batch if logps is None else batch | {"logps": logps}
    arrays = (b["logps"], b["old_logps"], b["ref_logps"], b["rewards"])
    return baselines.objective_loss(objective(name), *arrays, mask=b["mask"], where=where)


def loop(name, batch, where):
    groups = baseline_loops.as_lists(batch, where)
    return getattr(baseline_loops, name)(groups, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_value_equals_loops_over_the_formula(name, batch):
    everything = np.ones((G, K), bool)
    np.testing.assert_allclose(value(name, batch), loop(name, batch, everything), rtol=1e-12)
    np.testing.assert_allclose(
        value(name, dirty(batch, WHERE), WHERE), loop(name, batch, WHERE), rtol=1e-12
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_equals_finite_differences_and_is_zero_where_nothing_may_be_read(name, batch):
    grad = jax.grad(lambda x: value(name, dirty(batch, WHERE), WHERE, logps=x))(
        jnp.asarray(dirty(batch, WHERE)["logps"])
    )
    differences = np.zeros((G, K, T))
    for index in np.ndindex(G, K, T):
        step = np.zeros((G, K, T))
        step[index] = 1e-6
        up = loop(name, batch | {"logps": batch["logps"] + step}, WHERE)
        down = loop(name, batch | {"logps": batch["logps"] - step}, WHERE)
        differences[index] = (up - down) / 2e-6
    np.testing.assert_allclose(grad, differences, atol=1e-7)
    counted = batch["mask"] & WHERE[..., None] & (WHERE.sum(-1) >= 2)[:, None, None]
    np.testing.assert_array_equal(np.asarray(grad)[~counted], 0)
    assert np.any(np.asarray(grad)[counted] != 0)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("rebel", "dpo")])
def test_clipping_silences_some_tokens_and_can_be_turned_off(name, batch):
    constant = {"max_completion_length": 9} if name == "dr_grpo" else {}

    def silent(epsilon):
        made = getattr(baselines, name)(epsilon=epsilon, epsilon_high=epsilon, **constant)
        rest = (batch["old_logps"], None, batch["rewards"])
        grad = jax.grad(lambda x: baselines.objective_loss(made, x, *rest, mask=batch["mask"]))(
            jnp.asarray(batch["logps"])
        )
        return np.sum(np.asarray(grad)[batch["mask"]] == 0)

    assert silent(0.05) > 5
    assert silent(math.inf) == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_whole_groups_add_up(name, batch):
    b, made = dirty(batch, WHERE), objective(name)
    advantages = made.advantages(b["rewards"], WHERE)
    count = made.count(advantages, b["mask"], WHERE)

    def part(logps, cut):
        arrays = (b["old_logps"][cut], b["ref_logps"][cut], advantages[cut])
        return made.total(logps[cut], *arrays, b["mask"][cut], WHERE[cut]) / count

    logps = jnp.asarray(b["logps"])
    whole = jax.value_and_grad(lambda x: value(name, b, WHERE, logps=x))(logps)
    cuts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    parts = [jax.jit(jax.value_and_grad(functools.partial(part, cut=cut)))(logps) for cut in cuts]
    np.testing.assert_allclose(sum(v for v, _ in parts), whole[0], rtol=1e-12)
    np.testing.assert_allclose(sum(g for _, g in parts), whole[1], atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_order_of_completions_and_groups_does_not_matter(name, batch):
    b = dirty(batch, WHERE)
    rng = np.random.default_rng(1)
    groups, members = rng.permutation(G), rng.permutation(K)
    moved = {n: x[groups][:, members] for n, x in b.items()}
    np.testing.assert_allclose(
        value(name, moved, WHERE[groups][:, members]), value(name, b, WHERE), rtol=1e-12
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_rewards_may_shift_by_group(name, batch):
    shifted = batch | {"rewards": batch["rewards"] + np.arange(G)[:, None]}
    np.testing.assert_allclose(value(name, shifted), value(name, batch), rtol=1e-10)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "dpo"])
def test_without_old_logps_the_policy_is_its_own_sampler(name, batch):
    def loss(logps, old_logps):
        arrays = (logps, old_logps, batch["ref_logps"], batch["rewards"])
        return baselines.objective_loss(objective(name), *arrays, mask=batch["mask"])

    logps = jnp.asarray(batch["logps"])
    implied = jax.value_and_grad(loss)(logps, None)
    given = jax.value_and_grad(loss)(logps, logps)
    np.testing.assert_array_equal(implied[0], given[0])
    np.testing.assert_array_equal(implied[1], given[1])
    assert np.any(implied[1])


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_valid_is_zero_and_gradients_flow_to_logps_alone(name, batch):
    nothing = np.zeros((G, K), bool)
    assert value(name, dirty(batch, nothing), nothing) == 0
    for other in ("old_logps", "ref_logps", "rewards"):
        grad = jax.grad(lambda x, other=other: value(name, batch | {other: x}))(
            jnp.asarray(batch[other])
        )
        np.testing.assert_array_equal(grad, 0)
    everything = np.ones((G, K), bool)
    grad = jax.grad(lambda x: jnp.sum(objective(name).advantages(x, everything) ** 3))(
        jnp.asarray(batch["rewards"])
    )
    np.testing.assert_array_equal(grad, 0)


def test_two_completions_computed_by_hand():
    # A = (1, -1) for rewards (3, 1); ratios 1.5, clipped to 1.2, and 0.5, clipped to 0.8.
    old = np.log([[[0.2], [0.4]]])
    logps, rewards, mask = (
        np.log([[[0.3], [0.2]]]),
        np.array([[3.0, 1.0]]),
        np.ones((1, 2, 1), bool),
    )
    hand = functools.partial(pytest.approx, abs=1e-9)
    # both clips bind: -(1.2 * 1 + 0.8 * -1) / 2
    assert baselines.dr_grpo_loss(logps, old, rewards, mask=mask, max_completion_length=1) == hand(
        -0.2
    )
    assert baselines.dr_grpo_loss(logps, old, rewards, mask=mask, max_completion_length=4) == hand(
        -0.05
    )
    # leave one out: A = (3 - 1, 1 - 3)
    assert baselines.rloo_loss(logps, old, rewards, mask=mask) == hand(-0.4)
    # divided by std = sqrt(2) + 1e-4, of the group and, with one group, of the batch
    std_ = math.sqrt(2) + 1e-4
    assert baselines.grpo_loss(logps, old, rewards, mask=mask) == hand(-0.2 / std_)
    assert baselines.reinforce_pp_loss(logps, old, rewards, mask=mask) == hand(-0.2 / std_)
    # upper clip 1.28: -(1.28 - 0.8) / 2
    assert baselines.dapo_loss(logps, old, rewards, mask=mask) == hand(-0.24 / std_)
    # -(1.0004 - 0.9997) / 2
    assert baselines.gspo_loss(logps, old, rewards, mask=mask) == hand(-0.00035 / std_)
    # log-ratios log 1.5 - log 0.5 = log 3; rewards differ by 2
    assert baselines.rebel_loss(logps, old, rewards, mask=mask, eta=0.5) == hand(
        (math.log(3) / 0.5 - 2) ** 2
    )
    # sigmoid(log 3) = 3/4
    assert baselines.dpo_loss(logps, old, rewards, mask=mask, beta=1.0) == hand(-math.log(0.75))


def summed(batch, name):
    return jnp.sum(jnp.where(batch["mask"], batch[name], 0), axis=-1)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_gvpo_at_the_reference_is_beta_times_rloo(beta, batch):
    """1/(gk) * k/(k-1) * (R - mean) of RLOO is 1/(g(k-1)) * (R - mean) of GVPO."""

    def gvpo(logps):
        token_ratio = logps - jax.lax.stop_gradient(logps)
        ratio = jnp.sum(jnp.where(batch["mask"], token_ratio, 0), axis=-1)
        return gvpo_loss(ratio, jnp.zeros((G, K)), batch["rewards"], beta=beta)

    def rloo(logps):
        return baselines.rloo_loss(logps, None, batch["rewards"], mask=batch["mask"])

    logps = jnp.asarray(batch["logps"])
    np.testing.assert_allclose(jax.grad(gvpo)(logps), beta * jax.grad(rloo)(logps), atol=1e-14)


@pytest.mark.parametrize("where", [None, WHERE])
def test_rebel_over_all_pairs_is_four_times_the_regression_form_of_gvpo(where, batch):
    eta = 2.5
    rebel = baselines.rebel_loss(
        batch["logps"],
        batch["old_logps"],
        batch["rewards"],
        mask=batch["mask"],
        eta=eta,
        where=where,
    )
    logps, old_logps = summed(batch, "logps"), summed(batch, "old_logps")
    mse = gvpo_mse(logps, old_logps, batch["rewards"], beta=1 / eta, where=where)
    np.testing.assert_allclose(rebel, 4 * mse, rtol=1e-12)


def test_with_completions_of_one_token_grpo_dapo_and_gspo_agree(batch):
    options = {"epsilon": 0.1, "epsilon_high": 0.2}
    arrays = [batch[n][..., :1] for n in ("logps", "old_logps")] + [batch["rewards"]]
    mask = np.ones((G, K, 1), bool)
    grpo = baselines.grpo_loss(*arrays, mask=mask, **options)
    for other in (baselines.dapo_loss, baselines.gspo_loss):
        np.testing.assert_allclose(other(*arrays, mask=mask, **options), grpo, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_stays_float32_under_jit_and_is_close_to_float64(name, batch):
    b = {n: x if x.dtype == bool else x.astype(np.float32) for n, x in batch.items()}
    single = jax.jit(lambda b: value(name, b))(b)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, value(name, batch), rtol=1e-4)
    assert value(name, {n: jnp.asarray(x) for n, x in batch.items()}).dtype == jnp.float64
    half = b | {n: jnp.asarray(b[n], jnp.bfloat16) for n in ("logps", "old_logps", "ref_logps")}
    assert value(name, half | {"rewards": b["rewards"]}).dtype == jnp.float32


@pytest.mark.parametrize("name", OPTIONS)
def test_a_policy_far_away_gives_finite_numbers(name, batch):
    far = {n: np.asarray(batch[n], np.float32) for n in ("logps", "old_logps", "ref_logps")}
    rewards = np.asarray(batch["rewards"], np.float32)
    for sign in (-1, 1):
        moved = batch | far | {"rewards": rewards, "logps": far["logps"] + np.float32(sign * 300)}
        loss, grad = jax.value_and_grad(lambda x, b=moved: value(name, b, logps=x))(
            jnp.asarray(moved["logps"])
        )
        assert np.isfinite(loss)
        assert np.all(np.isfinite(grad))
        assert np.isfinite(np.sum(np.asarray(grad) ** 2, dtype=np.float32))


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "dpo"])
def test_the_loss_by_name_is_the_objective_s_value(name, batch):
    arrays = (batch["logps"], batch["old_logps"], batch["rewards"])
    loss = getattr(baselines, f"{name}_loss")
    options = OPTIONS[name] | {"ref_logps": batch["ref_logps"]}
    np.testing.assert_array_equal(loss(*arrays, mask=batch["mask"], **options), value(name, batch))
    assert loss.__name__ == f"{name}_loss"


@pytest.mark.parametrize("name", OPTIONS)
def test_nan_that_does_not_count_is_no_alarm_in_eager_mode_either(name, batch):
    hidden = dirty(batch, WHERE)
    with jax.debug_nans(True):
        assert np.isfinite(value(name, hidden, WHERE))
        grad = jax.grad(lambda x: value(name, hidden, WHERE, logps=x))(batch["logps"])
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_dtypes_mix_where_promotion_is_strict(name, batch):
    mixed = batch | {
        "logps": jnp.asarray(batch["logps"], jnp.float32),
        "old_logps": jnp.asarray(batch["old_logps"], jnp.bfloat16),
        "rewards": np.round(batch["rewards"]).astype(np.int32),
    }
    expected = value(name, mixed, WHERE)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(value(name, mixed, WHERE), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_signatures_name_every_option(name):
    shown = inspect.signature(getattr(baselines, f"{name}_loss")).parameters
    assert set(inspect.signature(getattr(baselines, name)).parameters) < set(shown)
    assert "options" not in shown


def test_dpo_reads_a_reference_and_no_sampler(batch):
    loss = baselines.dpo_loss(
        batch["logps"], batch["ref_logps"], batch["rewards"], mask=batch["mask"], beta=0.4
    )
    np.testing.assert_array_equal(loss, value("dpo", batch))


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_shapes_and_small_groups_are_refused(name, batch):
    for broken, message in [
        ({"rewards": batch["rewards"].T}, r"rewards has shape \(4, 5\).*\(5, 4\)"),
        ({"mask": batch["mask"][:1]}, r"mask has shape \(1, 4, 6\).*\(5, 4, 6\)"),
        ({n: x[:, :1] for n, x in batch.items()}, r"k >= 2.*\(5, 1\).*\(5, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            value(name, batch | broken)
    with pytest.raises(ValueError, match=r"rewards has shape \(5, 4\) but where has shape \(4,\)"):
        value(name, batch, WHERE[0])
    compared = "ref_logps" if name == "dpo" else "old_logps"
    with pytest.raises(ValueError, match=r"shape \(5, 4, 1\).*shape \(5, 4, 6\)"):
        value(name, batch | {compared: batch[compared][..., :1]})


def test_numbers_that_make_no_sense_and_missing_references_are_refused(batch):
    for name in ("epsilon", "epsilon_high", "kl_coef"):
        with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
            baselines.grpo(**{name: -1})
    with pytest.raises(ValueError, match="max_completion_length must be > 0"):
        baselines.dr_grpo(0)
    with pytest.raises(ValueError, match="eta must be > 0"):
        baselines.rebel(0)
    with pytest.raises(ValueError, match="beta must be > 0"):
        baselines.dpo(-0.1)
    for name in ("grpo", "dpo"):
        with pytest.raises(ValueError, match="ref_logps must not be None"):
            value(name, batch | {"ref_logps": None})
