import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gvpo_jax.training.optimizer import OptimizerConfig


def make(name, **settings):
    return OptimizerConfig(name, **{"learning_rate": 0.1} | settings).create(total_steps=1)


def rates(name, *, warmup, total, steps):
    config = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=warmup)
    schedule = config.rates(total)
    return [float(schedule(step)) for step in range(steps)]


def cosine(fraction):
    return 2.0 * 0.5 * (1 + math.cos(math.pi * fraction))


@pytest.mark.parametrize(
    ("name", "warmup", "total", "expected"),
    [
        ("constant", 0, 3, [2, 2, 2, 2, 2]),
        ("constant", 1, 3, [2, 2, 2, 2, 2]),
        ("constant", 4, 9, [0.5, 1, 1.5, 2, 2, 2]),  # the first update already moves
        ("constant", 4, 2, [0.5, 1]),  # a run that ends while warming up
        ("linear", 0, 4, [2, 1.5, 1, 0.5, 0, 0]),
        ("linear", 2, 6, [1, 2, 2, 1.5, 1, 0.5, 0, 0]),
        ("linear", 1, 3, [2, 2, 1, 0]),
        ("linear", 3, 2, [2 / 3, 4 / 3]),
        ("cosine", 0, 4, [2, cosine(1 / 4), 1, cosine(3 / 4), 0, 0]),
        ("cosine", 2, 5, [1, 2, 2, cosine(1 / 3), cosine(2 / 3), 0]),
        ("cosine", 4, 4, [0.5, 1, 1.5, 2]),
    ],
)
def test_learning_rate_of_every_update(name, warmup, total, expected):
    got = rates(name, warmup=warmup, total=total, steps=len(expected))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def params():
    return {
        "kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]]),
        "scale": jnp.array([1.0, 3.0]),
    }


def gradients(step=0):
    return {
        "kernel": jnp.array([[0.3, -0.1], [0.0, 0.2]]) * (1 + step),
        "scale": jnp.array([-0.4, 0.05]) - 0.1 * step,
    }


def run(optimizer, grads):
    """Parameters after one update for each of `grads`."""
    p = params()
    state = optimizer.init(p)
    for g in grads:
        updates, state = jax.jit(optimizer.update)(g, state, p)
        p = optax.apply_updates(p, updates)
    return p


def adamw_by_hand(grads, *, lr, b1, b2, eps, decay, max_norm):
    """Loshchilov and Hutter's AdamW in NumPy, in float64; decay for the matrix only."""
    p = {name: np.asarray(x, np.float64) for name, x in params().items()}
    m, v = ({name: np.zeros_like(x) for name, x in p.items()} for _ in range(2))
    for t, g in enumerate(grads, start=1):
        g = {name: np.asarray(x, np.float64) for name, x in g.items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for name, x in g.items():
            x = x * min(1.0, max_norm / norm)
            m[name] = b1 * m[name] + (1 - b1) * x
            v[name] = b2 * v[name] + (1 - b2) * x**2
            step = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            step += decay * p[name] if name == "kernel" else 0
            p[name] = p[name] - lr * step
    return p


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("max_norm", [0.2, 1e9])
def test_adamw_is_adamw(steps, max_norm):
    numbers = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
    optimizer = make("adamw", **numbers, weight_decay=0.05, max_grad_norm=max_norm)
    grads = [gradients(step) for step in range(steps)]
    expected = adamw_by_hand(grads, lr=0.1, **numbers, decay=0.05, max_norm=max_norm)
    got = run(optimizer, grads)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_the_schedule_sets_the_rate_of_each_update():
    config = OptimizerConfig("sgd", 1.0, "linear", b1=0.0, max_grad_norm=None)
    optimizer = config.create(total_steps=4)
    got = run(optimizer, [gradients()] * 3)  # rates 1, 3/4, 1/2
    expected = jax.tree.map(lambda p, g: p - 2.25 * g, params(), gradients())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


@pytest.mark.parametrize(
    ("max_norm", "factor"), [(1.0, 1 / 5), (2.5, 1 / 2), (5.0, 1), (9.0, 1), (None, 1)]
)
def test_clipping_is_by_the_norm_of_the_whole_gradient(max_norm, factor):
    grads = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "scale": jnp.array([0.0, 4.0])}
    optimizer = make("sgd", learning_rate=1.0, b1=0.0, max_grad_norm=max_norm)
    got = run(optimizer, [grads])
    np.testing.assert_allclose(got["kernel"][0, 0], 1 - 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(got["scale"][1], 3 - 4 * factor, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_weight_decay_shrinks_matrices_by_the_learning_rate_and_spares_vectors(name):
    optimizer = make(name, b1=0.0, weight_decay=0.5)
    got = run(optimizer, [jax.tree.map(jnp.zeros_like, params())])
    np.testing.assert_allclose(got["kernel"], params()["kernel"] * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(got["scale"], params()["scale"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_no_weight_decay_unless_asked_for(name):
    got = run(make(name), [jax.tree.map(jnp.zeros_like, params())])
    jax.tree.map(np.testing.assert_array_equal, got, params())


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_one_step_goes_down_a_quadratic(name):
    def height(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    before = params()
    after = run(make(name), [jax.grad(height)(before)])
    assert height(after) < height(before)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (jnp.abs(a - b) > 1e-4).all()
