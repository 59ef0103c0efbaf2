"""A type that training had no example of: how many of its items that nobody had may stand in a list.

Towers carry over to a type that has only begun what they learned of others, where an item that nobody had is a novelty
and some users like nothing better. In the new type nearly every item is one, and such a user's list would hold nothing
else. But what happened so far tells how likely the next event is about an item that nobody had (Good, The population
frequencies of species and the estimation of population parameters, Biometrika 1953): as likely as an event so far is
its item's only one. So in the softmax of a user's scores over the type, which the towers are trained as, the items that
nobody had are given this much together, each its share of it, by one number that is added to all of them (ours).

Imports neither dgl nor transformers: it is used in a serving replica.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def share_of_blank(users: Int[np.ndarray, "n"]) -> float:
    """The probability that the next event of a type is about an item that nobody had; never 0 or 1.

    Args:
        users: how many had each of the type's items.
    """
    return float(((users == 1).sum() + 0.5) / (users.sum() + 1))


def shift_of_blank(
    blank: Float[Tensor, "B"], others: Float[Tensor, "B"], share: float, temperature: float
) -> Float[Tensor, "B"]:
    """What is added to the score of each item that nobody had; 0 where there are only such items, or none.

    Args:
        blank, others: log of the sum of exp(score / temperature) of the items that nobody had, and of the others.
        share: what the softmax is to give the first together.
    """
    shift = temperature * (np.log(share / (1 - share)) + others - blank)
    return shift.where(torch.isfinite(shift), 0)
