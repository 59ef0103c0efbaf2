"""Contrastive losses over co-interaction edges: in-batch softmax, and the papers' max-margin.

Shape suffixes: B edges of the batch, K shared catalogue negatives, O embedding dimension.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

_NEVER = -1e9


def in_batch_softmax(
    anchor_BO: Float[Tensor, "B O"],
    positive_BO: Float[Tensor, "B O"],
    anchors: Int64[Tensor, "B"],
    positives: Int64[Tensor, "B"],
    positive_types: Int64[Tensor, "B"],
    log_q: Float[Tensor, "B"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Softmax of each positive against the batch's other positives of its item type.

    ``log_q`` is the log of how often the sampler draws each positive: subtracting it keeps popular items from being
    pushed away merely for turning up as negatives more often (Yi et al., RecSys 2019). Not negatives: the same item
    again, and the other positives of the same anchor.
    """
    logits_BB = anchor_BO @ positive_BO.T / temperature - log_q
    not_negative = (
        (positive_types[:, None] != positive_types) | (positives[:, None] == positives) | (anchors[:, None] == anchors)
    )
    not_negative.fill_diagonal_(False)
    return F.cross_entropy(logits_BB.masked_fill(not_negative, _NEVER), torch.arange(len(anchors)))


def max_margin(
    anchor_BO: Float[Tensor, "B O"],
    positive_BO: Float[Tensor, "B O"],
    negative_KO: Float[Tensor, "K O"],
    not_negative_BK: Bool[Tensor, "B K"],
    margin: float,
) -> Float[Tensor, ""]:
    """``max(0, z_a . z_n - z_a . z_p + margin)``, averaged over the pairs of an edge and a catalogue negative that is
    not linked to its anchor (paper A, section 3.2)."""
    positive_B1 = (anchor_BO * positive_BO).sum(-1, keepdim=True)
    violation_BK = F.relu(anchor_BO @ negative_KO.T - positive_B1 + margin)
    kept_BK = (~not_negative_BK).to(violation_BK.dtype)
    return (violation_BK * kept_BK).sum() / kept_BK.sum().clamp(min=1)
