"""Trends: an item term for recent popularity that the towers do not know.

The towers see how often an item was chosen recently, but as of an example's snapshot, which may be months before the
example. So they learn that a week's counts mean little. Where trends are strong, that costs more than personalisation
gains. After training, each item that is not unseen therefore gets (ours, not the papers')

    trend_i = w * T * log r_i

r_i says how many times as often as the towers expect the item is being chosen now. Starting from r_i = 1, it is updated
for each of the ``PERIODS``:

    r_i <- r_i * (c_i + a) / (N * p_i + a),    p_i proportional to q_i * r_i

c_i are the choices of a period, N those of the whole item type, and q_i is the share that the towers give the item:
their softmax over the type, averaged over users. The factor is the mean of a Gamma posterior whose prior, Gamma(a, a),
fits the type's counts best, so that chance moves little (DuMouchel, Bayesian data mining in large frequency tables,
American Statistician 1999). What the towers know about an item's past is in q_i, so nothing counts twice.

The weight w is chosen for each item type on the validation period; w = 0, no trend, is kept unless another weight is
clearly better (recsys_ray/scoring/choose.py). Leave-one-out has no last weeks and no trends.

Imports neither dgl nor transformers.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # which a validation chooses from
_PRIOR = np.log(0.1), np.log(1e4)  # log of the least and the largest a


def surplus(count: Int[np.ndarray, "n"], share: Float[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """log (c + a) / (N p + a) of a type's items, with the a that fits them best.

    Args:
        count: c, choices of a period.
        share: p, what is expected; the sum is 1.
    """
    expected = count.sum() * share

    def misfit(log_prior: float) -> float:
        """Minus the log-likelihood of the counts, negative binomial with mean ``expected``, without constants."""
        a = np.exp(log_prior)
        terms = gammaln(count + a) - gammaln(a) - count * np.log(expected + a) - a * np.log1p(expected / a)
        return -float(terms.sum())

    prior = np.exp(minimize_scalar(misfit, bounds=_PRIOR, method="bounded").x)
    return np.log((count + prior) / (expected + prior))


def log_ratios(
    choices: Int[np.ndarray, "ever_and_periods N"], expected: Float[np.ndarray, "N"], ntype: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """log r of every item, float32; 0 for unseen items and for types without queries.

    Args:
        choices: as of a snapshot, see recsys_ray/scoring/choices.py.
        expected: q, in any unit: the sum over users of the towers' softmax over the type's items that are not unseen.
        ntype: number of each item's type.
    """
    found = np.zeros(len(expected))
    for kind in np.unique(ntype[expected > 0]):
        mine = np.flatnonzero((ntype == kind) & (choices[0] > 0) & (expected > 0))
        for count in choices[1:, mine]:
            share = expected[mine] * np.exp(found[mine])
            found[mine] += surplus(count, share / share.sum())
    return found.astype(np.float32)
