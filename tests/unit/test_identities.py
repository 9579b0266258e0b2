"""What GVPO is equal to, to float64 rounding; the other side of each equation is written out here.

In all of it a = beta * (l - ref) - R, and Var and Cov divide by k - 1 unless their name says else.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gvpo_jax import gvpo_loss, gvpo_mse, gvpo_weights

BETA = 0.3
pytestmark = pytest.mark.usefixtures("x64")


def random_groups(g=5, k=4, seed=0):
    rng = np.random.default_rng(seed)
    logps = rng.normal(-8, 3, (g, k))
    return logps, logps - rng.normal(0, 2, (g, k)), rng.normal(0, 1, (g, k))


def close(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=atol)


def cov(x, y):
    return np.mean([np.cov(a, b)[0, 1] for a, b in zip(x, y, strict=True)])


class Toy:
    """Softmax policies over 6 responses to each of 3 prompts, and groups of responses drawn."""

    def __init__(self, drawn=((0, 3, 3, 5, 1), (2, 4, 0, 0, 0), (1, 2, 3, 4, 5))):
        rng = np.random.default_rng(0)
        self.params, self.reference, self.table = jnp.asarray(rng.normal(size=(3, 3, 6)))
        self.drawn = np.array(drawn)
        self.rewards = self.of_drawn(self.table)

    def of_drawn(self, table):
        return jnp.take_along_axis(table, self.drawn, axis=-1)

    def logps(self, params):
        return self.of_drawn(jax.nn.log_softmax(params))

    def grad(self, objective, params=None):
        """Of `objective(logps, ref_logps, rewards)` with respect to the policy's parameters."""
        params, ref = self.params if params is None else params, self.logps(self.reference)
        return jax.jit(jax.grad(lambda p: objective(self.logps(p), ref, self.rewards)))(params)


def regression(logps, ref, rewards, *, stop_mean=False):
    halves = []
    for a in BETA * (logps - ref) - rewards:
        mean = jnp.sum(a) / len(a)
        mean = jax.lax.stop_gradient(mean) if stop_mean else mean
        halves.append(jnp.sum((a - mean) ** 2) / (len(a) - 1) / 2)
    return sum(halves) / len(halves)


def unstopped(logps, ref, rewards):
    """The well-known slip: the surrogate with weights that gradients flow through."""
    a = BETA * (logps - ref) - rewards
    centred = a - a.mean(axis=-1, keepdims=True)
    return BETA * jnp.sum(centred * logps) / (logps.shape[-1] - 1) / len(logps)


def rloo(logps, rewards):
    """The policy-gradient loss, mean over k, of every reward less the mean of the others."""
    losses = []
    for row, values in zip(logps, rewards, strict=True):
        k = len(values)
        others = jnp.stack([sum(values[j] for j in range(k) if j != i) for i in range(k)]) / (k - 1)
        losses.append(-jnp.mean((values - others) * row))
    return sum(losses) / len(losses)


# The gradient.


def test_gradient_is_that_of_the_regression_with_or_without_its_mean_stopped():
    toy = Toy()
    surrogate = toy.grad(lambda *a: gvpo_loss(*a, beta=BETA))
    close(surrogate, toy.grad(regression))
    close(surrogate, toy.grad(lambda *a: regression(*a, stop_mean=True)))
    close(surrogate, toy.grad(lambda *a: gvpo_mse(*a, beta=BETA)))
    assert optax.tree.norm(surrogate) > 0.01


def test_gradient_by_every_log_prob_is_minus_beta_times_its_weight():
    logps, ref, rewards = map(jnp.asarray, random_groups(g=2, k=3))
    gradient = jax.grad(lambda x: gvpo_loss(x, ref, rewards, beta=BETA))(logps)
    for g, i in np.ndindex(2, 3):
        pulls = [rewards[g, j] - BETA * (logps[g, j] - ref[g, j]) for j in range(3)]
        close(gradient[g, i], -BETA * (pulls[i] - sum(pulls) / 3) / 2 / 2)  # k - 1, 2 groups


def test_weights_not_stopped_add_half_beta_squared_times_the_variance_of_the_log_probs():
    toy = Toy()
    right, slip = toy.grad(lambda *a: gvpo_loss(*a, beta=BETA)), toy.grad(unstopped)
    extra = toy.grad(lambda logps, *_: BETA**2 / 2 * jnp.var(logps, axis=-1, ddof=1).mean())
    close(slip, right + extra)
    assert optax.tree.norm(extra) > 0.01


