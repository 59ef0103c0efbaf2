"""Decides which bundle of a folder is served: promotion after a check, and rollback.

``bundles/serving.json`` names the served bundle and the one before it. Servers of the folder watch this pointer, load
the named bundle in the background, check it with :func:`check_release` and swap. ``bundles/current.json``
(recsys_ray/bundle/build.py) is different: it names the newest bundle, which is served until the first promotion.
"""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recsys_ray.bundle.build import CANARY
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact, read_json, sha256, understood
from recsys_ray.storage.outputs import locate_bundle
from recsys_ray.storage.store import Place, local_output, node_cache

SERVING = "serving.json"
_PLACES = 10  # of each canary's answer that are compared


@dataclass(frozen=True)
class Limits:
    """The limits below which a bundle is refused."""

    overlap: float = 0.1  # share of the first places that both bundles fill with the same items, over the canaries
    validation: float = 0.8  # times the NDCG@100 that the bundle before had on its validation period


def folder_of_bundles(path: str | Path) -> Place | None:
    """The folder whose promoted bundle ``path`` means: a folder of bundles or a run's folder. None where ``path`` is
    one bundle, which is served and nothing else."""
    found = locate_bundle(path)
    return None if (Place(str(path)) / "user_tower").exists() else found / ".."


def bundle_to_serve(path: str | Path) -> tuple[Place, bool]:
    """The bundle to serve for ``path``: in a folder of bundles the promoted one, or the newest if none was promoted;
    otherwise as :func:`locate_bundle`. Also whether it must pass the comparison with the previous one, which is not
    required of a bundle named directly or promoted with ``force``.

    Raises:
        ArtifactError: there is no bundle, or the pointer is damaged.
    """
    folder = folder_of_bundles(path)
    pointer = folder and _read(folder)
    if folder and pointer:
        return folder / pointer["output"], not pointer["forced"]
    return locate_bundle(path), folder is not None


def promote(bundle: str | Path, limits: Limits | None = None) -> tuple[str, str | None]:
    """Compare a bundle with the one its folder serves, and make the folder serve it.

    Args:
        bundle: see :func:`locate_bundle`; the newest one where a folder is named.
        limits: None: promote without a comparison; files and answers are still checked.

    Returns:
        The versions served now and before.

    Raises:
        UserError: the bundle is damaged or worse; the message says how.
    """
    place = locate_bundle(bundle)
    folder = place / ".."
    before, _ = bundle_to_serve(str(folder))
    new = Recommender.load(str(place))
    if before.name != place.name and (before / "manifest.json").exists():
        check_release(new, Recommender.load(str(before), verify=False), limits)
    else:
        check_release(new, None, limits)
    _write(folder, place.name, before.name, forced=limits is None)
    return place.name, before.name if before.name != place.name else None


def rollback(path: str | Path) -> tuple[str, str]:
    """Make a folder serve what it served before the last promotion; returns the versions now and before.

    Raises:
        UserError: there is nothing to roll back to.
    """
    folder = folder_of_bundles(path) or locate_bundle(path) / ".."
    pointer = _read(folder)
    if not pointer or not pointer.get("previous"):
        raise UserError(f"nothing was promoted in {folder}, so there is nothing to roll back to")
    previous = pointer["previous"]
    if not (folder / previous / "manifest.json").exists():
        raise UserError(f"version {previous}, which {folder} served before, no longer exists")
    _write(folder, previous, pointer["output"], forced=True)
    return previous, pointer["output"]


def check_release(new: Recommender, live: Recommender | None, limits: Limits | None) -> float | None:
    """Checks whether ``new`` may replace ``live``: asks both for the canary users of ``new``.

    Returns:
        The overlap of their answers; None where there is nothing to compare.

    Raises:
        ArtifactError: ``new`` gives no answer, the answers have too little in common, or its validation score is much
            worse.
    """
    with understood(new.artifact.path / CANARY):
        users = list(read_json(new.artifact.path / CANARY)["user_ids"])
    shared = []
    for user_id in users:
        with understood(new.artifact.path):
            answer = new.recommend(user_id=user_id, k=_PLACES)
        if not answer or not np.isfinite([item.score for item in answer]).all():
            raise ArtifactError(f"bundle {new.version} gives no answer for one of its canary users; build it again")
        if live is not None and live.users.find(user_id) is not None:
            other = {item.item_id for item in live.recommend(user_id=user_id, k=_PLACES)}
            shared.append(len(other & {item.item_id for item in answer}) / len(answer))
    if live is None:
        return None
    overlap = float(np.mean(shared)) if shared else None
    if limits is not None and overlap is not None and overlap < limits.overlap:
        raise ArtifactError(
            f"bundle {new.version} differs too much from {live.version}: {overlap:.0%} of the top {_PLACES} items "
            f"are the same for {len(shared)} users (at least {limits.overlap:.0%} required); use --force if intended"
        )
    was, is_now = (one.artifact.counts.get("validation_ndcg_at_100") for one in (live, new))
    if limits is not None and was and is_now is not None and is_now < limits.validation * was:
        raise ArtifactError(
            f"bundle {new.version} has validation NDCG@100 {is_now:.4f}, below {limits.validation:.0%} of the "
            f"{was:.4f} of {live.version}; use --force if intended"
        )
    return overlap


def load_verified(place: Place) -> Recommender:
    """Open a bundle whose files were compared with their checksums, by this process or another one of this host.

    Raises:
        ArtifactError: it is not whole.
    """
    folder = local_output(place)
    open_artifact(folder)
    verify_once(folder)
    return Recommender.load(folder, verify=False)


def verify_once(folder: Path) -> None:
    """Compare a bundle's files with their checksums, once for all processes of this host.

    Raises:
        ArtifactError: one differs.
    """
    print_of = sha256(folder / "manifest.json")
    mark = node_cache() / "verified" / f"{print_of[:32]}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = json.dumps(sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")))
        if not mark.exists() or mark.read_text(encoding="utf-8") != states:
            open_artifact(folder, verify=True)
            mark.write_text(states, encoding="utf-8")


def _read(folder: Place) -> dict[str, Any] | None:
    try:
        pointer: dict[str, Any] = json.loads((folder / SERVING).read())
        return pointer if pointer["output"] and pointer["forced"] in (True, False) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{folder / SERVING} is damaged; promote a bundle again") from None


def _write(folder: Place, version: str, previous: str, forced: bool) -> None:
    before = previous if previous != version else None
    pointer = {"output": version, "previous": before, "forced": forced, "promoted_at": round(time.time())}
    (folder / SERVING).write(json.dumps(pointer).encode())
