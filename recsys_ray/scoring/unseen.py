"""How much goes to items that nobody had, blank ones, and in a type without training examples to each other item.

Of what will be chosen in a period, a share goes to items that nobody had at its beginning. Towers do not know it:
in-batch training shows them no item that nobody chooses, so where the shelf is full of these they overrate each; and
where the last new items of a catalogue are about to be found, they underrate them. So in the softmax of a user's scores
over a type, which the towers are trained as, blank items are given a share together, and keep their order (ours):

* of a type with training examples, in the mean over users: what the past tells of a period as long as the one ahead
  (:func:`share_ahead`). One number a type and snapshot is added to the scores of its blank items. Users differ as the
  towers say;
* of a type without, for each user: that which the type's events tell (Good, The population frequencies of species and
  the estimation of population parameters, Biometrika 1953): the next event is as likely about a blank item as one of
  them is its item's only one. What the towers carry over from other types, where a blank item is a novelty that some
  users like best, does not hold where nearly every item is one. Nor do the towers know what is popular there. So the
  other items are given what makes the mean user's softmax over them how often each was had
  (:func:`shift_of_touched`); how a user differs from the mean user stays the towers'.

Imports neither dgl nor transformers: it is used in a serving replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from scipy.optimize import brentq
from torch import Tensor

Shares = Sequence[float | None]  # of each item type; None: it has no examples
_CELLS = 1 << 24  # scores held at once
_FAR = 60.0  # log-odds beyond any share
_BY_NUMBER = 0.25  # 0: blank items have the share of before however many there are; 1: each has what each had before
_CAUTION = 0.5  # how far below the guess they are kept, in log-odds


def share_of_events(users: Int[np.ndarray, "n"]) -> float:
    """Good's share; never 0 or 1.

    Args:
        users: how many had each of the type's items.
    """
    return float(((users == 1).sum() + 0.5) / (users.sum() + 1))


class Period(NamedTuple):
    """A stretch of the past, and of each type how many targets it has, how many of these were blank as it began, and
    how many items were."""

    seconds: int
    targets: Float[Tensor, "types"]
    blank: Float[Tensor, "types"]
    items: Float[Tensor, "types"]

    def share(self, kind: int) -> float:
        """Never 0 or 1."""
        return (float(self.blank[kind]) + 0.5) / (float(self.targets[kind]) + 1)


def share_ahead(
    seconds: int, items: Float[Tensor, "types"], lately: Period, before: Sequence[Period]
) -> list[float | None]:
    """Each type's share in the period to come: the longer it is, the more goes to items that nobody had as it began. So
    it is taken from periods of the past, linear in between, constant beyond the longest and the shortest. Fewer blank
    items than there were then get less of it, but each of them more: its odds go with the fourth root of their number.
    And they are kept below that, for towers are surer which blank item suits whom than they should be, and a share that
    is too large costs more than one that is too small (docs/experiments.md has the figures).

    Args:
        seconds: how long the period to come is.
        items: how many are blank as it begins.
        lately: the validation period.
        before: from each cut to validation, the last cut's first; a type without targets in that is not known. Those no
            longer than validation tell only where it has no targets.
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


def shift_of_each(
    blank: Float[Tensor, "B"], others: Float[Tensor, "B"], share: float, temperature: float
) -> Float[Tensor, "B"]:
    """What is added to the scores of blank items so that each user's have ``share``; 0 where there are only blank
    items, or none.

    Args:
        blank, others: log of the sum of exp(score / temperature) over the blank items, and over the others.
    """
    shift = temperature * (np.log(share / (1 - share)) + others - blank)
    return shift.where(torch.isfinite(shift), 0)


def shift_of_touched(
    vectors: Float[Tensor, "N d"], users: Int[np.ndarray, "N"], mean_user: Float[Tensor, "d"], temperature: float
) -> Float[Tensor, "N"]:
    """What is added to the scores of a type's items so that the mean user's softmax over those that somebody had is in
    proportion to how many had each; 0 for blank items.

    Args:
        users: how many had each item.
    """
    had = torch.from_numpy(users > 0)
    shift = torch.zeros(len(users))
    share = torch.from_numpy(users[users > 0] / max(users.sum(), 1)).float()
    shift[had] = temperature * (share.log() - (vectors[had] @ mean_user / temperature).log_softmax(0))
    return shift


def popular_where_untrained(
    vectors: Float[np.ndarray, "N d"],
    ntype: Int[np.ndarray, "N"],
    users: Int[np.ndarray, "N"],
    shifts: Sequence[float | None],
    mean_user: Sequence[float] | None,
    temperature: float,
) -> Float[np.ndarray, "N"]:
    """What every item is given because of how many had it: :func:`shift_of_touched` in types without training
    examples, 0 in all others.

    Args:
        shifts: of each type, see :func:`known_shift`.
        mean_user: None: of towers of before, which do not know what is popular there.
    """
    given = np.zeros(len(users), np.float32)
    for kind in [kind for kind, shift in enumerate(shifts) if shift is None and mean_user]:
        mine = np.flatnonzero(ntype == kind)
        items, mean = torch.from_numpy(vectors[mine]).float(), torch.tensor(mean_user)
        given[mine] = shift_of_touched(items, users[mine], mean, temperature).numpy()
    return given


def shift_of_all(
    users: Float[Tensor, "B d"],
    vectors: Float[Tensor, "N d"],
    blank: Bool[Tensor, "N"],
    ntype: Int64[Tensor, "N"],
    shares: Shares,
    temperature: float,
) -> list[float]:
    """Of each type what is added to the scores of blank items so that they have their share in the mean over ``users``;
    0 where there are only blank items, or none, or no share is known."""
    found = []
    for kind, share in enumerate(shares):
        mine, new = vectors[ntype == kind], blank[ntype == kind]
        if share is None or not len(users) or not new.any() or new.all():
            found.append(0.0)
            continue
        odds = []
        for part in users.split(max(1, _CELLS // len(mine))):
            scores = part @ mine.T / temperature
            odds.append(scores[:, new].logsumexp(1) - scores[:, ~new].logsumexp(1))
        found.append(temperature * _to_reach(share, torch.cat(odds).double()))
    return found


def _to_reach(share: float, log_odds: Float[Tensor, "B"]) -> float:
    """What is added to all of these log-odds so that the mean of their probabilities is ``share``."""

    def excess(added: float) -> float:
        return float(torch.sigmoid(log_odds + added).mean()) - share

    return float(brentq(excess, -_FAR, _FAR))


def known_shift(shares: Shares | None, shifts: Mapping[str, Sequence[float]], snapshot: str, kind: int) -> float | None:
    """What blank items of a type are given as of a snapshot; None: each user's own, by :func:`share_of_events`.

    Args:
        shares: None: of towers of before, which leave blank items alone.
    """
    if shares is None:
        return 0.0
    if kind >= len(shares) or shares[kind] is None:
        return None
    return shifts[snapshot][kind]
