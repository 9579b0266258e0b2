import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax import group, ungroup


def test_neighbouring_rows_become_a_group_and_return():
    rows = jnp.arange(24).reshape(6, 4)
    folded = group(rows, 3)
    assert folded.shape == (2, 3, 4)
    np.testing.assert_array_equal(folded[1, 0], rows[3])
    np.testing.assert_array_equal(ungroup(folded), rows)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(7,\).*k=3"):
        group(jnp.zeros(7), 3)
    with pytest.raises(ValueError, match="at least 1"):
        group(jnp.zeros(6), 0)
    with pytest.raises(ValueError, match=r"\[G, k"):
        ungroup(jnp.zeros(6))
