"""The gradient of GVPO by its plain identity: loops over completions, no line of the library."""

import numpy as np


def plain_gradient(jacobian_gkn, logps_gk, ref_logps_gk, rewards_gk, beta):
    """Mean over the groups of `-beta * sum_i w_i grad log pi(y_i) / (k-1)`."""
    groups, k, n = jacobian_gkn.shape
    gradient = np.zeros(n)
    for g in range(groups):
        rho = logps_gk[g] - ref_logps_gk[g]
        for i in range(k):
            weight = rewards_gk[g, i] - rewards_gk[g].mean() - beta * (rho[i] - rho.mean())
            gradient -= beta * weight * jacobian_gkn[g, i] / (k - 1) / groups
    return gradient


def same(found, wanted, tolerance=1e-4):
    """They differ by less than that share of the gradient's length, which is not zero."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    length = np.linalg.norm(wanted)
    assert length > 1e-3, length
    assert np.linalg.norm(found - wanted) < tolerance * length, (found, wanted)
    assert np.linalg.norm(found - 1.01 * wanted) > tolerance * length  # it would see one percent
