"""Unseen items: calibrates their share of choices and, in a type without training examples, the other items'
popularity.

A share of all choices in a period goes to items that no user had at its start (unseen items;
recsys_ray/scoring/choices.py). The towers cannot learn it, because in-batch training never shows them an item that
nobody chooses. With many such items they overrate each; if the last new items of a catalogue are about to be found,
they underrate them. So, in the softmax of a user's scores over an item type (as which the towers are trained), unseen
items are given a fixed share together and keep their order (ours). One number per type is added to their scores, so
that they have this share on average over users (:func:`shift_to_share`):

* in a type with training examples, the share of a past period as long as the one ahead (:func:`share_ahead`);
* in a type without, the share that its own events suggest (Good, The population frequencies of species and the
  estimation of population parameters, Biometrika 1953): the next event is on an unseen item with the probability that
  an event is its item's only one (:func:`share_of_events`). The towers do not know what is popular there either, so the
  other items get what makes the mean user's softmax over them equal to their popularity (:func:`popular_in_type`);
  differences from the mean user remain the towers'.

Imports neither dgl nor transformers, because serving replicas use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor

Shares = Sequence[float | None]  # of each item type; None: it has no examples
_FAR = 200.0  # log-odds beyond any share
_BY_NUMBER = 0.25  # 0: unseen items have the share of before however many there are; 1: each has what each had before
_CAUTION = 0.5  # how far the share is set below the estimate, in log-odds


def share_of_events(had: Int[np.ndarray, "n"]) -> float:
    """Good's share; never 0 or 1.

    Args:
        had: how many users had each of the type's items.
    """
    return float(((had == 1).sum() + 0.5) / (had.sum() + 1))


class Period(NamedTuple):
    """A stretch of the past, and of each type how many targets it has, how many of these were unseen as it began,
    and how many items were."""

    seconds: int
    targets: Float[Tensor, "types"]
    unseen: Float[Tensor, "types"]
    items: Float[Tensor, "types"]

    def share(self, kind: int) -> float:
        """Never 0 or 1."""
        return (float(self.unseen[kind]) + 0.5) / (float(self.targets[kind]) + 1)


def share_ahead(
    seconds: int, items: Float[Tensor, "types"], lately: Period, before: Sequence[Period]
) -> list[float | None]:
    """Each type's share of unseen items in the coming period. The longer a period, the larger the share of items that
    were unseen at its start, so the share is interpolated linearly between past periods and constant beyond the longest
    and the shortest. With fewer unseen items than then, the share is smaller, but larger per item: its odds scale with
    the fourth root of their number. The share is set below this estimate, because the towers are overconfident about
    which unseen item suits whom, and a share that is too large costs more than one that is too small
    (docs/experiments.md has the figures).

    Args:
        seconds: length of the coming period.
        items: number of unseen items at its start.
        lately: the validation period.
        before: from each cut to validation, the last cut first; a type without targets in that one has no share.
            Periods no longer than validation count only if validation has no targets.
    """
    found: list[float | None] = []
    for kind in range(len(items)):
        if not before[0].targets[kind]:
            found.append(None)
            continue
        longer = [period for period in before if period.seconds > lately.seconds]
        told = [lately, *longer] if lately.targets[kind] else longer or [before[0]]
        told.sort(key=lambda period: period.seconds)
        length = [period.seconds for period in told]
        share = float(np.interp(seconds, length, [period.share(kind) for period in told]))
        then = float(np.interp(seconds, length, [float(period.items[kind]) for period in told]))
        scale = (float(items[kind]) / then) ** _BY_NUMBER if then and items[kind] else 1.0
        odds = share / (1 - share) * scale * float(np.exp(-_CAUTION))
        found.append(odds / (1 + odds))
    return found


def shift_to_share(share: float, log_odds: Float[Tensor, "B"]) -> float:
    """What is added to all of these log-odds so that the mean of their probabilities is ``share``; 0 where no user has
    both kinds of items.

    Args:
        log_odds: of each user, of the unseen items' part of the softmax. Not finite where a user has only one kind.
    """
    known = log_odds[torch.isfinite(log_odds)].double()
    if not len(known):
        return 0.0

    def excess(added: float) -> float:
        return float(torch.sigmoid(known + added).mean()) - share

    return float(brentq(excess, -_FAR, _FAR))


def popular_in_type(
    vectors: Float[Tensor, "N d"], had: Int[np.ndarray, "N"], mean_user: Float[Tensor, "d"], temperature: float
) -> Float[Tensor, "N"]:
    """What is added to the scores of a type's items so that the mean user's softmax over the items that are not unseen
    is proportional to their number of users; 0 for unseen items.

    Args:
        had: how many users had each item.
    """
    seen = torch.from_numpy(had > 0)
    added = torch.zeros(len(had))
    share = torch.from_numpy(had[had > 0] / max(had.sum(), 1)).float()
    added[seen] = temperature * (share.log() - (vectors[seen] @ mean_user / temperature).log_softmax(0))
    return added
