"""Losses of the two-tower (paper A, section 3.3; Yi et al., RecSys 2019).

Shape suffixes: B examples, C candidates (the distinct positives of the batch), D output dimension.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

_NEVER = -1e9


def inclusion_log_q(share: Float[Tensor, "C"], batch: int) -> Float[Tensor, "C"]:
    """Log-probability that an item with this share of all examples is among a batch's distinct positives."""
    return torch.log(-torch.expm1(batch * torch.log1p(-share.double().clamp(1e-12, 1 - 1e-7)))).float()


def sampled_softmax(
    user_BD: Float[Tensor, "B D"],
    item_CD: Float[Tensor, "C D"],
    target_B: Int64[Tensor, "B"],
    log_q_C: Float[Tensor, "C"],
    not_negative_BC: Bool[Tensor, "B C"],
    temperature: float,
) -> Float[Tensor, ""]:
    """In-batch sampled softmax with log-Q correction; ``target_B`` is each example's own column.

    ``not_negative_BC`` marks accidental hits: items the user has seen, and items of another type than the target."""
    logits_BC = user_BD @ item_CD.T / temperature - log_q_C
    keep = not_negative_BC.scatter(1, target_B[:, None], False)
    return F.cross_entropy(logits_BC.masked_fill(keep, _NEVER), target_B)


def paper_loss(
    user_BD: Float[Tensor, "B D"],
    item_CD: Float[Tensor, "C D"],
    target_B: Int64[Tensor, "B"],
    share_C: Float[Tensor, "C"],
    not_negative_BC: Bool[Tensor, "B C"],
) -> Float[Tensor, ""]:
    """The loss as printed in paper A: the mean over negatives of ``o_u . o_n - o_u . o_i``, each weighted by the
    inverse probability of the negative's occurrence. Bounded only because the outputs have unit norm."""
    scores_BC = user_BD @ item_CD.T
    weight_BC = (~not_negative_BC.scatter(1, target_B[:, None], True)) / share_C.clamp(min=1e-12)
    weight_BC = weight_BC / weight_BC.sum(1, keepdim=True).clamp(min=1e-12)
    positive_B = scores_BC.gather(1, target_B[:, None]).squeeze(1)
    return ((weight_BC * scores_BC).sum(1) - positive_B).mean()
