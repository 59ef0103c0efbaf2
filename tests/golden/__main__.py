"""Keep the figures of the small run anew: ``python -m tests.golden`` from the top of the project."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does: the worlds lie there

from pipeline_world import EVENTS, SEED, SMALL, configure, make_data, make_run

from golden.small import FILE, changes, figures_of
from recsys_ray.storage.artifacts import software

kept = json.loads(FILE.read_text(encoding="utf-8"))["figures"] if FILE.exists() else {}
with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    make_data(root / "data")
    make_run(configure(root, root / "data", "run"))
    found = figures_of(root / "run")
facts = {"demo-data": {"events": EVENTS, "seed": SEED}, "run": SMALL, "software": software()}
FILE.write_text(json.dumps({**facts, "figures": found}, indent=1) + "\n", encoding="utf-8")
print("\n".join(changes(kept, found)) or "no figure moved by more than its tolerance")
