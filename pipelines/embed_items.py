"""``recsys-ray embed-items``: new items into a bundle, without any training."""

from __future__ import annotations

import time
from pathlib import Path

from recsys_ray.cluster.session import granted_cpus
from recsys_ray.core.progress import Progress


def embed_items(
    items: Path,
    bundle: str,
    interactions: Path | None,
    out: Path | None,
    replace: bool,
    make_current: bool,
    progress: Progress,
) -> None:
    """Extend a bundle and say where the new one is; arguments as ``extend_bundle``."""
    from recsys_ray.bundle.extend import extend_bundle  # loads torch and dgl

    started = time.monotonic()
    made = extend_bundle(bundle, items, interactions, progress, out, replace, make_current, granted_cpus())
    link = ", and current points at it" if make_current else ""
    progress.say(f"    done in {time.monotonic() - started:,.0f} s -> {made.path}{link}")
