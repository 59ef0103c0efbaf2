"""What the HGNN's embedding has to reach: at least what anything simple makes of the same data. Each check compares a
figure of a finished run with its target. No Ray in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys_ray.checks.probe import LaterPairs
from recsys_ray.checks.similar import CUTOFFS
from recsys_ray.checks.style import BANDS, band_name
from recsys_ray.evaluation.metrics import bootstrap_interval
from recsys_ray.evaluation.results import EVERY_TYPE, Hits, difference

TITLE = "The embedding against simple vectors"
HGNN, TEXT, LLM_KNN, COSINE = "hgnn", "text", "llm_knn", "cosine_item_knn"
STYLE_RIVALS = ("svd", "pmi_svd", "ials")
SIMILAR_RIVALS = ("item2vec", "svd", "pmi_svd", TEXT)
TARGETS = ("category", "language")
ALLOWANCE = 0.02  # by which the embedding's accuracy may be below that of the text
LABELS = {
    HGNN: "HGNN", TEXT: "text", LLM_KNN: "LLM-kNN", COSINE: "cosine kNN", "svd": "SVD", "pmi_svd": "PMI-SVD",
    "ials": "iALS", "item2vec": "item2vec",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A figure and its target; or why this run cannot tell."""

    what: str
    where: str
    target: float | None = None
    of: str = ""  # whose figure the target is
    reached: float | None = None
    above: bool = False  # the target itself is not enough
    interval: tuple[float, float] | None = None  # 95 %, of the difference from the target
    absent: str = ""

    @property
    def holds(self) -> bool | None:
        if self.target is None or self.reached is None:
            return None
        return self.reached > self.target if self.above else self.reached >= self.target

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "no", None: "not checked"}[self.holds]


def _best(figures: Mapping[str, float | None], rivals: Sequence[str]) -> tuple[str, float]:
    """The rival with the highest figure."""
    known = {name: figure for name in rivals if (figure := figures.get(name)) is not None}
    name = max(known, key=lambda rival: known[rival])
    return name, known[name]


def check_style(explained: Mapping[str, Sequence[float | None]], absent: str = "") -> list[Check]:
    """R2 of the demo's style in each band, at or above the best factorisation.

    Args:
        explained: vectors -> R2 by band (:func:`recsys_ray.checks.style.explained`).
        absent: why there is none.
    """
    what, made = "style R2", []
    if absent:
        return [Check(what, "all items", absent=absent)]
    for place, band in enumerate(BANDS):
        figures = {name: values[place] for name, values in explained.items()}
        if (reached := figures[HGNN]) is None:
            made.append(Check(what, band_name(band), absent="too few items"))
            continue
        rival, target = _best(figures, STYLE_RIVALS)
        made.append(Check(what, band_name(band), target, LABELS[rival], reached))
    return made


def check_similar(pairs: LaterPairs, ranks: Mapping[str, np.ndarray], resamples: int, seed: int) -> list[Check]:
    """Recall of the items that users come to share, above item2vec, SVD and text."""
    made = []
    for k in CUTOFFS:
        what = f"similar, recall@{k}"
        if not len(pairs.query):
            made.append(Check(what, "all types", absent="no two items are first shared in the test period"))
            continue
        hit = {name: rank < k for name, rank in ranks.items()}
        rival, target = _best({name: float(found.mean()) for name, found in hit.items()}, SIMILAR_RIVALS)
        apart = hit[HGNN].astype(np.int64) - hit[rival]
        interval = bootstrap_interval(apart, pairs.query, resamples, seed)
        made.append(
            Check(what, "all types", target, LABELS[rival], float(hit[HGNN].mean()), above=True, interval=interval)
        )
    return made


def check_labels(rows: Sequence[Mapping[str, Any]], absent: Mapping[str, str]) -> list[Check]:
    """Category and language read off the embedding, within ``ALLOWANCE`` of the text.

    Args:
        rows: target, vectors and accuracy.
        absent: target -> why it is not to be had.
    """
    made = []
    for target in TARGETS:
        accuracy = {row["vectors"]: row["accuracy"] for row in rows if row["target"] == target}
        what = f"{target}, accuracy"
        if accuracy:
            wanted = accuracy[TEXT] - ALLOWANCE
            made.append(Check(what, "all items", wanted, f"{LABELS[TEXT]} - {ALLOWANCE}", accuracy[HGNN]))
        else:
            made.append(Check(what, "all items", absent=absent.get(target, "not in these data")))
    return made


def check_rankings(hits: Sequence[Hits], types: Sequence[str], resamples: int, seed: int) -> list[Check]:
    """The HGNN alone against LLM-kNN on unseen items, and against LLM-kNN and cosine item-kNN in each type.

    Args:
        hits: of each training seed, with the three models; empty if the run was not evaluated.
    """
    places = [(item_type, rival) for item_type in types for rival in (LLM_KNN, COSINE)]
    return [
        _check_ranking(hits, "unseen items, HR@10", EVERY_TYPE, "cold_items", LLM_KNN, False, resamples, seed),
        *(
            _check_ranking(hits, "HR@10", item_type, "warm", rival, True, resamples, seed)
            for item_type, rival in places
        ),
    ]


def _check_ranking(
    hits: Sequence[Hits], what: str, item_type: str, segment: str, rival: str, above: bool, resamples: int, seed: int
) -> Check:
    where = "all types" if item_type == EVERY_TYPE else item_type
    if not hits:
        return Check(what, where, absent="the run has no evaluation")
    missing = [LABELS[model] for model in (HGNN, rival) if model not in hits[0].hit]
    if missing:
        return Check(what, where, absent=f"the evaluation is without {' and '.join(missing)}")
    chosen = hits[0].chosen(item_type, [segment], HGNN, rival)
    if not len(chosen):
        return Check(what, where, absent="no list asks for it")
    ours, theirs = (np.stack([h.hit_in(model, [segment])[chosen] for h in hits]) for model in (HGNN, rival))
    found = difference(ours, theirs, hits[0].uid[chosen], resamples, seed)
    interval = found["low"], found["high"]
    return Check(what, where, found["hr_at_10_against"], LABELS[rival], found["hr_at_10"], above, interval)