def test_weights_not_stopped_pull_away_from_the_optimum_and_rest_at_its_square_root():
    """Between sqrt(pi*) and pi* the two gradients point against each other."""
    toy = Toy(drawn=[range(6)] * 3)
    optimum = toy.reference + toy.table / BETA

    def both(params):
        return toy.grad(lambda *a: gvpo_loss(*a, beta=BETA), params), toy.grad(unstopped, params)

    right, slip = both(0.75 * optimum)
    assert jnp.vdot(right, slip) / jnp.linalg.norm(right) / jnp.linalg.norm(slip) < -0.1
    right, slip = both(optimum)
    close(right, 0)
    assert jnp.linalg.norm(slip) > 0.01
    right, slip = both(0.5 * optimum)
    close(slip, 0)
    assert jnp.linalg.norm(right) > 0.01


# The value.


def test_value_is_a_sum_of_covariances():
    logps, ref, rewards = groups = random_groups()
    moving = BETA**2 / 2 * cov(logps, logps) - BETA * cov(rewards, logps)
    moving -= BETA**2 * cov(logps, ref)
    constant = cov(rewards, rewards) / 2 + BETA * cov(rewards, ref) + BETA**2 / 2 * cov(ref, ref)
    close(gvpo_mse(*groups, beta=BETA), moving + constant)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_value_is_a_quarter_of_the_mean_squared_difference_of_pairs(k):
    logps, ref, rewards = groups = random_groups(k=k)
    a = BETA * (logps - ref) - rewards
    pairs = [(row[i] - row[j]) ** 2 for row in a for i, j in itertools.permutations(range(k), 2)]
    close(gvpo_mse(*groups, beta=BETA), np.mean(pairs) / 4)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_value_and_gradient_are_those_of_scaled_trajectory_balance(k):
    """VarGrad: log Z is the group's own mean of log(pi_ref exp(R / beta) / pi)."""
    logps, ref, rewards = groups = random_groups(k=k)

    def trajectory_balance(logps):
        log_z = jnp.mean(ref + rewards / BETA - logps, axis=-1, keepdims=True)
        return jnp.mean((log_z + logps - ref - rewards / BETA) ** 2)

    scale = BETA**2 * k / (2 * (k - 1))
    close(gvpo_mse(*groups, beta=BETA), scale * trajectory_balance(logps))
    gradient = jax.grad(lambda x: gvpo_loss(x, ref, rewards, beta=BETA))(logps)
    close(gradient, scale * jax.grad(trajectory_balance)(logps))


def test_two_completions_leave_a_quarter_of_their_squared_difference():
    logps, ref, rewards = groups = random_groups(k=2)
    a = BETA * (logps - ref) - rewards
    close(gvpo_mse(*groups, beta=BETA), np.mean((a[:, 0] - a[:, 1]) ** 2) / 4)
    half = (rewards[:, 0] - rewards[:, 1] - BETA * (logps - ref) @ np.array([1, -1])) / 2
    close(gvpo_weights(*groups, beta=BETA), np.stack([half, -half], axis=-1))


# What changes nothing.


@pytest.mark.parametrize("f", [gvpo_loss, gvpo_mse])
def test_rewards_and_beta_scaled_alike_scale_the_loss_by_the_square(f):
    logps, ref, rewards = random_groups()
    close(f(logps, ref, 3 * rewards, beta=3 * BETA), 9 * f(logps, ref, rewards, beta=BETA))
    close(
        gvpo_weights(logps, ref, 3 * rewards, beta=3 * BETA),
        3 * gvpo_weights(logps, ref, rewards, beta=BETA),
    )


@pytest.mark.parametrize("f", [gvpo_loss, gvpo_mse])
def test_constants_added_to_a_group_and_orders_change_neither_value_nor_gradient(f):
    logps, ref, rewards = map(jnp.asarray, random_groups())
    both = jax.jit(jax.value_and_grad(lambda *a: f(*a, beta=BETA)))
    value, gradient = both(logps, ref, rewards)
    shift = jnp.array([-4.0, 0.0, 1.0, 7.0, 300.0])[:, None]  # another constant for every group
    for shifted in (
        (logps, ref, rewards + shift),
        (logps + shift, ref, rewards),
        (logps, ref + shift, rewards),
    ):
        new_value, new_gradient = both(*shifted)
        close(new_value, value, atol=1e-11)
        close(new_gradient, gradient)
    rng = np.random.default_rng(1)
    order = rng.permuted(np.tile(np.arange(4), (5, 1)), axis=1)
    new_value, new_gradient = both(
        *(jnp.take_along_axis(x, order, axis=1) for x in (logps, ref, rewards))
    )
    close(new_value, value)
    close(new_gradient, jnp.take_along_axis(gradient, order, axis=1))
    new_value, new_gradient = both(logps[::-1], ref[::-1], rewards[::-1])
    close(new_value, value)
    close(new_gradient, gradient[::-1])


