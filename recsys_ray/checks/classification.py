"""How well embeddings predict an item's category, language and type: a linear probe. No Ray in here.

Logistic regression on standardised vectors in k folds, with the regularisation chosen within the training part. Every
item is predicted once, by a model that has not seen it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_STRENGTHS = (0.001, 0.01, 0.1)  # scikit-learn's C: the inverse of the penalty, vectors standardised
_MIN_ITEMS = 20  # of a class
_MAX_CLASSES = 50  # the largest ones
_STEPS = 300


@dataclass(frozen=True)
class Labels:
    """A target: class of each item, -1 where it has none that is large enough."""

    codes: np.ndarray  # int64 [items]
    names: list[str]


def find_labels(items: pa.Table) -> tuple[dict[str, Labels], dict[str, str]]:
    """Targets that this catalogue has, and those that it has not, with the reason.

    Args:
        items: item_type, language (text or null) and categories (list of text), row = gid.
    """
    columns = {
        "item_type": items["item_type"],
        "language": items["language"],
        "category": _main_categories(items["categories"].combine_chunks()),
    }
    found, absent = {}, {}
    for target, column in columns.items():
        labels = _coded(column)
        if len(labels.names) > 1:
            found[target] = labels
        else:
            absent[target] = f"fewer than two classes with {_MIN_ITEMS} items or more"
    return found, absent


def _main_categories(lists: pa.Array) -> pa.Array:
    """Of each item the most frequent of its categories that less than half of the catalogue has."""
    flat, parents = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    coded = flat.dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(coded.dictionary))
    telling = counts[codes] < len(lists) / 2
    codes, parents = codes[telling], parents[telling]
    order = np.lexsort((codes, -counts[codes], parents))
    first = order[np.unique(parents[order], return_index=True)[1]] if len(order) else order
    chosen = np.full(len(lists), -1)
    chosen[parents[first]] = codes[first]
    return coded.dictionary.take(pa.array(chosen, pa.int32(), mask=chosen < 0))


def _coded(column: pa.Array | pa.ChunkedArray) -> Labels:
    counted = sorted(
        ((entry["counts"], entry["values"]) for entry in pc.value_counts(column).to_pylist() if entry["values"]),
        key=lambda pair: (-pair[0], pair[1]),
    )
    names = sorted(name for count, name in counted[:_MAX_CLASSES] if count >= _MIN_ITEMS)
    codes = pc.index_in(column, value_set=pa.array(names, pa.string())).fill_null(-1)
    return Labels(codes.to_numpy().astype(np.int64), names)


def sample_items(labels: Labels, count: int, seed: int) -> np.ndarray:
    """Up to ``count`` items that have a class, ascending."""
    having = np.flatnonzero(labels.codes >= 0)
    return np.sort(np.random.default_rng(seed).permutation(having)[:count])


def predict(vectors: np.ndarray, classes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The class of each item as predicted by a model that was fitted on the other folds, int64 [items].

    Args:
        vectors: float32 [items, d].
        classes: int64 [items].
    """
    from sklearn.model_selection import StratifiedKFold

    guessed = np.full(len(classes), -1, np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*least populated class.*")
        splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(vectors, classes))
    strength = _choose_strength(vectors[splits[0][0]], classes[splits[0][0]], seed)
    for fitted, held_out in splits:
        model = _model(strength).fit(vectors[fitted], classes[fitted])
        guessed[held_out] = model.predict(vectors[held_out])
    return guessed


def _model(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_STEPS))


def _choose_strength(vectors: np.ndarray, classes: np.ndarray, seed: int) -> float:
    """By accuracy on a fifth of the first fold's training part."""
    chosen = np.random.default_rng(seed).random(len(classes)) < 0.2
    scores = [
        _model(c).fit(vectors[~chosen], classes[~chosen]).score(vectors[chosen], classes[chosen]) for c in _STRENGTHS
    ]
    return _STRENGTHS[int(np.argmax(scores))]


def score(classes: np.ndarray, guessed: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """Accuracy and macro-F1 with 95 % percentile bootstrap intervals over items.

    Both depend on the items through the table of (class, guess) alone, so a resample is one multinomial draw.
    """
    count = int(max(classes.max(), guessed.max())) + 1
    table = np.bincount(classes * count + guessed, minlength=count * count)
    drawn = np.random.default_rng(seed).multinomial(len(classes), table / table.sum(), size=resamples)
    values: dict[str, float] = {}
    for name, measure in (("accuracy", _accuracy), ("macro_f1", _macro_f1)):
        low, high = np.quantile(measure(drawn.reshape(-1, count, count)), [0.025, 0.975])
        value = measure(table.reshape(1, count, count))[0]
        values |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return values


def _accuracy(tables: np.ndarray) -> np.ndarray:
    """Of confusion tables [n, classes, classes]."""
    return np.trace(tables, axis1=1, axis2=2) / tables.sum((1, 2))


def _macro_f1(tables: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that occur or are guessed, as scikit-learn's; of tables [n, classes, classes]."""
    right = np.diagonal(tables, axis1=1, axis2=2)
    total = tables.sum(1) + tables.sum(2)
    f1 = np.divide(2.0 * right, total, out=np.zeros(total.shape), where=total > 0)
    return f1.sum(1) / (total > 0).sum(1)
