"""Trends: an item term of what the last weeks tell of each item that towers do not know.

Towers see how often an item was chosen of late, but as of the snapshot of an example, which lies up to months before
it: so they learn that a week's counts mean little. Where trends rule, that costs more than all that is personal
brings. So when the towers are done, each item that somebody had is given (ours, not the papers')

    trend_i = w * T * log r_i

r_i is how many times as often as the towers expect it is chosen now. It is followed through ``PERIODS``, from r_i = 1:

    r_i <- r_i * (c_i + a) / (N * p_i + a),    p_i proportional to q_i * r_i

c_i are the choices of a period, N those of the item's type together, q_i the share that the towers themselves give it:
their softmax over the type, in the mean over users. The factor is the mean of a Gamma posterior: what chance alone
explains moves little, for the prior, Gamma(a, a), is the one that fits the type's counts best (DuMouchel, Bayesian data
mining in large frequency tables, American Statistician 1999). What of an item's past the towers know enters with q_i,
so that nothing counts twice.

The weight w is chosen for each item type on the validation period; no trend, w = 0, is the choice that others have to
beat (recsys_ray/scoring/choose.py). In leave-one-out there are no last weeks.

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
    """log r of every item, float32; 0 for items that nobody had and for types that nobody was asked about.

    Args:
        choices: as of a snapshot, see recsys_ray/scoring/choices.py.
        expected: q, in any unit: the sum over users of the towers' softmax over the type's items that somebody had.
        ntype: number of each item's type.
    """
    found = np.zeros(len(expected))
    for kind in np.unique(ntype[expected > 0]):
        mine = np.flatnonzero((ntype == kind) & (choices[0] > 0) & (expected > 0))
        for count in choices[1:, mine]:
            share = expected[mine] * np.exp(found[mine])
            found[mine] += surplus(count, share / share.sum())
    return found.astype(np.float32)