# What it estimates.


def tuples(k, probabilities):
    """All k-tuples of responses and the probability of drawing each; of two, one per count."""
    if k <= 8:
        drawn = np.array(list(itertools.product(range(len(probabilities)), repeat=k)))
        return drawn, np.prod(probabilities[drawn], axis=-1)
    first = np.arange(k + 1)  # how often response 0 came; the order does not matter
    drawn = (np.arange(k) >= first[:, None]).astype(int)
    ways = np.array([math.comb(k, n) for n in first], float)
    return drawn, ways * probabilities[0] ** first * probabilities[1] ** (k - first)


@pytest.mark.parametrize(
    ("k", "responses", "fraction"), [(2, 4, 0.5), (4, 4, 0.75), (8, 3, 0.875), (32, 2, 0.969)]
)
def test_dividing_by_k_minus_1_is_unbiased_and_by_k_is_not(k, responses, fraction):
    """The exact expectation over everything that may be drawn, value and gradient."""
    rng = np.random.default_rng(k)
    params, reference, table = rng.normal(size=(3, responses))
    sampling = rng.dirichlet(np.full(responses, 3.0))  # any distribution, not the policy's
    drawn, chance = tuples(k, sampling)
    close(chance.sum(), 1)

    def arrays(params):
        logps, ref = jax.nn.log_softmax(params), jax.nn.log_softmax(jnp.asarray(reference))
        return logps[drawn], ref[drawn], jnp.asarray(table)[drawn]

    def expected(f):
        return lambda params: chance @ jax.vmap(lambda *a: f(*a, beta=BETA))(*arrays(params))

    def truth(params):
        """Half the variance under the sampling distribution itself: no groups, no k."""
        a = BETA * (jax.nn.log_softmax(params) - reference) - table
        return sampling @ (a - sampling @ a) ** 2 / 2

    params = jnp.asarray(params)
    close(jax.jit(expected(gvpo_mse))(params), truth(params))
    close(jax.jit(jax.grad(expected(gvpo_loss)))(params), jax.grad(truth)(params))
    logps, ref, rewards = arrays(params)
    by_k = chance @ np.var(BETA * (logps - ref) - rewards, axis=-1) / 2
    close(by_k / truth(params), (k - 1) / k)
    assert round(float(by_k / truth(params)), 3) == fraction


# What it becomes.


def test_policy_at_the_reference_gets_beta_times_the_gradient_of_rloo():
    """One update per rollout and the sampling policy as the reference: every log-ratio is 0."""
    toy = Toy()
    logps = toy.logps(toy.params)
    ours = jax.grad(lambda p: gvpo_loss(toy.logps(p), logps, toy.rewards, beta=BETA))(toy.params)
    theirs = jax.grad(lambda p: rloo(toy.logps(p), toy.rewards))(toy.params)
    close(ours, BETA * theirs)
    assert optax.tree.norm(theirs) > 0.01


def test_anywhere_else_it_is_rloo_with_the_log_ratio_taken_off_the_reward():
    toy = Toy()
    ours = toy.grad(lambda *a: gvpo_loss(*a, beta=BETA))

    def with_penalty(logps, ref, rewards):
        return rloo(logps, rewards - BETA * jax.lax.stop_gradient(logps - ref))

    close(ours, BETA * toy.grad(with_penalty))


def after_updates(beta, *, reference_is_the_sampler):
    # Every response drawn, so that no gradient is mere rounding, which Adam would blow up.
    toy, optimizer = Toy(drawn=[range(6)] * 3), optax.adam(0.1, eps=1e-30)
    params, reference = toy.reference, toy.reference
    state = optimizer.init(params)
    for _ in range(5):
        reference = params if reference_is_the_sampler else reference
        ref = toy.logps(reference)

        def loss(p, ref=ref):
            return gvpo_loss(toy.logps(p), ref, toy.rewards, beta=beta)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    return params


def test_beta_does_nothing_under_adam_where_the_reference_is_the_sampler():
    """So a comparison of betas needs a fixed reference, or several updates per rollout."""
    small, large = (after_updates(beta, reference_is_the_sampler=True) for beta in (0.05, 2.0))
    close(small, large, atol=1e-9)
    small, large = (after_updates(beta, reference_is_the_sampler=False) for beta in (0.05, 2.0))
    assert jnp.max(jnp.abs(small - large)) > 0.05
